"""The command `-print-unit`: a systemd unit for a service with the flags that were given.

One place is writable, the state directory, and one more where the program lies
elsewhere: its folder, since a committed upgrade replaces the program's file.
All else is closed as far as nothing that was given lies behind it. What each
setting means is in systemd.exec(5) and systemd.service(5); the unit itself says
why it has those that a reader would ask about.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from selfupdate import __version__
from selfupdate.errors import StartError
from selfupdate.listener import is_loopback
from selfupdate.program import file_of_this_program
from selfupdate.settings import FLAGS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from selfupdate.listener import Address
    from selfupdate.settings import Settings

_NAME = "self-update"
"""Of the unit, of its account, and of its directory in /var/lib."""
_STATE, _RUNTIME = Path("/var/lib"), Path("/run")
"""Where StateDirectory= and RuntimeDirectory= make directories."""
_HOMES = (Path("/home"), Path("/root"), Path("/run/user"))
_TEMPORARY = (Path("/tmp"), Path("/var/tmp"))  # noqa: S108 - to keep out of them
_EVERY_ADDRESS = {"", "0.0.0.0", "::"}  # noqa: S104 - compared with, not bound
_UNPRIVILEGED = 1024
"""The first port that needs no capability."""
_SPECIAL = {'"': '\\"', "\\": "\\\\", "%": "%%", "$": "$$"}
_START_MARGIN, _STOP_MARGIN = 30, 15
"""Seconds for what no flag bounds: choosing and probing, and the last answers to be taken."""

_UNIT = """\
# Printed by `self-update -print-unit`, version {version}; for /etc/systemd/system/{name}.service

[Unit]
Description=HTTP service that replaces itself with a newer version of itself
{network}

[Service]
Type=notify
NotifyAccess=main
# Not DynamicUser=: this account has the token and the program's file between two starts, too.
User={name}
ExecStart={command}
# SIGHUP starts an upgrade to the greatest candidate; how it went is in the journal and in `GET /upgrades`.
ExecReload=/bin/kill -HUP $MAINPID
# Wrong usage, status 2, is not mended by trying again.
Restart=on-failure
RestartSec=1s
RestartPreventExitStatus=2
WatchdogSec=30s
# An upgrade is a reload: it may take -probation, and for two handovers -standby and -drain.
TimeoutStartSec={start_time}s
# A stop may take -drain, and in the middle of an upgrade that of either version.
TimeoutStopSec={stop_time}s
# The main process ends the version on trial itself, in an order that loses no request.
KillMode=mixed
# A candidate that takes all the memory is killed, and fails; the service goes on.
OOMPolicy=continue
# Half of these are for connections.
LimitNOFILE={descriptors}

# What the service may write. A committed upgrade replaces the program's file, so that a restart brings the
# new version: the file and its folder must belong to the account above, and to nobody else.
{places}
StateDirectoryMode=0700
ProtectSystem=strict
UMask=0077

# What is closed to it, and to each new version.
{capabilities}
NoNewPrivileges=yes
ProtectHome={homes}
PrivateTmp={temporary}
PrivateDevices=yes
PrivateMounts=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
# Not ProcSubset=pid: /proc/net/tcp says whose process listens on -upgrade-bind.
ProtectProc=invisible
RemoveIPC=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
{addresses}RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
# A new version that compiles while it runs, as those in Java or JavaScript do, cannot start with this.
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""


def print_unit(settings: Settings) -> int:
    """Print the unit; return the exit status. Raises StartError where systemd could not run the service."""
    program = file_of_this_program()
    if program is None:
        raise StartError("-print-unit needs a program that is one file: `make build` makes dist/self-update")
    print(unit(settings, program), end="")
    return 0


def unit(settings: Settings, program: Path) -> str:
    """Return the unit of a service that `program` is started for. Raises StartError as `print_unit` does."""
    binds = (*settings.bind, settings.upgrade_bind)
    given = dict(_given(settings))
    sockets = [Path(bind.path) for bind in binds if bind.path.startswith("/")]
    paths = [program, *sockets, *(value for value in given.values() if isinstance(value, Path))]
    state = _absolute(settings.state_dir) if "state-dir" in given else _STATE / _NAME
    return _UNIT.format(
        version=__version__,
        name=_NAME,
        network="\n".join(_network(settings.bind)),
        command=" \\\n    ".join([_place(program), *(_flag(name, value) for name, value in given.items())]),
        start_time=math.ceil(settings.probation + 2 * (settings.standby + settings.drain)) + _START_MARGIN,
        stop_time=math.ceil(2 * settings.drain) + _STOP_MARGIN,
        descriptors=2 * settings.limits.connections,
        places="\n".join(_places(program, state, sockets)),
        capabilities="\n".join(_capabilities(binds)),
        homes="read-only" if any(_is_below(path, _HOMES) for path in paths) else "yes",
        temporary="no" if any(_is_below(path, _TEMPORARY) for path in paths) else "yes",
        addresses="IPAddressDeny=any\nIPAddressAllow=localhost\n" if all(map(is_loopback, binds)) else "",
    )


def _given(settings: Settings) -> Iterator[tuple[str, Path | str | bool]]:
    """Yield the flags that were given, with their values; a path is absolute: the service starts elsewhere."""
    for flag in FLAGS:
        if flag.name in settings.given and flag.name != "upgrade":
            value = getattr(settings, flag.attribute)
            if isinstance(value, Path):
                yield flag.name, _absolute(value)
            else:
                yield flag.name, value if flag.is_switch else settings.given[flag.name]


def _flag(name: str, value: Path | str | bool) -> str:  # noqa: FBT001 - a switch's value
    if isinstance(value, bool):
        return f"-{name}" if value else f"-{name}=false"
    return f"-{name} {_word(str(value))}"


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - a `..` is taken out, which systemd refuses


def _word(text: str) -> str:
    """Quote an argument of ExecStart=: systemd.syntax(7) for quotes, systemd.service(5) for `%` and `$`."""
    if re.fullmatch("[A-Za-z0-9_./:,@+=-]+", text):
        return text
    quoted = "".join(_SPECIAL.get(letter) or _visible(letter) for letter in text)
    return f'"{quoted}"'


def _visible(letter: str) -> str:
    return letter if letter.isprintable() else "".join(f"\\x{byte:02x}" for byte in os.fsencode(letter))


def _place(path: Path) -> str:
    """Quote a path in a list that systemd itself reads. Raises StartError."""
    text = _plain(path)
    return f'"{text}"' if " " in text else text


def _plain(path: Path) -> str:
    """Return a path that systemd itself uses; it knows no escapes there. Raises StartError where it would refuse it."""
    text = str(path)
    if not text.isprintable() or set(text) & set("\"'\\") or text != text.strip():
        raise StartError(
            f"systemd takes no path such as {text!r} for a program or a directory: it has quotes, backslashes, "
            "or what cannot be printed; choose another one"
        )
    return text.replace("%", "%%")


def _network(bind: Sequence[Address]) -> Iterator[str]:
    """Yield the lines that have it wait for the network where an address comes with that."""
    if all(is_loopback(address) or address.passed or address.host in _EVERY_ADDRESS for address in bind):
        yield "After=network.target"
    else:
        yield "Wants=network-online.target"
        yield "After=network-online.target"


def _places(program: Path, state: Path, sockets: Sequence[Path]) -> Iterator[str]:
    """Yield the lines about the directories that the service may write, and the one where it starts."""
    yield _owned("State", state, _STATE)
    yield f"WorkingDirectory={_plain(state)}"
    for directory in sorted({socket.parent for socket in sockets}):
        yield _owned("Runtime", directory, _RUNTIME)
    if not program.is_relative_to(state):
        yield f"ReadWritePaths={_place(program.parent)}"


def _owned(kind: str, directory: Path, root: Path) -> str:
    """Have systemd make a directory below `root`; one elsewhere has to be there."""
    if directory != root and directory.is_relative_to(root) and ":" not in str(directory):  # it separates there
        return f"{kind}Directory={_place(directory.relative_to(root))}"
    return f"ReadWritePaths={_place(directory)}"


def _capabilities(binds: Sequence[Address]) -> Iterator[str]:
    """Yield the lines that give what a port below 1024 needs, or nothing."""
    if any(0 < bind.port < _UNPRIVILEGED for bind in binds):
        yield "CapabilityBoundingSet=CAP_NET_BIND_SERVICE"
        yield "AmbientCapabilities=CAP_NET_BIND_SERVICE"
    else:
        yield "CapabilityBoundingSet="
        yield "PrivateUsers=yes"


def _is_below(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)
