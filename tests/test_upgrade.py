"""The main job: one version after another serves on the same port, and no request is lost."""

from __future__ import annotations

import shutil
import statistics
import time
from typing import TYPE_CHECKING

import pytest
from load import Load
from service import Service, resources

from selfupdate.settings import Limits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from programs import Programs

pytestmark = pytest.mark.slow

UPGRADES = 20

TELLS_WHETHER_IT_COLLECTS = """
import gc, sys
from selfupdate import service
start, say = service._Service.__init__, service._Service._say_where
def told(self, given):
    self.at_first = gc.isenabled()
    start(self, given)
def tell(self):
    say(self)
    stays = gc.get_freeze_count() > 1000
    print("garbage:", self.at_first, "then", gc.isenabled(), "beside what stays:", stays, file=sys.stderr)
service._Service.__init__, service._Service._say_where = told, tell
"""


def test_twenty_upgrades_in_a_row_under_load_lose_no_request(
    start: Callable[..., Service], programs: Programs, figure: Callable[[str], None]
) -> None:
    """Each request of 16 clients is answered, each active connection lives until told, and nothing is left behind."""
    service = start("-probation", "300ms", "-drain", "10s")
    handover_gaps, steady_gaps, after_first = [], [], {}
    answered = 0
    with Load(service.address) as load:
        load.take()
        for number in range(1, UPGRADES + 1):
            version = f"1.0.{number}"
            shutil.copy2(programs.version(version), service.upgrade_dir / version)
            steady = load.take()
            record = service.upgrade()
            assert record["outcome"] == "committed", record
            assert record["to"] == version
            status = service.status_when(lambda status: status["phase"] == "RUNNING")
            assert (status["version"], status["generation"]) == (version, number)
            service.wait_until_alone(status["pid"])
            handover = load.take()
            for figures in (steady, handover):
                assert not figures.failed
                assert figures.ended_between_answers == 0
                assert figures.answered > 0
                answered += figures.answered
            assert handover.versions == [f"1.0.{number - 1}", version]
            steady_gaps.append(steady.longest_gap)
            handover_gaps.append(handover.longest_gap)
            if number == 1:
                after_first = resources(status["pid"])
    at_the_end = resources(status["pid"])
    assert at_the_end["task"] < Limits().threads + 10
    assert at_the_end["fd"] <= after_first["fd"]
    figure(
        f"{UPGRADES} upgrades, {answered} requests, 0 failed; longest gap between two answers, median (worst): "
        f"{_ms(handover_gaps)} in a handover, {_ms(steady_gaps)} in steady state"
    )


def _ms(times: list[float]) -> str:
    return f"{statistics.median(times) * 1000:.0f} ({max(times) * 1000:.0f}) ms"


def test_the_time_of_an_upgrade(programs: Programs, tmp_path: Path, figure: Callable[[str], None]) -> None:
    """From the request to the new version's first answer, against the program's own start to its first answer."""
    upgrades, starts = [], []
    for number in range(1, 8):
        began = time.monotonic()
        with Service(programs.version("1.0.0"), tmp_path / str(number), "-probation", "0", "-drain", "1s") as service:
            service.get("/version")
            starts.append(time.monotonic() - began)
            (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
            began = time.monotonic()
            service.ask("POST", "/upgrade")
            service.status_when(lambda status: status["version"] == "1.1.0")
            upgrades.append(time.monotonic() - began)
            service.stop()
    ratio = statistics.median(upgrade / start for upgrade, start in zip(upgrades, starts, strict=True))
    figure(
        f"from POST /upgrade to the new version's first answer, median (worst): {_ms(upgrades)}; "
        f"from start to first answer: {_ms(starts)}; ratio {ratio:.2f}"
    )


def test_garbage_is_looked_for_once_all_is_there(start: Callable[..., Service], programs: Programs) -> None:
    """Not while a start goes on, when all that is made stays: by the first version, and by those that follow."""
    service = start(
        "-probation", "0", "-drain", "1s", program=programs.faulty("1.0.0", "tells", TELLS_WHETHER_IT_COLLECTS)
    )
    told = "garbage: False then True beside what stays: True"
    service.line(message=told)
    shutil.copy2(programs.faulty("2.0.0", "tells", TELLS_WHETHER_IT_COLLECTS), service.upgrade_dir / "new")
    since = len(service.lines)
    assert service.upgrade()["outcome"] == "committed"
    service.line(since, message=told)
