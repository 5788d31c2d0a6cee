"""A model of the two processes, the journal and the disk, explored in every order of steps and crashes.

The incumbent's and the successor's steps come from the transition table; the model adds only what
each phase does to the world. At any moment any process may die, any step may fail, and both may
be gone at once, as in a power cut. The states are few enough to visit all.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from selfupdate.lifecycle import TRANSITIONS, Event, Phase

if TYPE_CHECKING:
    from collections.abc import Iterator

OLD, NEW = "old", "new"
FORWARD = (
    Event.UPGRADE,
    Event.CHOSEN,
    Event.STAGED,
    Event.ANNOUNCED,
    Event.PROBED,
    Event.REPLACED,
    Event.BLESSED,
)  # fmt: skip
"""The events of an upgrade that goes well, in their order."""


@dataclass(frozen=True)
class Process:
    """One process: its phase by its own machine, and what it does with the listener that it holds."""

    phase: Phase
    accepts: bool = False
    has_acted: bool = True
    """Whether the effect of its phase is done."""


@dataclass(frozen=True)
class World:
    """Everything that a crash can divide."""

    incumbent: Process | None = Process(Phase.RUNNING, accepts=True)
    successor: Process | None = None
    recorded: Phase | None = None
    """The last phase of the upgrade that is on disk; RETIRED means committed."""
    interrupted: bool = False
    """Whether the upgrade was concluded without its incumbent."""
    on_disk: str = OLD
    half_written: bool = False
    """Whether a file beside the program is being written."""
    installed: bool | None = None
    was_asked: bool = False
    """Whether the incumbent has asked the successor to take over."""
    was_blessed: bool = False
    tried: bool = False


def steps(world: World) -> Iterator[tuple[str, World]]:
    """Give each world that can come next, with a name for the step."""
    yield from _incumbent(world)
    yield from _successor(world)
    if world.incumbent is None and world.successor is None:
        yield "start", _start(world)


def crashes(world: World) -> Iterator[tuple[str, World]]:
    """Give each world that a kill can make of this one."""
    if world.incumbent:
        yield "incumbent dies", replace(world, incumbent=None)
    if world.successor:
        yield "successor dies", replace(world, successor=None)
    if world.incumbent and world.successor:
        yield "both die", replace(world, incumbent=None, successor=None)


def _incumbent(world: World) -> Iterator[tuple[str, World]]:
    me = world.incumbent
    if me is None:
        return
    if not me.has_acted:
        yield from _effects(world, me)
        return
    row = TRANSITIONS[me.phase]
    for event in row.keys() & set(FORWARD):
        if event is Event.UPGRADE and world.tried:
            continue  # one upgrade is enough
        needs_successor = me.phase in {Phase.PROBING, Phase.REPLACING, Phase.PROBATION}
        if needs_successor and world.successor is None:
            continue  # its death is seen: only failing is left
        if event is Event.REPLACED and not (world.successor and world.successor.phase is Phase.TRIAL):
            continue
        yield f"incumbent {event}", _record(world, me, row[event])
    if Event.FAILED in row:
        yield "incumbent failed", _record(world, me, row[Event.FAILED])
    if Event.REVERTED in row:
        yield "incumbent reverted", _record(world, me, row[Event.REVERTED])


def _record(world: World, me: Process, target: Phase) -> World:
    """Ask the machine and write it down; what the phase does comes next, unless a crash does."""
    return replace(world, incumbent=replace(me, phase=target, has_acted=False), recorded=target, tried=True)


def _effects(world: World, me: Process) -> Iterator[tuple[str, World]]:
    done = replace(me, has_acted=True)
    if me.phase is Phase.STARTING:
        yield "starts", replace(world, incumbent=done, successor=Process(Phase.STANDBY))
    elif me.phase is Phase.REPLACING:
        if me.accepts:
            yield "pauses", replace(world, incumbent=replace(me, accepts=False))
        else:
            yield "asks", replace(world, incumbent=done, was_asked=True)
    elif me.phase is Phase.ROLLING_BACK and not me.accepts:
        yield "accepts again", replace(world, incumbent=replace(me, accepts=True))
    elif me.phase in {Phase.ABORTING, Phase.ROLLING_BACK}:
        yield "ends the successor", replace(world, incumbent=done, successor=None, was_asked=False)
    elif me.phase is Phase.RETIRED:
        yield from _retire(world)
    else:
        yield "goes on", replace(world, incumbent=done)


def _retire(world: World) -> Iterator[tuple[str, World]]:
    if world.installed is None:
        yield from _install(world)
    elif not world.was_blessed:
        yield "blesses", replace(world, was_blessed=True)
    else:
        yield "exits", replace(world, incumbent=None)


def _install(world: World) -> Iterator[tuple[str, World]]:
    if world.on_disk == NEW:
        yield "notes the installation", replace(world, installed=True)
    elif not world.half_written:
        yield "writes beside", replace(world, half_written=True)
        yield "cannot write", replace(world, installed=False)
    else:
        yield "renames", replace(world, half_written=False, on_disk=NEW)


def _successor(world: World) -> Iterator[tuple[str, World]]:
    me = world.successor
    if me is None:
        return
    row = TRANSITIONS[me.phase]
    if me.phase is Phase.RETIRED:
        yield "successor leaves", replace(world, successor=None)
    if me.phase is Phase.STANDBY and world.was_asked:
        yield "successor takes over", replace(world, successor=Process(row[Event.REPLACE], accepts=True))
    if me.phase is Phase.TRIAL and world.was_blessed:
        yield "successor is blessed", replace(world, successor=replace(me, phase=row[Event.BLESSED]))
    elif me.phase in {Phase.STANDBY, Phase.TRIAL} and world.incumbent is None:
        target = row[Event.ORPHANED]
        was_committed = world.recorded is Phase.RETIRED
        interrupted = target is Phase.RUNNING and not was_committed
        yield (
            "successor is orphaned",
            replace(world, successor=replace(me, phase=target), interrupted=interrupted, half_written=False),
        )
    if me.phase is Phase.RUNNING and world.recorded is Phase.RETIRED and world.installed is None:
        yield from _install(world)


def _start(world: World) -> World:
    """Start the program on disk: it finishes what was committed, or undoes what was not, and then binds."""
    if world.recorded is Phase.RETIRED and world.installed is None:
        return replace(world, half_written=False, on_disk=NEW, installed=True)
    incumbent = Process(Phase.RUNNING, accepts=True)
    is_open = world.recorded not in {None, Phase.RUNNING, Phase.RETIRED}
    return replace(
        world, incumbent=incumbent, half_written=False, interrupted=world.interrupted or is_open, was_asked=False
    )


def _explore() -> dict[World, list[tuple[str, World]]]:
    """Return every world that can be, with the steps that it can take without a crash."""
    first = World()
    found: dict[World, list[tuple[str, World]]] = {}
    waiting = deque([first])
    while waiting:
        world = waiting.popleft()
        if world in found:
            continue
        found[world] = list(steps(world))
        waiting.extend(target for _, target in (*found[world], *crashes(world)))
    return found


WORLDS = _explore()


def _alive(world: World) -> list[Process]:
    return [process for process in (world.incumbent, world.successor) if process is not None]


def test_the_model_goes_through_the_whole_table() -> None:
    """Every phase that an upgrade has is visited: the table and the model are about the same thing."""
    visited = {process.phase for world in WORLDS for process in _alive(world)}
    assert visited == set(Phase) - {Phase.STOPPING}  # stops are tested with real processes
    assert len(WORLDS) > 100


def test_two_settled_processes_never_accept_both() -> None:
    """When both have settled, the one that has handed over does not accept."""
    for world in WORLDS:
        settled = [process for process in _alive(world) if process.phase in {Phase.RUNNING, Phase.RETIRED}]
        assert sum(process.accepts for process in settled) <= 1, world


def test_while_one_lives_somebody_comes_to_accept() -> None:
    """Where nothing more happens by itself, whoever lives accepts; and from everywhere such an end is reached."""
    ends = {world for world, following in WORLDS.items() if not following}
    for world in ends:
        assert any(process.accepts for process in _alive(world)), world
    can_end = set(ends)
    while more := {world for world, following in WORLDS.items() if any(to in can_end for _, to in following)} - can_end:
        can_end |= more
    assert can_end == set(WORLDS)


def test_the_port_is_never_given_up() -> None:
    """Whenever nobody accepts, somebody holds the listener and is about to accept, or no process is left."""
    for world, following in WORLDS.items():
        if _alive(world) and not any(process.accepts for process in _alive(world)):
            assert following, world


def test_the_program_on_disk_is_whole_and_the_right_one() -> None:
    """The new one is there only behind the commit; and a commit without a mark is finished by whoever is left."""
    for world, following in WORLDS.items():
        if world.on_disk == NEW:
            assert world.recorded is Phase.RETIRED, world
        if world.installed is True:
            assert world.on_disk == NEW, world
        if not following and world.recorded is Phase.RETIRED:
            assert world.installed is not None, world


def test_blessed_means_installed_or_marked() -> None:
    """The successor is there to stay only when the next start is known."""
    for world in WORLDS:
        if world.was_blessed:
            assert world.installed is not None, world


def test_what_starts_after_everything_died_is_what_the_journal_says() -> None:
    """Committed and installable: the new one. Otherwise: the old one."""
    for world in WORLDS:
        if not _alive(world):
            started = world
            while not _alive(started):
                started = _start(started)
            assert (started.on_disk == NEW) == (world.recorded is Phase.RETIRED and world.installed is not False), world


def test_every_upgrade_has_an_end_in_the_journal() -> None:
    """Committed, undone by its incumbent, or marked as interrupted."""
    for world, following in WORLDS.items():
        if not following and world.tried:
            assert world.recorded in {Phase.RETIRED, Phase.RUNNING} or world.interrupted, world
