"""A model of the way back to the original process, explored in every order of steps, failures and deaths.

The version on trial has been committed and blessed; the original process executes it, and is handed
the service. What each phase leads to comes from the transition table; the model adds what a phase does.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from selfupdate.lifecycle import TRANSITIONS, Event, Phase

if TYPE_CHECKING:
    from collections.abc import Iterator

FORWARD = {Event.ANNOUNCED, Event.PROBED, Event.REPLACED, Event.BLESSED}
OLD, BESIDE = "old", "beside"
"""What the original is besides a phase: the old version, not yet executed; or beside the one that serves."""


@dataclass(frozen=True)
class World:
    """The two processes, None where one has ended, and what the one has told the other."""

    original: Phase | str | None = OLD
    trial: Phase | None = Phase.STARTING
    original_accepts: bool = False
    trial_accepts: bool = True
    has_acted: bool = True
    """Whether the effect of the trial's phase is done."""
    was_asked: bool = False
    was_blessed: bool = False
    was_dismissed: bool = False


def steps(world: World) -> Iterator[World]:
    """Give each world that can come next by itself."""
    yield from _trial(world)
    yield from _original(world)


def deaths(world: World) -> Iterator[World]:
    """Give each world that the death of one process makes of this one."""
    if world.original:
        yield replace(world, original=None, original_accepts=False)
    if world.trial:
        yield replace(world, trial=None, trial_accepts=False)


def _trial(world: World) -> Iterator[World]:
    if world.trial is None:
        return
    if not world.has_acted:
        yield _act(world)
        return
    for event, target in TRANSITIONS[world.trial].items():
        is_there = {Event.ANNOUNCED: Phase.STANDBY, Event.PROBED: Phase.STANDBY, Event.REPLACED: Phase.TRIAL}
        if event in FORWARD and (event not in is_there or is_there[event] is world.original):
            yield replace(world, trial=target, has_acted=False)
        if event in {Event.FAILED, Event.REVERTED}:
            yield replace(world, trial=target, has_acted=False)


def _act(world: World) -> World:
    done = replace(world, has_acted=True)
    if world.trial is Phase.REPLACING:
        return replace(done, was_asked=True) if not world.trial_accepts else replace(world, trial_accepts=False)
    if world.trial is Phase.ROLLING_BACK and not world.trial_accepts:
        return replace(world, trial_accepts=True)
    if world.trial in {Phase.ABORTING, Phase.ROLLING_BACK}:
        return replace(done, was_dismissed=True)
    if world.trial is Phase.RETIRED:
        return replace(done, was_blessed=True) if not world.was_blessed else replace(done, trial=None)
    return done


def _original(world: World) -> Iterator[World]:
    if world.trial is Phase.RETIRED and world.was_blessed:
        yield replace(world, trial=None)
    if world.original == OLD:
        yield replace(world, original=Phase.STANDBY)  # it executes the release, whoever is still there
        yield replace(world, original=BESIDE)  # or cannot
    elif world.original == BESIDE:
        if world.trial is None:
            yield replace(world, original=None)
    elif world.original in {Phase.STANDBY, Phase.TRIAL} and isinstance(world.original, Phase):
        row = TRANSITIONS[world.original]
        if world.was_dismissed and world.trial:
            assert row[Event.DISMISSED] is Phase.RETIRED
            yield replace(world, original=BESIDE, original_accepts=False)
        elif world.original is Phase.STANDBY and (world.was_asked or world.trial is None):
            yield replace(world, original=row[Event.REPLACE], original_accepts=True)
        elif world.original is Phase.TRIAL and world.was_blessed:
            yield replace(world, original=row[Event.BLESSED])
        elif world.original is Phase.TRIAL and world.trial is None:
            yield replace(world, original=row[Event.ORPHANED])


def _explore() -> dict[World, list[World]]:
    found: dict[World, list[World]] = {}
    waiting = deque([World()])
    while waiting:
        world = waiting.popleft()
        if world not in found:
            found[world] = list(steps(world))
            waiting.extend((*found[world], *deaths(world)))
    return found


WORLDS = _explore()


def test_the_model_goes_through_every_phase_of_it() -> None:
    """The table and the model are about the same thing."""
    assert {world.trial for world in WORLDS} >= {
        *(Phase.STARTING, Phase.PROBING, Phase.REPLACING, Phase.PROBATION, Phase.RETIRED),
        *(Phase.ABORTING, Phase.ROLLING_BACK, Phase.RUNNING),
    }
    assert {world.original for world in WORLDS} == {OLD, BESIDE, Phase.STANDBY, Phase.TRIAL, Phase.RUNNING, None}


def test_whatever_fails_or_dies_one_that_lives_comes_to_serve() -> None:
    """Where nothing more happens by itself, either no process is left, or exactly one accepts, and is RUNNING."""
    for world in (world for world, following in WORLDS.items() if not following):
        if world.original or world.trial:
            assert world.original_accepts != world.trial_accepts, world
            assert Phase.RUNNING in {world.original, world.trial}, world


def test_without_a_death_the_original_is_there_throughout() -> None:
    """From the start, steps and failures alone never end the process that a supervisor watches."""
    seen, waiting = set(), [World()]
    while waiting:
        world = waiting.pop()
        if world not in seen:
            seen.add(world)
            waiting.extend(WORLDS[world])
            assert world.original, world
