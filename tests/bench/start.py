"""Start: how long `-version` takes, how long it is to the first answer, and what an idle service occupies."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from bench.figures import RATIO, SELF, Table
from bench.peers import FIRST, find, memory

if TYPE_CHECKING:
    from bench.course import Course

STOCK = "http.server"
BARE = "python3 -I -S -c pass"
PLAIN = "python3 -I -c pass"
IMPORT = "import http.server"

_SETTLED = 0.2
"""Seconds after the first answer at which a service is taken for idle."""


def measure(course: Course) -> list[Table]:
    """Run each command, and start each peer, in turn."""
    return [_versions(course), _starts(course)]


def _versions(course: Course) -> Table:
    table = Table("Start: -version", "wall time, from a spawn to the end; the same interpreter")
    python = find("python3")
    assert python is not None
    commands = {
        SELF: [str(course.programs.version(FIRST)), "-version"],
        BARE: [python, "-I", "-S", "-c", "pass"],
        PLAIN: [python, "-I", "-c", "pass"],
        IMPORT: [python, "-I", "-S", "-c", "import http.server"],
    }
    course.say("start, -version")
    for number in range(course.scale.starts + 1):
        took = {name: run(command) for name, command in commands.items()}
        if number:  # the first one reads the files from the disk
            for name, seconds in took.items():
                table.add(name, "wall time", "ms", seconds * 1000)
            table.add(SELF, f"wall time : {PLAIN}", RATIO, took[SELF] / took[PLAIN])
            table.add(SELF, f"wall time : {BARE}", RATIO, took[SELF] / took[BARE])
    return table


def _starts(course: Course) -> Table:
    note = f"{course.scale.starts} starts each, in a directory that has seen one before; gunicorn has 3 processes"
    table = Table("Start: to the first answer, and memory when idle", note)
    places = {kind: course.place() for kind in course.kinds if kind.name != f"{SELF}-new-pid"}
    for number in range(course.scale.starts + 1):
        course.say(f"start, {number} of {course.scale.starts}")
        listening = first = 0.0
        for kind, place in places.items():
            with course.running(kind, place) as peer:
                began, connected, answered = peer.started
                time.sleep(_SETTLED)  # its memory when idle is what is measured then
                if number:
                    table.add(kind.name, "start to listening", "ms", (connected - began) * 1000)
                    table.add(kind.name, "start to first answer", "ms", (answered - began) * 1000)
                    table.add(kind.name, "resident memory", "MiB", memory(peer.pids()))
                    private = memory(peer.pids(), "Private_Clean") + memory(peer.pids(), "Private_Dirty")
                    table.add(kind.name, "  of it private", "MiB", private)
            if kind.name == SELF:
                first = answered - began
            if kind.name == STOCK:
                listening = connected - began
        if number and first and listening:
            table.add(SELF, f"first answer : {STOCK} listening", RATIO, first / listening)
    return table


def run(command: list[str]) -> float:
    """Return the seconds that a command takes, which must succeed."""
    silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    began = time.monotonic()
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=silent)
    _, status = os.waitpid(pid, 0)
    took = time.monotonic() - began
    assert status == 0, command
    return took
