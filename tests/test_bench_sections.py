"""Each section of `make bench` comes to its end, and leaves a table without gaps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from bench.__main__ import SECTIONS, main
from bench.figures import SELF
from bench.handover import calm_before
from bench.peers import Upgrade
from bench.trace import Window

if TYPE_CHECKING:
    from pathlib import Path

TITLES = {
    "start": ["Start: -version", "Start: to the first answer, and memory when idle"],
    "handover": [
        f"Handover: {loop}, {kind}"
        for loop in ("closed loop of 16 clients", "open loop of 500 requests/s")
        for kind in ("connections kept alive", "a connection a request")
    ],
    "candidates": ["Candidates: GET /candidates"],
    "service": [
        "Service: 16 connections kept alive",
        "Service: a connection a request",
        "Service beside 1,000 idle connections",
        "Service beside 100 clients that send a byte each 50 ms",
    ],
}


def test_calm_is_as_long_as_the_window_and_apart_from_the_one_before() -> None:
    """The greatest of more values would be greater."""
    upgrades = [Upgrade(10, 10.5, 12), Upgrade(20, 25, 24), Upgrade(27, 28, 30)]
    assert calm_before(upgrades, 0, 1) == Window(8, 10)
    assert calm_before(upgrades, 0, 9) == Window(9, 10)
    assert calm_before(upgrades, 1, 1) == Window(15, 20)
    assert calm_before(upgrades, 2, 1) == Window(25.1, 27)


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_each_section_fills_its_tables(section: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A short run, of this program alone, leaves each figure in the table and in the file."""
    path = tmp_path / "bench.json"
    short = ("--quick", "--upgrades", "1", "--starts", "1", "--seconds", "0.2", "--candidates", "1,2")
    main([section, *short, "--peers", SELF, "--json", str(path)])
    printed = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert [table["title"] for table in report["tables"]] == TITLES[section]
    for table in report["tables"]:
        assert table["title"] in printed
        columns = {peer for row in table["rows"] for peer in row["peers"]}
        for row in table["rows"]:
            assert row["measure"] in printed
            assert set(row["peers"]) == columns or columns - {SELF}
            assert all(cell["values"] for cell in row["peers"].values())
        failed = [row["peers"][SELF]["sum"] for row in table["rows"] if row["measure"] == "failed requests"]
        assert failed == [0] * len(failed)


def test_a_peer_that_is_not_there_is_left_out_by_name(tmp_path: Path) -> None:
    """Nobody takes its absence for a result."""
    code = "from bench import peers, __main__; peers.find = lambda _: None; __main__.main()"
    asked = ["start", "--quick", "--starts", "0", "--peers", "nginx", "--json", str(tmp_path / "bench.json")]
    path = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [sys.executable, "-c", code, *asked],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert "nginx is not installed: left out" in run.stdout
