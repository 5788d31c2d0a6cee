"""Supervisors for the tests: how each is set up for one service, and how it is asked and told about it."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from namespaces import Inside, Namespaces
from programs import write_program

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

FLAGS = ("-insecure-allow-unsigned", "-probation", "100ms", "-drain", "2s")

_RUN = "#!/bin/sh\nexec {command} 2>&1\n"
_SUPERVISORD = """\
[supervisord]
nodaemon=true
user=root
logfile=/dev/null
logfile_maxbytes=0
pidfile={here}/supervisord.pid
[unix_http_server]
file={here}/supervisord.sock
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://{here}/supervisord.sock
[program:self-update]
command={command}
stdout_logfile=/dev/fd/1
stdout_logfile_maxbytes=0
redirect_stderr=true
"""


@dataclass(frozen=True)
class Supervisor:
    """What starts the service. In all texts, `{here}` is the directory that it has, `{command}` the service's own."""

    name: str
    starts: str
    """The first process of the namespaces."""
    pid: str
    """Prints the process id by which it knows the service."""
    upgrade: str
    """Has it send SIGHUP."""
    stop: str
    """Has it stop the service, and waits until it has; or ends with it."""
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def tools(self) -> set[str]:
        """The programs that it is."""
        commands = [self.starts.removeprefix("tini -- "), self.pid, self.upgrade, self.stop]
        return {"tini", *(command.split()[0] for command in commands)} - {"{command}"}


RUNIT = Supervisor(
    "runit",
    starts="tini -- runsv {here}",
    pid="cat {here}/supervise/pid",
    upgrade="sv hup {here}",
    stop="sv -w 30 stop {here}",
    files={"run": _RUN},
)
S6 = Supervisor(
    "s6",
    starts="tini -- s6-supervise {here}",
    pid="s6-svstat -o pid {here}",
    upgrade="s6-svc -h {here}",
    stop="s6-svc -wD -T 30000 -d {here}",
    files={"run": _RUN},
)
SUPERVISORD = Supervisor(
    "supervisord",
    starts="tini -- supervisord -c {here}/conf",
    pid="supervisorctl -c {here}/conf pid self-update",
    upgrade="supervisorctl -c {here}/conf signal HUP self-update",
    stop="supervisorctl -c {here}/conf stop self-update",
    files={"conf": _SUPERVISORD},
)
TINI = Supervisor(
    "tini", starts="tini -- {command}", pid="cat /proc/1/task/1/children", upgrade="kill -HUP 1", stop="kill 1"
)
NONE = Supervisor("none", starts="{command}", pid="echo 1", upgrade="kill -HUP 1", stop="kill 1")
"""The service is the first process itself, as in a container."""


class Supervised(Inside):
    """The service that a supervisor has started."""

    def __init__(self, namespaces: Namespaces, supervisor: Supervisor, directory: Path) -> None:
        super().__init__(namespaces, namespaces.output)
        self.upgrade_dir = directory / "upgrades"
        self._supervisor = supervisor
        self._here = directory / "service"

    @property
    def pid(self) -> int:
        """The process that the supervisor knows, as it is numbered inside."""
        return int(self._tell(self._supervisor.pid).split()[0])

    def reload(self) -> None:
        """Have the supervisor send SIGHUP."""
        self._tell(self._supervisor.upgrade)

    def stop(self) -> None:
        """Have the supervisor stop it."""
        self._tell(self._supervisor.stop)

    def _tell(self, command: str) -> str:
        return self.namespaces.run(*command.format(here=self._here).split()).stdout


@contextlib.contextmanager
def supervise(supervisor: Supervisor, program: Path, directory: Path, *flags: str) -> Iterator[Supervised]:
    """Have a copy of `program` supervised below `directory`, in namespaces of their own."""
    here = directory / "service"
    here.mkdir()
    (directory / "upgrades").mkdir()
    installed = shutil.copy2(program, here / "self-update")
    directories = f"-state-dir {directory}/state -upgrade-dir {directory}/upgrades"
    command = f"{installed} {directories} {' '.join((*FLAGS, *flags))}"
    for name, text in supervisor.files.items():
        write_program(here / name, text.format(here=here, command=command).encode())
    with Namespaces(supervisor.starts.format(here=here, command=command).split()) as namespaces:
        yield Supervised(namespaces, supervisor, directory)
