"""The command line: Go-style flags, the environment, and what an operator is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from selfupdate.errors import UsageError
from selfupdate.listener import MAX_SOCKETS, Address, join
from selfupdate.settings import FLAGS, Flag, check, parse, parse_duration, usage

HOME = {"HOME": "/home/somebody"}


def test_the_defaults() -> None:
    """Without flags, everything is as the README says."""
    settings = parse([], HOME)
    assert settings.bind == (Address("localhost", 8080),)
    assert settings.upgrade_bind == Address("localhost", 8081)
    assert settings.upgrade_dir == Path("upgrades")
    assert settings.state_dir == Path("/home/somebody/.local/state/self-update")
    assert (settings.probation, settings.drain) == (10.0, 30.0)
    assert (settings.dev, settings.upgrade, settings.version) == (False, False, False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-drain", "9s"],
        ["--drain", "9s"],
        ["-drain=9s"],
        ["--drain=9s"],
        ["-drain", "8s", "-drain=9s"],
        ["-dev", "-drain", "9s"],
    ],
)
def test_the_forms_of_a_flag(arguments: list[str]) -> None:
    """One dash or two, with = or a space; the last one counts."""
    assert parse(arguments, HOME).drain == 9.0


@pytest.mark.parametrize(
    ("arguments", "dev"),
    [
        (["-dev"], True),
        (["-dev", "true"], True),
        (["-dev=false"], False),
        (["-dev", "0"], False),
        (["-dev", "-upgrade"], True),
    ],
)
def test_the_forms_of_a_switch(arguments: list[str], dev: bool) -> None:  # noqa: FBT001 - data
    """A switch stands alone or takes a value."""
    assert parse(arguments, HOME).dev is dev


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("localhost:8080", Address("localhost", 8080)),
        (":0", Address("", 0)),
        ("[::1]:8080", Address("::1", 8080)),
        ("unix:/run/it.sock", Address(path="/run/it.sock")),
        ("unix:@it", Address(path="@it")),
        ("fd:web", Address(passed="web")),
        ("fd:it.socket", Address(passed="it.socket")),
        ("fd:8080", Address(passed="8080")),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    """Each form is read, and is shown as it is read."""
    assert parse(["-bind", text], HOME).bind == (address,)
    assert str(address) == text


@pytest.mark.parametrize(
    ("arguments", "environ"),
    [
        (["-bind", ":80", "-bind", "unix:/x", "-bind=fd:web"], {}),
        (["-bind", ":80,unix:/x,fd:web"], {}),
        (["-bind", ":80,unix:/x", "--bind=fd:web"], {}),
        ([], {"SELF_UPDATE_BIND": ":80,unix:/x,fd:web"}),
        (["-bind", ":80", "-bind", "unix:/x", "-bind", "fd:web"], {"SELF_UPDATE_BIND": ":1,:2"}),
    ],
)
def test_several_addresses(arguments: list[str], environ: dict[str, str]) -> None:
    """Given again, or with commas, in that order; the command line as a whole wins over the environment."""
    settings = parse(arguments, HOME | environ)
    assert settings.bind == (Address("", 80), Address(path="/x"), Address(passed="web"))
    assert join(settings.bind) == settings.given["bind"] == ":80,unix:/x,fd:web"


def test_port_0_is_another_port_each_time() -> None:
    """It may be asked for again, and beside itself for the successor."""
    assert len(parse(["-bind", "localhost:0,localhost:0", "-upgrade-bind", "localhost:0"], HOME).bind) == 2


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("10s", 10.0), ("2m", 120.0), ("1m30s", 90.0), ("1.5s", 1.5), ("0", 0.0), ("1h", 3600.0)],
)
def test_durations(text: str, seconds: float) -> None:
    """Durations have units."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (["-bnid", ":80"], {}, "'-bnid' is not a flag; -help lists the flags"),
        (["serve"], {}, "'serve' is not a flag; -help lists the flags"),
        (["-dev", "yes"], {}, "'yes' is not a flag; -help lists the flags; -dev takes true or false"),
        (["-drain", "600h"], {}, "-drain got '600h'; it takes a duration"),
        (["-bind", ":80", "-upgrade-bind", ":80"], {}, "-upgrade-bind got :80, as -bind did; it takes another address"),
        (["-bind", ":1,:80", "-upgrade-bind", ":80"], {}, "-upgrade-bind got :80, as -bind did; it takes another"),
        (["-bind", ":80", "-bind", ":80"], {}, "-bind got :80 twice; it takes each address once"),
        (["-bind", "fd:a,:1,fd:a"], {}, "-bind got fd:a twice; it takes each address once"),
        (["-bind", ":1"], {"SELF_UPDATE_BIND": ":80,80"}, "SELF_UPDATE_BIND got ':80,80'; it takes an address such as"),
        ([], {"SELF_UPDATE_BIND": "unix:/x,unix:/x"}, "-bind got unix:/x twice; it takes each address once"),
        (["-bind", ":80,"], {}, "-bind got ':80,'; it takes an address such as"),
        (["-bind", "unix:/a,b"], {}, "-bind got 'unix:/a,b'; it takes an address such as"),
        (["-upgrade-bind", "unix:/a,b"], {}, "-upgrade-bind got 'unix:/a,b'; it takes an address such as"),
        (["-upgrade-bind", "fd:web"], {}, "-upgrade-bind got 'fd:web'; it takes an address such as"),
        (["-bind", "unix:@"], {}, "-bind got 'unix:@'; it takes an address such as"),
        (["-bind", "fd:"], {}, "-bind got 'fd:'; it takes an address such as"),
        (["-bind", "fd:a:b"], {}, "-bind got 'fd:a:b'; it takes an address such as"),
        (["-bind=:0"] * (MAX_SOCKETS + 1), {}, "-bind got ':0,:0,"),
        (["-bind"], {}, "-bind has no value; it takes an address such as"),
        (["-bind", "8080"], {}, "-bind got '8080'; it takes an address such as"),
        (["-bind", "localhost:99999"], {}, "-bind got 'localhost:99999'; it takes an address"),
        (["-bind", "::1:80"], {}, "-bind got '::1:80'; it takes an address"),
        (["-bind", "[::x]:80"], {}, "-bind got '[::x]:80'; it takes an address"),
        (["-bind", "unix:/" + "x" * 108], {}, "-bind got 'unix:/xxx"),
        (["-dev=maybe"], {}, "-dev got 'maybe'; it takes true or false"),
        (["-probation", "10"], {}, "-probation got '10'; it takes a duration such as 500ms, 10s or 2m"),
        (["-drain", "-1s"], {}, "-drain got '-1s'; it takes a duration"),
        (["-allow", "new"], {}, "-allow got 'new'; it takes version specifiers such as '>=1.2,<2'"),
        (["-upgrade-dir", ""], {}, "-upgrade-dir got ''; it takes a directory"),
        (["-allowed-hosts", "a,,b"], {}, "-allowed-hosts got 'a,,b'; it takes host names with commas between"),
        ([], {"SELF_UPDATE_ALLOWED_SIGNERS": ""}, "SELF_UPDATE_ALLOWED_SIGNERS got ''; it takes a file"),
        (["-signers-required", "0"], {}, "-signers-required got '0'; it takes a number from 1 to 8"),
        (["-sign-namespace", "A b"], {}, "-sign-namespace got 'A b'; it takes a namespace"),
        (["-signer", "ABCD"], {}, "-signer got 'ABCD'; it takes fingerprints"),
        ([], {"SELF_UPDATE_DRAIN": "soon"}, "SELF_UPDATE_DRAIN got 'soon'; it takes a duration"),
    ],
)
def test_wrong_usage(arguments: list[str], environ: dict[str, str], message: str) -> None:
    """One line names the flag, what it got and what it takes."""
    with pytest.raises(UsageError) as caught:
        parse(arguments, HOME | environ)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flag",
    [flag for flag in FLAGS if flag.concerns != "call" and flag.name != "insecure-allow-unsigned"],
    ids=lambda flag: flag.name,
)
def test_each_flag_has_a_variable_and_wins_over_it(flag: Flag) -> None:
    """SELF_UPDATE_UPGRADE_DIR is -upgrade-dir, and so on; the successor gets what is not in its arguments."""
    first, second = {
        "bind": (":1", ":2"), "upgrade-bind": (":1", ":2"), "upgrade-dir": ("a", "b"), "state-dir": ("a", "b"),
        "allow": (">=1", ">=2"), "allowed-hosts": ("a", "b"), "dev": ("true", "false"), "upgrade": ("true", "false"),
        "keep-pid": ("false", "true"),
        "allowed-signers": ("a", "b"), "revoked-keys": ("a", "b"), "sign-namespace": ("a", "b"), "keyring": ("a", "b"),
        "signer": ("A" * 40, "B" * 64), "signers-required": ("2", "3"), "token-file": ("a", "b"),
    }.get(flag.name, ("1s", "2s"))  # fmt: skip
    assert flag.variable == "SELF_UPDATE_" + flag.name.upper().replace("-", "_")
    by_environment = parse([], HOME | {flag.variable: first})
    assert getattr(by_environment, flag.attribute) == flag.parse(first)
    by_flag = parse([f"-{flag.name}={second}"], HOME | {flag.variable: first})
    assert getattr(by_flag, flag.attribute) == flag.parse(second)
    is_argument = flag.name in {"bind", "upgrade", "upgrade-bind"}
    assert by_flag.environment() == ({} if is_argument or flag.concerns else {flag.variable: second})
    assert by_flag.trust == ({flag.name: second} if flag.concerns else {})


def test_no_variable_turns_checking_off() -> None:
    """Nothing in the environment does, and `-dev` only as a flag, on loopback, where no signers are named."""
    unsigned = "insecure_allow_unsigned"
    assert not getattr(parse([], HOME | {"SELF_UPDATE_INSECURE_ALLOW_UNSIGNED": "true"}), unsigned)
    assert not getattr(parse([], HOME | {"SELF_UPDATE_DEV": "true"}), unsigned)
    assert getattr(parse(["-dev"], HOME), unsigned)
    assert getattr(parse(["-dev", "-bind", "[::1]:80"], HOME), unsigned)
    assert getattr(parse(["-dev", "-bind", "unix:/x,fd:web,localhost:1"], HOME), unsigned)
    assert not getattr(parse(["-dev", "-bind", "localhost:1", "-bind", ":80"], HOME), unsigned)
    assert not getattr(parse(["-dev", "-bind", ":80"], HOME), unsigned)
    assert not getattr(parse(["-dev", "-allowed-signers", "a"], HOME), unsigned)
    assert not getattr(parse(["-dev"], HOME | {"SELF_UPDATE_ALLOWED_SIGNERS": "a"}), unsigned)
    assert not getattr(parse(["-dev", "-insecure-allow-unsigned=false"], HOME), unsigned)


def test_a_successor_does_not_choose_whom_it_trusts() -> None:
    """What the incumbent says replaces all of it, what was left at its default included."""
    incumbent = parse(["-dev", "-token-file", "t"], HOME)
    own = parse(["-upgrade", "true"], HOME | {"SELF_UPDATE_ALLOWED_SIGNERS": "evil", "SELF_UPDATE_DRAIN": "1s"})
    inherited = own.inheriting(incumbent.trust)
    assert inherited.trust == incumbent.trust == {"token-file": "t", "insecure-allow-unsigned": "true"}
    assert (inherited.allowed_signers, inherited.token_file, inherited.drain) == (None, Path("t"), 1.0)
    assert inherited.insecure_allow_unsigned
    with pytest.raises(ValueError, match="unknown: more"):
        own.inheriting({**incumbent.trust, "more": "than this version can check"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-allowed-signers", "a", "-keyring", "b", "-signer", "A" * 40], "-allowed-signers and -keyring were both"),
        (["-keyring", "a"], "-keyring and -signer go together"),
        (["-signer", "A" * 40], "-keyring and -signer go together"),
        (["-revoked-keys", "a"], "-revoked-keys goes with -allowed-signers"),
        (["-allowed-signers", "a", "-insecure-allow-unsigned"], "-insecure-allow-unsigned was given with a list"),
        (["-bind", ":80", "-insecure-allow-unsigned", "-token-file", "t"], "-insecure-allow-unsigned was given, and"),
        (["-bind", "unix:/x,:80", "-insecure-allow-unsigned"], "-insecure-allow-unsigned was given, and :80 can be"),
        (["-bind", "localhost:1,fd:web", "-bind", ":80"], ":80 can be reached from other machines; give the token"),
        (["-bind", ":80"], ":80 can be reached from other machines; give the token"),
        (["-bind", "0.0.0.0:80", "-dev"], "0.0.0.0:80 can be reached from other machines; give the token"),
        (["-bind", "service.example:80"], "service.example:80 can be reached from other machines; give the token"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments: list[str], message: str) -> None:
    """A service does not start with less protection than was asked for, or than its address needs."""
    with pytest.raises(UsageError) as caught:
        check(parse(arguments, HOME))
    assert str(caught.value).startswith(message)
    check(parse(["-bind", ":80", "-token-file", "t", "-keyring", "a", "-signer", "a" * 40], HOME))


@pytest.mark.parametrize(
    ("environ", "directory"),
    [
        ({"STATE_DIRECTORY": "/var/lib/it", "XDG_STATE_HOME": "/x"}, "/var/lib/it"),
        ({"XDG_STATE_HOME": "/x"}, "/x/self-update"),
        ({}, "/home/somebody/.local/state/self-update"),
    ],
)
def test_the_state_directory(environ: dict[str, str], directory: str) -> None:
    """systemd's, the XDG one, or below the home directory."""
    assert parse([], HOME | environ).state_dir == Path(directory)


def test_the_usage_names_each_flag() -> None:
    """-help lists all."""
    assert {f"-{flag.name}" for flag in FLAGS} == set(re.findall(r"(?m)^  (-[a-z-]+)", usage()))
