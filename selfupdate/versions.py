"""Versions: what a program may print, and which of two is the greater.

Precedence is that of Semantic Versioning 2.0.0, section 11, alone. A text is
read as SemVer first, strictly; only what SemVer does not know is then read as
PEP 440, which Python programs print (`1.2`, `1.2.0rc1`), and given the place in
SemVer's order that its author meant. `packaging.version` never ranks: it takes
`1!0.1` for greater than `99.0.0` and `1.0.0-1` for greater than `1.0.0`.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from selfupdate.errors import VersionError

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_LENGTH = 128
"""Characters of a version; more is refused before it is parsed."""

_NUMBER = r"(?:0|[1-9][0-9]{0,17})"
_IDENTIFIER = rf"(?:{_NUMBER}|[0-9]*[a-zA-Z-][0-9a-zA-Z-]*)"
_SEMVER = (  # compiled when the first version is asked, not at start
    rf"(?P<release>{_NUMBER}\.{_NUMBER}\.{_NUMBER})"
    rf"(?:-(?P<pre>{_IDENTIFIER}(?:\.{_IDENTIFIER})*))?"
    r"(?:\+(?P<build>[0-9a-zA-Z-]+(?:\.[0-9a-zA-Z-]+)*))?"
)

# SemVer 2.0.0, section 11.4: numeric identifiers rank below alphanumeric ones; a longer
# list ranks above its own beginning; and a release ranks above each of its pre-releases.
_RELEASE_KEY: tuple[tuple[int, int, str], ...] = ((2, 0, ""),)
_PEP440_PRE = {"a": "alpha", "b": "beta", "rc": "rc"}


def _identifier_key(identifier: str) -> tuple[int, int, str]:
    if identifier.isdigit():
        return (0, int(identifier), "")
    return (1, 0, identifier)


@functools.total_ordering
class Version:
    """A version by its precedence: two that differ in build metadata alone are equal."""

    def __init__(self, text: str, release: Sequence[int], pre: Sequence[str]) -> None:
        """Keep `text` as it is shown, and its place in the order; use `parse` to make one."""
        self.text = text
        self._release = tuple(release)
        self._pre = tuple(pre)
        self._key = (self._release, tuple(map(_identifier_key, pre)) or _RELEASE_KEY)

    def __str__(self) -> str:
        """Return the version as its program printed it."""
        return self.text

    def __repr__(self) -> str:
        """Return a text for debugging."""
        return f"Version({self.text!r})"

    def __eq__(self, other: object) -> bool:
        """Compare by precedence."""
        return isinstance(other, Version) and self._key == other._key

    def __lt__(self, other: Version) -> bool:
        """Compare by precedence."""
        return self._key < other._key

    def __hash__(self) -> int:
        """Hash by precedence."""
        return hash(self._key)

    @property
    def is_prerelease(self) -> bool:
        """Whether it comes before a release (SemVer 2.0.0, section 9)."""
        return bool(self._pre)

    def as_pep440(self) -> str:
        """Return the version as PEP 440 writes it; a pre-release that it can't read, as the first of its release."""
        from packaging.version import InvalidVersion
        from packaging.version import Version as Pep440

        release = ".".join(map(str, self._release))
        if not self._pre:
            return release
        try:
            version = Pep440(f"{release}-{'.'.join(self._pre)}")
        except InvalidVersion:
            return f"{release}.dev0"
        return str(version) if version.is_prerelease else f"{release}.dev0"  # to PEP 440 `1.0.0-1` is a post-release


class Specifiers:
    """Which versions may be chosen, such as `>=1.2,<2` (PEP 440, "Version specifiers")."""

    def __init__(self, text: str) -> None:
        """Read `text`; raises VersionError where it is none."""
        from packaging.specifiers import InvalidSpecifier, SpecifierSet

        try:
            if len(text) > MAX_LENGTH:
                raise InvalidSpecifier(text)
            self._set = SpecifierSet(text)
        except InvalidSpecifier:
            raise VersionError(f"{_shown(text)} is not a version specifier such as '>=1.2,<2' (PEP 440)") from None

    def __str__(self) -> str:
        """Return the specifiers, in an order of their own."""
        return str(self._set)

    def __eq__(self, other: object) -> bool:
        """Compare by what is said, in any order."""
        return isinstance(other, Specifiers) and self._set == other._set

    def __hash__(self) -> int:
        """Hash by what is said."""
        return hash(self._set)

    def __contains__(self, version: Version) -> bool:
        """Tell whether a version may be chosen; a pre-release only where a specifier names one."""
        return self._set.contains(version.as_pep440(), prereleases=bool(self._set.prereleases))


def parse(text: str) -> Version:
    """Return the version that `text` is; one leading `v` is passed over.

    Raises VersionError where it is neither SemVer nor a PEP 440 version that SemVer can order.
    """
    bare = text.removeprefix("v")
    if len(bare) <= MAX_LENGTH and bare.isascii():
        match = re.fullmatch(_SEMVER, bare)
        if match:
            pre = match["pre"].split(".") if match["pre"] else ()
            return Version(bare, [int(number) for number in match["release"].split(".")], pre)
        version = _parse_pep440(bare)
        if version:
            return version
    raise VersionError(
        f"{_shown(text)} is not a version: expected Semantic Versioning 2.0.0, such as 1.2.3 or 1.3.0-rc.1"
    )


def _parse_pep440(text: str) -> Version | None:
    """Read a PEP 440 version of at most three numbers, if it has a place in SemVer's order."""
    # `1.0.0-1` and `01.2.3` are PEP 440, too; what looks like SemVer must be SemVer.
    if re.fullmatch(r"[0-9]+(\.[0-9]+){0,2}((a|b|rc)[0-9]+|\.dev[0-9]+)?", text) is None:
        return None
    if re.search(r"(?<![0-9])0[0-9]|[0-9]{19}", text):
        return None
    from packaging.version import Version as Pep440

    parsed = Pep440(text)
    pre: tuple[str, ...] = ()
    if parsed.pre:
        pre = (_PEP440_PRE[parsed.pre[0]], str(parsed.pre[1]))
    elif parsed.dev is not None:
        pre = ("0", "dev", str(parsed.dev))  # before every alpha
    return Version(text, [parsed.major, parsed.minor, parsed.micro], pre)


def parse_output(output: bytes) -> Version:
    """Return the version that a program printed when asked `-version`.

    Accepted is one line of ASCII: the version alone, `v1.2.3`, or a line that ends in it.
    Raises VersionError on anything else.
    """
    line = output.removesuffix(b"\n").removesuffix(b"\r")
    if not re.fullmatch(rb"[ -~]+", line):
        raise VersionError(f"printed {_shown(output)}: expected a single line that ends in a version, such as 1.2.3")
    words = line.decode("ascii").split(" ")
    try:
        return parse(words[-1])
    except VersionError as error:
        raise VersionError(f"printed {_shown(output)}: {error}") from None


def _shown(foreign: str | bytes) -> str:
    text = foreign.decode("ascii", "backslashreplace") if isinstance(foreign, bytes) else foreign
    text = ascii(text.rstrip("\n")) if text.strip() else "nothing"
    return text if len(text) <= MAX_LENGTH else text[:MAX_LENGTH] + "…"
