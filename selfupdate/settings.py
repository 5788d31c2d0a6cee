"""The flags, the environment, and the limits: what an operator can set, frozen.

Flags are Go's: `-name value`, `-name=value`, one dash or two; a switch may
stand alone. Each has an environment variable (`-upgrade-dir`,
`SELF_UPDATE_UPGRADE_DIR`); the flag wins. One table holds them all, and the
usage text, the parser and what a successor inherits are read from it.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selfupdate.errors import UsageError, VersionError
from selfupdate.listener import Address, is_loopback, parse_address, parse_addresses
from selfupdate.signature import is_namespace
from selfupdate.system import MOST_CONNECTIONS, STATE_HOME
from selfupdate.versions import Specifiers

PREFIX = "SELF_UPDATE_"

_LONGEST = 24 * 60 * 60
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
# What Go's flag package takes for a switch (strconv.ParseBool).
_SWITCH = {
    **dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
    **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False),
}


def _switch(text: str) -> bool:
    return _SWITCH[text]


def parse_duration(text: str, longest: float = _LONGEST) -> float:
    """Return the seconds of a duration: `500ms`, `10s`, `2m`, `1m30s`, or `0`; at most `longest`, a day.

    Raises ValueError on anything else.
    """
    if text == "0":
        return 0.0
    parts = re.findall(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h)", text)
    if not parts or "".join(map("".join, parts)) != text:
        raise ValueError(text)
    seconds = math.fsum(float(number) * _UNITS[unit] for number, unit in parts)
    if seconds > longest:
        raise ValueError(text)
    return seconds


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError(text)
    return Path(text)


def _namespace(text: str) -> str:
    if not is_namespace(text):
        raise ValueError(text)
    return text


def _fingerprints(text: str) -> tuple[str, ...]:
    found = tuple(part.strip().replace(" ", "").upper() for part in text.split(","))
    if not all(re.fullmatch("[0-9A-F]{40}|[0-9A-F]{64}", part) for part in found):
        raise ValueError(text)
    return found


def _count(text: str) -> int:
    if not re.fullmatch("[1-8]", text):
        raise ValueError(text)
    return int(text)


def _hosts(text: str) -> frozenset[str]:
    hosts = [host.strip().lower() for host in text.split(",")]
    if not all(re.fullmatch(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?", host) for host in hosts):
        raise ValueError(text)
    return frozenset(hosts)


class Flag(NamedTuple):
    """One flag: its name without dashes, its default as text, and how to read it."""

    name: str
    default: str | None
    parse: Callable[[str], Any]
    takes: str
    help: str
    concerns: str = ""
    """`trust`, or `call` for what asks for something else than a service."""

    @property
    def variable(self) -> str:
        """The environment variable that sets the flag."""
        return PREFIX + self.name.upper().replace("-", "_")

    @property
    def attribute(self) -> str:
        """The field of Settings that holds the flag's value."""
        return self.name.replace("-", "_")

    @property
    def is_switch(self) -> bool:
        """Whether the flag may stand without a value."""
        return self.parse is _switch

    @property
    def is_list(self) -> bool:
        """Whether the flag may be given more than once, and means all of it; the variable has commas between."""
        return self.parse is parse_addresses


_TRUST, _CALL = "trust", "call"
_FILE = "a file"
_DURATION = "a duration such as 500ms, 10s or 2m, of at most 24h"
_BOOLEAN = "true or false"
_ADDRESS = "an address such as localhost:8080, :8080, [::1]:8080 or unix:/path"
_ADDRESSES = f"{_ADDRESS}, or fd:NAME for a socket that is passed on; several with commas between"

FLAGS = (
    Flag("bind", "localhost:8080", parse_addresses, _ADDRESSES, "where the service listens; may be given again"),
    Flag("dev", "false", _switch, _BOOLEAN, "write logs for people, with debug lines, instead of JSON"),
    Flag("upgrade", "false", _switch, _BOOLEAN, "stand by as a successor; passed by an incumbent only"),
    Flag("upgrade-bind", "localhost:8081", parse_address, _ADDRESS, "where a successor listens until it takes over"),
    Flag("upgrade-dir", "upgrades", _path, "a directory", "where candidates are looked for"),
    Flag("state-dir", None, _path, "a directory", "where private copies of candidates are kept"),
    Flag("standby", "30s", parse_duration, _DURATION, "how long a successor may take until it stands by"),
    Flag("probation", "10s", parse_duration, _DURATION, "how long a successor is watched before it is there to stay"),
    Flag("drain", "30s", parse_duration, _DURATION, "how long requests under way may take to end"),
    Flag("keep-pid", "true", _switch, _BOOLEAN, "have the new version serve under this process's id (Linux)"),
    Flag("allow", None, Specifiers, "version specifiers such as '>=1.2,<2'", "which versions may be chosen"),
    Flag("allowed-hosts", None, _hosts, "host names with commas between", "names that clients may call the service by"),
    Flag("allowed-signers", None, _path, _FILE, "whose SSH signatures count (ssh-keygen(1))", _TRUST),
    Flag("revoked-keys", None, _path, _FILE, "SSH keys that count no more: public keys, or a KRL", _TRUST),
    Flag("sign-namespace", "release@self-update", _namespace, "a namespace", "what SSH signatures must be for", _TRUST),
    Flag("keyring", None, _path, _FILE, "the keys of OpenPGP signatures (gpgv(1))", _TRUST),
    Flag("signer", None, _fingerprints, "fingerprints with commas between", "which keys of -keyring count", _TRUST),
    Flag("signers-required", "1", _count, "a number from 1 to 8", "how many people must have signed", _TRUST),
    Flag("insecure-allow-unsigned", "false", _switch, _BOOLEAN, "check no signatures; on loopback alone", _TRUST),
    Flag("token-file", None, _path, _FILE, "the token that every POST must bear", _TRUST),
    Flag(
        "status", "false", _switch, _BOOLEAN, "print how the running service stands, follow an upgrade, and exit", _CALL
    ),
    Flag("json", "false", _switch, _BOOLEAN, "with -status: print JSON", _CALL),
    Flag("apply", "false", _switch, _BOOLEAN, "ask the running service to upgrade, show each step, and exit", _CALL),
    Flag("rollback", "false", _switch, _BOOLEAN, "ask the running service to go back to the version before", _CALL),
    Flag("verify", None, _path, _FILE, "print whether a file would be trusted, without running it, and exit", _CALL),
    Flag("print-unit", "false", _switch, _BOOLEAN, "print a systemd unit for the given flags, and exit", _CALL),
    Flag("version", "false", _switch, _BOOLEAN, "print the version and exit", _CALL),
    Flag("help", "false", _switch, _BOOLEAN, "print this text and exit", _CALL),
)
_BY_NAME = {flag.name: flag for flag in FLAGS}
_BY_NAME["h"] = _BY_NAME["help"]
_ABOUT_THE_CALL = {flag.name for flag in FLAGS if flag.concerns == _CALL}
_NOT_IN_THE_ENVIRONMENT = {*_ABOUT_THE_CALL, "insecure-allow-unsigned"}
"""Flags that no variable sets: what asks for something else than a service, and what turns checking off."""
_ON_THE_COMMAND_LINE = {"upgrade", "upgrade-bind", "bind"}
"""Flags that an incumbent passes as arguments; trust goes through the channel, the rest through the environment."""


class Limits(NamedTuple):
    """Bounds that no flag sets. Times in seconds, sizes in bytes."""

    request_time: float = 10.0
    """From a request's first byte to its last."""
    body_time: float = 10.0
    """For a body that waited to be asked for."""
    send_time: float = 10.0
    """For one answer to be taken by the client."""
    idle_time: float = 75.0
    """For a connection without a request under way."""
    linger_time: float = 2.0
    """For a client to close after the last answer on its connection."""
    last_call_time: float = 0.5
    """For a client to send one more request when the service stops."""
    sign_of_life_interval: float = 15.0
    """Between two signs of life on a stream; a client that takes nothing in that time is left."""
    listeners: int = 128
    """How many clients may listen to events at a time."""
    body_size: int = 4 * 1024
    threads: int = 64
    connections: int = MOST_CONNECTIONS
    version_time: float = 5.0
    """For a candidate to print its version."""
    version_output: int = 4096
    version_runs: int = 4
    """How many candidates are asked for their version at a time."""
    candidates: int = 1000
    candidate_size: int = 512 * 1024 * 1024
    announce_time: float = 1.0
    """For a successor that answers on its temporary server to announce itself."""
    replace_time: float = 5.0
    """For a successor to answer a probe, or to take over."""
    health_time: float = 5.0
    """For a successor on trial to answer one question after its health."""
    health_interval: float = 0.25
    """Between two of those questions."""
    kill_time: float = 2.0
    """For a successor to leave when told, before it is killed."""
    rebind_time: float = 5.0
    """For an address to become free, or to be listened on, where nothing tells when it is."""
    verify_time: float = 30.0
    """For a signature to be checked."""
    poll_interval: float = 0.02
    """Between two looks at what cannot announce itself."""


class Settings(NamedTuple):
    """Everything that was set, for the life of the process."""

    bind: tuple[Address, ...]
    dev: bool
    upgrade: bool
    upgrade_bind: Address
    upgrade_dir: Path
    state_dir: Path
    standby: float
    probation: float
    drain: float
    keep_pid: bool
    allow: Specifiers | None
    allowed_hosts: frozenset[str] | None
    allowed_signers: Path | None
    revoked_keys: Path | None
    sign_namespace: str
    keyring: Path | None
    signer: tuple[str, ...] | None
    signers_required: int
    insecure_allow_unsigned: bool
    token_file: Path | None
    status: bool
    json: bool
    apply: bool
    rollback: bool
    verify: Path | None
    print_unit: bool
    version: bool
    help: bool
    given: Mapping[str, str]
    """The text of each flag that was set, by name."""
    limits: Limits = Limits()

    def environment(self) -> dict[str, str]:
        """Return the environment variables that give a successor these settings, but for those of trust."""
        names = self.given.keys() - _ON_THE_COMMAND_LINE - self.trust.keys()
        return {_BY_NAME[name].variable: self.given[name] for name in names}

    @property
    def trust(self) -> dict[str, str]:
        """The text of each flag that concerns trust, for a successor: it does not choose whom it trusts."""
        return {name: text for name, text in self.given.items() if _BY_NAME[name].concerns == _TRUST}

    def inheriting(self, trust: Mapping[str, str]) -> "Settings":
        """Return these settings with the incumbent's for what concerns trust. Raises ValueError."""
        if unknown := trust.keys() - _BY_NAME.keys():
            raise ValueError(f"unknown: {', '.join(unknown)}")  # less would be checked than the incumbent checks
        own = {name: text for name, text in self.given.items() if _BY_NAME[name].concerns != _TRUST}
        given = {**own, **trust}
        values = {
            flag.attribute: flag.parse(given[flag.name]) if flag.name in given else _default(flag)
            for flag in FLAGS
            if flag.concerns == _TRUST
        }
        return self._replace(given=given, **values)


def parse(arguments: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Return the settings of a command line (without the program's name) and an environment.

    Raises UsageError, in one line that names the flag or variable, what it got and what it takes.
    """
    from_arguments = _from_arguments(list(arguments))
    given = {**_from_environment(environ), **from_arguments}
    if _implies_unsigned(from_arguments, given):
        given["insecure-allow-unsigned"] = "true"
    values: dict[str, Any] = {}
    for flag in FLAGS:
        values[flag.attribute] = flag.parse(given[flag.name]) if flag.name in given else _default(flag)
    _check_distinct(values["bind"], values["upgrade_bind"])
    if values["state_dir"] is None:
        values["state_dir"] = _default_state_dir(environ)
    return Settings(given={name: text for name, text in given.items() if name not in _ABOUT_THE_CALL}, **values)


def _check_distinct(bind: Sequence[Address], upgrade_bind: Address) -> None:
    """Check that no address is given twice; port 0 is another one each time. Raises UsageError."""
    for address in filter(lambda address: address.is_fixed, bind):
        if bind.count(address) > 1:
            raise UsageError(f"-bind got {address} twice; it takes each address once")
        if address == upgrade_bind:
            raise UsageError(f"-upgrade-bind got {address}, as -bind did; it takes another address")


def check(settings: Settings) -> None:
    """Check that what was set fits together and is safe to serve with. Raises UsageError."""
    has_root = settings.allowed_signers is not None or settings.keyring is not None
    if settings.allowed_signers is not None and settings.keyring is not None:
        raise UsageError("-allowed-signers and -keyring were both given; signatures are of one kind: give one of them")
    if (settings.keyring is None) != (settings.signer is None):
        raise UsageError("-keyring and -signer go together: the keys, and the fingerprints of those that may sign")
    if settings.signer is not None and len(set(settings.signer)) < settings.signers_required:
        raise UsageError(f"-signer names fewer keys than -signers-required, {settings.signers_required}")
    if settings.revoked_keys is not None and settings.allowed_signers is None:
        raise UsageError("-revoked-keys goes with -allowed-signers; for OpenPGP, revoke the key in the keyring")
    if settings.insecure_allow_unsigned and has_root:
        raise UsageError("-insecure-allow-unsigned was given with a list of signers; leave one of them out")
    exposed = _exposed(settings.bind)
    if exposed is None:
        return
    if settings.insecure_allow_unsigned:
        raise UsageError(
            f"-insecure-allow-unsigned was given, and {exposed} can be reached from other machines; "
            "give -allowed-signers FILE instead, or bind a loopback address"
        )
    if settings.token_file is None:
        raise UsageError(
            f"{exposed} can be reached from other machines; give the token that a POST must bear "
            "with -token-file FILE, or bind a loopback address"
        )


def _implies_unsigned(arguments: Mapping[str, str], given: Mapping[str, str]) -> bool:
    """Tell whether `-dev` implies `-insecure-allow-unsigned`: as a flag, on loopback, where nothing else was said."""
    bind = parse_addresses(given.get("bind", _BY_NAME["bind"].default or ""))
    said = given.keys() & {"allowed-signers", "keyring", "insecure-allow-unsigned"}
    return _SWITCH[arguments.get("dev", "false")] and not said and _exposed(bind) is None


def _exposed(bind: Iterable[Address]) -> Address | None:
    """Return the first address that other machines can reach, if any.

    Where a socket that is passed on can be reached from shows when it is there: the service checks it then.
    """
    return next((address for address in bind if not address.passed and not is_loopback(address)), None)


def _default(flag: Flag) -> Any:
    return None if flag.default is None else flag.parse(flag.default)


def usage() -> str:
    """Return the text of `-help`."""
    lines = ["usage: self-update [-flag value ...]", ""]
    for flag in FLAGS:
        default = f" (default {flag.default})" if flag.default and not flag.is_switch else ""
        lines.append(f"  -{flag.name:<23} {flag.help}{default}")
    lines += ["", f"What configures the service can be given as environment variables, too: {PREFIX}UPGRADE_DIR"]
    lines += ["for -upgrade-dir, and so on; but nothing there turns the checking of signatures off."]
    return "\n".join(lines)


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    given = {}
    for flag in FLAGS:
        if flag.name in _NOT_IN_THE_ENVIRONMENT or flag.variable not in environ:
            continue
        given[flag.name] = _checked(flag, environ[flag.variable], flag.variable)
    return given


def _from_arguments(arguments: list[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    switch = ""
    while arguments:
        argument = arguments.pop(0)
        name, equals, text = argument.removeprefix("-").removeprefix("-").partition("=")
        flag = _BY_NAME.get(name)
        if not argument.startswith("-") or flag is None:
            hint = f"; {switch} takes true or false" if switch else ""
            raise UsageError(f"{argument!r} is not a flag; -help lists the flags{hint}")
        switch = argument if flag.is_switch else ""
        if not equals:
            if flag.is_switch:
                text = arguments.pop(0) if arguments and arguments[0] in _SWITCH else "true"
            elif arguments:
                text = arguments.pop(0)
            else:
                raise UsageError(f"-{name} has no value; it takes {flag.takes}")
        text = _checked(flag, text, f"-{name}")
        if flag.is_list and flag.name in given:
            text = _checked(flag, f"{given[flag.name]},{text}", f"-{name}")
        given[flag.name] = text
    return given


def _checked(flag: Flag, text: str, where: str) -> str:
    """Return `text` if `flag` takes it."""
    try:
        flag.parse(text)
    except (ValueError, KeyError, VersionError):
        raise UsageError(f"{where} got {text!r}; it takes {flag.takes}") from None
    return text


def _default_state_dir(environ: Mapping[str, str]) -> Path:
    """Return the directory that systemd or the XDG Base Directory Specification names."""
    if environ.get("STATE_DIRECTORY"):
        return Path(environ["STATE_DIRECTORY"].split(":")[0])  # systemd.exec(5): several are joined by colons
    if environ.get(STATE_HOME):
        return Path(environ[STATE_HOME]) / "self-update"
    try:
        home = Path(environ.get("HOME") or Path.home())
        return home / ".local" / "state" / "self-update"
    except RuntimeError:
        raise UsageError("this account has no home directory; give the state directory with -state-dir") from None
