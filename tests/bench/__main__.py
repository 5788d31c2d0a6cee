"""Measure this service beside its peers, in one run on one machine, in turn: `make bench` prints what was found.

Nothing here passes or fails: times depend on the machine, and only what was
measured in the same run can be compared. The figures of all rounds are written
as JSON, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import candidates, handover, serving, start
from bench.course import QUICK, WHOLE, Course, Scale
from bench.peers import KINDS
from programs import Programs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.figures import Table

SECTIONS: dict[str, Callable[[Course], list[Table]]] = {
    "start": start.measure,
    "handover": handover.measure,
    "candidates": candidates.measure,
    "service": serving.measure,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    scale = _scale(given)
    chosen = given.peers.split(",") if given.peers else [kind.name for kind in KINDS]
    if unknown := set(chosen) - {kind.name for kind in KINDS}:
        parser.error(
            f"there is no peer {', '.join(sorted(unknown))}; there are {', '.join(kind.name for kind in KINDS)}"
        )
    kinds = [kind for kind in KINDS if kind.name in chosen]
    missing = [kind.name for kind in kinds if kind.missing()]
    kinds = [kind for kind in kinds if not kind.missing()]
    report: dict[str, Any] = {
        "began": dt.datetime.now(dt.UTC).isoformat(),
        "machine": _machine(),
        "scale": dataclasses.asdict(scale),
        "left_out": missing,
        "tables": [],
    }
    given.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        programs = Path(directory) / "programs"
        programs.mkdir()
        course = Course(Path(directory).resolve(), Programs(programs), kinds, scale)
        for name in given.sections or SECTIONS:
            tables = SECTIONS[name](course)
            for table in tables:
                print(f"\n{table.text()}", flush=True)
            report["tables"] += [table.as_json() for table in tables]
            given.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in missing:
        print(f"\n{name} is not installed: left out")
    print(f"\n{given.json}: all figures")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make bench ARGS=…", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default all")
    parser.add_argument("--quick", action="store_true", help="a look, in about two minutes")
    parser.add_argument("--long", action="store_true", help="1,000,000 requests over 100 upgrades of this program, too")
    parser.add_argument("--peers", help=f"with commas, of {', '.join(kind.name for kind in KINDS)}; default all")
    parser.add_argument("--rounds", type=int, help="how often each has its turn")
    parser.add_argument("--upgrades", type=int, help="how often each is replaced in each scenario, in all rounds")
    parser.add_argument("--starts", type=int, help="how often each is started")
    parser.add_argument("--seconds", type=float, help="how long a turn of requests alone goes on")
    parser.add_argument("--candidates", help="sizes of the upgrade directory, with commas")
    parser.add_argument("--json", type=Path, default=Path("dist/bench.json"), help="where to write all figures")
    return parser


def _scale(given: argparse.Namespace) -> Scale:
    scale = QUICK if given.quick else WHOLE
    names = ("rounds", "upgrades", "starts", "seconds")
    scale = dataclasses.replace(scale, **{name: value for name in names if (value := getattr(given, name)) is not None})
    if given.candidates:
        scale = dataclasses.replace(scale, candidates=tuple(map(int, given.candidates.split(","))))
    return dataclasses.replace(scale, long_requests=1_000_000) if given.long else scale


def _machine() -> dict[str, object]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
    }


if __name__ == "__main__":
    main()
