"""The transition table: every pair of phase and event, and where each phase can lead."""

from __future__ import annotations

import ast
import itertools
import threading
from pathlib import Path

import diagram
import pytest

from selfupdate import lifecycle
from selfupdate.errors import IllegalTransitionError
from selfupdate.lifecycle import TRANSITIONS, Event, Lifecycle, Phase

# The diagram of the design, by hand: what the table must say, no more and no less.
EXPECTED = {
    "RUNNING upgrade CHOOSING", "CHOOSING up-to-date RUNNING", "CHOOSING chosen STAGING", "STAGING staged STARTING",
    "STARTING announced PROBING", "PROBING probed REPLACING", "REPLACING replaced PROBATION",
    "PROBATION blessed RETIRED",
    *(f"{phase} failed ABORTING" for phase in ("CHOOSING", "STAGING", "STARTING", "PROBING")),
    *(f"{phase} failed ROLLING_BACK" for phase in ("REPLACING", "PROBATION")),
    "ABORTING reverted RUNNING", "ROLLING_BACK reverted RUNNING",
    "STANDBY replace TRIAL", "STANDBY orphaned RETIRED", "TRIAL blessed RUNNING", "TRIAL orphaned RUNNING",
    "TRIAL hand-back STARTING", "STANDBY dismissed RETIRED", "TRIAL dismissed RETIRED",
    *(f"{phase} stop STOPPING" for phase in Phase if phase not in {"STOPPING", "RETIRED"}),
    "STOPPING stopped RETIRED",
}  # fmt: skip


@pytest.mark.parametrize(("phase", "event"), list(itertools.product(Phase, Event)), ids=str)
def test_each_pair_moves_as_designed_or_is_refused(phase: Phase, event: Event) -> None:
    """A pair that the design has moves; any other raises, names both, and leaves the phase as it is."""
    machine = Lifecycle(phase)
    target = next((text.split()[2] for text in EXPECTED if text.startswith(f"{phase} {event} ")), None)
    if target is not None:
        assert machine.step(event) == machine.phase == target
    else:
        with pytest.raises(IllegalTransitionError, match=f"no transition for {event} in phase {phase}$"):
            machine.step(event)
        assert machine.phase is phase


@pytest.mark.parametrize("phase", list(Phase))
def test_each_phase_leads_to_one_that_serves_or_is_final(phase: Phase) -> None:
    """No phase is a trap: RUNNING can be reached, or else RETIRED, and from a phase of an upgrade both."""
    reached = {phase}
    while more := {target for one in reached for target in TRANSITIONS[one].values()} - reached:
        reached |= more
    assert Phase.RETIRED in reached
    if phase not in {Phase.STOPPING, Phase.RETIRED}:
        assert Phase.RUNNING in reached


@pytest.mark.parametrize("phase", list(Phase))
def test_each_phase_can_be_entered(phase: Phase) -> None:
    """No phase is left over."""
    assert phase in {Phase.RUNNING, Phase.STANDBY} | {target for row in TRANSITIONS.values() for target in row.values()}


def test_one_of_many_threads_takes_the_step() -> None:
    """Two upgrades can't both be claimed."""
    machine = Lifecycle(Phase.RUNNING)
    refused = []
    start = threading.Barrier(20)

    def claim() -> None:
        start.wait()
        try:
            machine.step(Event.UPGRADE)
        except IllegalTransitionError as error:
            refused.append(error)

    threads = [threading.Thread(target=claim) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert machine.phase is Phase.CHOOSING
    assert len(refused) == 19


def test_the_machine_has_no_effects() -> None:
    """The module imports nothing that could act."""
    tree = ast.parse(Path(lifecycle.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"__future__", "enum", "threading", "typing", "collections.abc", "selfupdate.errors"}


def test_the_readme_shows_the_table() -> None:
    """The diagram is drawn from the table; `make diagram` draws it anew."""
    assert diagram.drawn() == diagram.draw()
