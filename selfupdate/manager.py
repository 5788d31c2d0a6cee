"""The service manager of this process: systemd, or whoever else speaks sd_notify(3).

It is told what the machine does: `READY=1` when this process is there to serve,
`RELOADING=1` when an upgrade begins and `READY=1` again when it has ended in
whichever way, `STOPPING=1` when nothing can be taken back any more, and for
people `STATUS=` with the phase and the version in words. Only the process that
the manager knows speaks: one on trial is as good as not there.

Its variables would mislead a successor, whose manager is its incumbent, and they
must not be lost when this process executes a release: they are kept under names
of their own.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from selfupdate import system
from selfupdate.lifecycle import Event, Phase

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from selfupdate.journal import Record

_PREFIX = "SELF_UPDATE_MANAGER_"
_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC")

_IN_WORDS = {
    Phase.CHOOSING: "{old} serves; choosing a candidate",
    Phase.STAGING: "{old} serves; checking {new}",
    Phase.STARTING: "{old} serves; starting {new}",
    Phase.PROBING: "{old} serves; testing {new}",
    Phase.REPLACING: "{old} hands over to {new}",
    Phase.PROBATION: "{new} serves on trial; {old} watches",
    Phase.ABORTING: "{old} serves; ending {new}",
    Phase.ROLLING_BACK: "{old} serves again; ending {new}",
    Phase.RETIRED: "{new} serves",
    Phase.STOPPING: "stopping",
}


class Manager:
    """The service manager, if there is one."""

    def __init__(self, environ: MutableMapping[str, str], version: str, *, is_main: bool) -> None:
        """Take what the manager said out of `environ`, and put it back under other names.

        `is_main` says whether this process, which is `version`, is the one that the manager knows.
        """
        if environ.pop("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):  # sd_watchdog_enabled(3)
            environ.pop("WATCHDOG_USEC", None)
        for name in _VARIABLES:
            if name in environ:
                environ[_PREFIX + name] = environ.pop(name)
        self.is_main = is_main
        self._version = version
        self._status = ""
        self._environ = {name: environ.get(_PREFIX + name, "") for name in _VARIABLES}

    @property
    def watchdog_interval(self) -> float | None:
        """The seconds between two signs of life, half of what it waits for; None where it wants none."""
        usec = self._environ["WATCHDOG_USEC"]
        return int(usec) / 2_000_000 if usec.isdecimal() and int(usec) else None

    def alive(self) -> None:
        """Give a sign of life, if one is wanted."""
        if self.watchdog_interval is not None:
            self._tell(WATCHDOG="1")

    def ready(self, status: str) -> None:
        """Say that the service serves."""
        self._tell(READY="1", STATUS=status)

    def stopping(self) -> None:
        """Say that nothing can be taken back any more."""
        self._tell(STOPPING="1", STATUS="stopping")

    def follow(self, event: Event, phase: Phase) -> None:
        """Say what a step of the machine means."""
        if event is Event.UPGRADE:
            self._tell(RELOADING="1", MONOTONIC_USEC=str(time.monotonic_ns() // 1000))
        elif phase is Phase.RUNNING:
            self.ready(f"{self._version} serves")

    def show(self, record: Record) -> None:
        """Say in words how an upgrade stands."""
        if record.outcome in {"aborted", "rolled-back"}:
            status = f"{record.from_version} serves; {record.to_version or 'an upgrade'} failed: {record.reason}"
        else:
            status = _IN_WORDS[Phase(record.phase)].format(old=record.from_version, new=record.to_version or "it")
        if status != self._status:  # a record has more to tell than that
            self._status = status
            self._tell(STATUS=status.replace("\n", " "))

    def hand_over(self, pid: int) -> None:
        """Say that the process `pid` is the one to know from here on."""
        self._tell(MAINPID=str(pid), READY="1")

    def _tell(self, **fields: str) -> None:
        if self.is_main:
            system.send(self._environ, **fields)
