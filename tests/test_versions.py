"""Versions: the specifications' own examples are the data."""

from __future__ import annotations

import itertools

import pytest

from selfupdate.errors import VersionError
from selfupdate.versions import Specifiers, parse, parse_output

# semver.org/spec/v2.0.0, sections 11.2 and 11.4.4, as one chain; PEP 440 texts stand where their authors mean them.
CHAIN = [
    "1.0.0.dev3",
    "1.0.0-alpha",
    "1.0.0-alpha.1",
    "1.0.0a2",
    "1.0.0-alpha.beta",
    "1.0.0-beta",
    "1.0.0-beta.2",
    "1.0.0-beta.11",
    "1.0.0-rc.1",
    "1.0.0rc2",
    "1.0.0",
    "1.1.0-0.3.7",
    "1.1.0.dev1",
    "1.1.0-1",
    "1.1.0-x.7.z.92",
    "1.1",
    "2.0.0",
    "2.1.0",
    "2.1.1",
    "10.0.0",
]


@pytest.mark.parametrize(("lower", "higher"), list(itertools.combinations(CHAIN, 2)))
def test_each_in_the_chain_is_lower_than_each_behind_it(lower: str, higher: str) -> None:
    """Precedence is total, and the chain is in its order."""
    assert parse(lower) < parse(higher)
    assert not parse(higher) < parse(lower)
    assert parse(lower) != parse(higher)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1.0.0+20130313144700", "1.0.0+exp.sha.5114f85"),
        ("1.2", "1.2.0"),
        ("v1.2.3", "1.2.3"),
        ("1.2.0rc1", "1.2.0-rc.1"),
    ],
)
def test_these_are_equal(one: str, other: str) -> None:
    """Build metadata has no part in precedence (section 10)."""
    assert parse(one) == parse(other)
    assert hash(parse(one)) == hash(parse(other))


# The regular expression's own test cases of the specification (section FAQ), and what packaging would take.
@pytest.mark.parametrize(
    "text",
    [
        "", "1.2.3-0123", "1.2.3-0123.0123", "1.1.2+.123", "+invalid", "-invalid", "alpha", "1.0.0-alpha_beta",
        "1.0.0-alpha..",
        "1.0.0-alpha..1", "01.1.1", "1.01.1", "1.1.01", "1.2.3.DEV", "1.2-SNAPSHOT",
        "1.2.31.2.3----RC-SNAPSHOT.12.09.1--..12+788",
        "-1.0.3-gamma+b7718", "+justmeta", "9.8.7+meta+meta", "1!9.9", "1.0.0.post1", "1.2.3.4", "1.0rc01",
        "٣.0.0", "1.2.3\n",
        " 1.2.3", "1." + "9" * 5000 + ".0", "9" * 19 + ".0.0", "1.0.0-" + "a" * 200, "vv1.0.0", "V1.0.0",
    ],
)  # fmt: skip
def test_these_are_no_versions(text: str) -> None:
    """What neither specification has, or SemVer can't order, is refused with what was expected."""
    with pytest.raises(VersionError, match=r"is not a version: expected Semantic Versioning 2\.0\.0"):
        parse(text)


@pytest.mark.parametrize(
    ("output", "version"),
    [
        (b"1.2.3\n", "1.2.3"),
        (b"1.2.3", "1.2.3"),
        (b"1.2.3\r\n", "1.2.3"),
        (b"v1.2.3\n", "1.2.3"),
        (b"name 1.2.3\n", "1.2.3"),
        (b"name version v1.2.3-rc.1+b5\n", "1.2.3-rc.1+b5"),
    ],
)
def test_output_that_is_a_version(output: bytes, version: str) -> None:
    """The version alone, with a v, or at the end of a line."""
    assert str(parse_output(output)) == version


@pytest.mark.parametrize(
    "output",
    [
        b"", b"\n", b"1.2.3\n2.0.0\n", b"1.2.3 \n", b"1.2.3\r9.9.9\n", b"\x001.2.3\n", b"\x1b[31m1.2.3\n",
        b"\xff1.2.3\n",
        b"1.2.3 yes",
        "1.2.3\u202e".encode(), b"\n1.2.3\n",
    ],
)  # fmt: skip
def test_output_that_is_no_version(output: bytes) -> None:
    """More than a line, or anything but printable ASCII, is refused, and shown escaped."""
    with pytest.raises(VersionError) as caught:
        parse_output(output)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("specifiers", "text", "allowed"),
    [
        (">=1.2,<2", "1.2.0", True),
        (">=1.2,<2", "1.9.9+build.5", True),
        (">=1.2,<2", "2.0.0", False),
        (">=1.2,<2", "1.3.0-rc.1", False),
        (">=1.2rc0,<2", "1.3.0-rc.1", True),
        (">=1.2,<2", "1.3.0-1", False),
        (">=1.2", "1.3.0-x.7.z.92", False),
    ],
)
def test_allow(specifiers: str, text: str, allowed: bool) -> None:  # noqa: FBT001 - data
    """Specifiers have PEP 440's meaning: pre-releases only where one is named."""
    assert (parse(text) in Specifiers(specifiers)) is allowed


def test_bad_specifiers() -> None:
    """The text says what was found, and what a specifier looks like."""
    with pytest.raises(VersionError, match=r"'1\.2 or so' is not a version specifier such as"):
        Specifiers("1.2 or so")
