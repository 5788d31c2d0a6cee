"""Candidates: how long a scan takes, against what its candidates take alone.

The lower bound of a first scan is the time of every candidate's `-version`, one
after the other, over the number of cores; it is timed before the scans and
behind them, for a machine is not equally fast all the time. That of a second is
to `stat` them.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import time
import zipfile
from typing import TYPE_CHECKING, Any

from bench.figures import RATIO, SELF, Table
from bench.peers import FIRST, memory
from bench.start import run
from build import VERSION_FILE

if TYPE_CHECKING:
    from pathlib import Path

    from bench.course import Course

_SAMPLE = 50
"""Candidates whose `-version` is timed alone; the others are taken to be alike."""
_PATIENCE = 600.0


def measure(course: Course) -> list[Table]:
    """Scan directories of each size, twice each time."""
    cores = len(os.sched_getaffinity(0))
    note = f"columns: how many candidates; the lower bound of a first scan is for {cores} cores"
    table = Table("Candidates: GET /candidates", note)
    for number in range(course.scale.rounds):
        for count in course.scale.candidates:
            course.say(f"candidates, round {number + 1}: {count}")
            for kind in course.among(SELF):
                lay = course.place()
                made = [relabel(course.programs.version(FIRST), lay, f"1.1.{item}") for item in range(count)]
                place = course.place()
                with course.running(kind, place) as peer:
                    before = memory(peer.pids())
                    alone = _alone(made)
                    (place / "upgrades").rmdir()
                    lay.rename(place / "upgrades")
                    scans = [_scan(peer.address, count) for _ in range(2)]
                    alone = (alone + _alone(sorted((place / "upgrades").iterdir()))) / 2
                    stat = _stat(place / "upgrades")
                    after = memory(peer.pids())
                _enter(table, f"{count:,}", alone / cores, scans, stat)
                table.add(f"{count:,}", "resident memory before", "MiB", before)
                table.add(f"{count:,}", "resident memory after", "MiB", after)
                shutil.rmtree(place)
    return [table]


def _enter(table: Table, column: str, bound: float, scans: list[float], stat: float) -> None:
    first, second = scans
    table.add(column, "lower bound", "ms", bound * 1000)
    table.add(column, "first scan", "ms", first * 1000)
    table.add(column, "first scan : lower bound", RATIO, first / bound)
    table.add(column, "stat of each", "ms", stat * 1000)
    table.add(column, "second scan", "ms", second * 1000)
    table.add(column, "second scan, more than stat", "ms", (second - stat) * 1000)


def relabel(program: Path, directory: Path, version: str) -> Path:
    """Return a copy of the program that says another version: a build of each would take longer than the scans."""
    target = directory / f"self-update-{version}"
    shutil.copy2(program, target)
    with zipfile.ZipFile(target, "a", zipfile.ZIP_DEFLATED) as archive:
        for name in (VERSION_FILE, f"{VERSION_FILE}c"):
            archive.filelist.remove(archive.NameToInfo.pop(name))
        archive.writestr(VERSION_FILE, f'__version__ = "{version}"\n')
    return target


def _alone(programs: list[Path]) -> float:
    """Return the seconds that all take for `-version`, one after the other."""
    sample = programs[:: max(1, len(programs) // _SAMPLE)]
    return sum(run([str(program), "-version"]) for program in sample) * len(programs) / len(sample)


def _stat(directory: Path) -> float:
    began = time.monotonic()
    for name in os.listdir(directory):  # noqa: PTH208 - what is timed
        os.stat(directory / name)  # noqa: PTH116 - as above
    return time.monotonic() - began


def _scan(address: tuple[str, int], count: int) -> float:
    """Return the seconds until all are listed with their versions, be it by one answer or by several."""
    began = time.monotonic()
    while True:
        listing = _get(address, "/candidates")["candidates"]
        if sum(candidate["version"] is not None for candidate in listing) == count:
            return time.monotonic() - began
        assert time.monotonic() < began + _PATIENCE, listing


def _get(address: tuple[str, int], path: str) -> Any:
    connection = http.client.HTTPConnection(*address, timeout=_PATIENCE)
    try:
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()
