"""The phases of a process, the events that move it, and the one table of both.

Everything that changes the phase of a process stands in this file, and nothing
in this file has an effect outside of it. Two processes live through a handover,
the incumbent and its successor, and each runs a machine of its own over the
same table: the table does not know which role it plays, the phase does.

The rule for callers: ask the machine (`step`), write it down (the journal), and
only then act. A pair that is not in the table raises, and nothing happens.
"""

from __future__ import annotations

import enum
import threading
from typing import TYPE_CHECKING

from selfupdate.errors import IllegalTransitionError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection


class Phase(enum.StrEnum):
    """Where a process stands."""

    # The incumbent's.
    RUNNING = "RUNNING"
    CHOOSING = "CHOOSING"
    STAGING = "STAGING"
    STARTING = "STARTING"
    PROBING = "PROBING"
    REPLACING = "REPLACING"
    PROBATION = "PROBATION"
    ABORTING = "ABORTING"
    ROLLING_BACK = "ROLLING_BACK"
    # The successor's, until it is RUNNING.
    STANDBY = "STANDBY"
    TRIAL = "TRIAL"
    # Either's.
    STOPPING = "STOPPING"
    RETIRED = "RETIRED"


class Event(enum.StrEnum):
    """What can happen to a process."""

    UPGRADE = "upgrade"
    """An upgrade was asked for."""
    UP_TO_DATE = "up-to-date"
    """No candidate is newer."""
    CHOSEN = "chosen"
    """A candidate was chosen."""
    STAGED = "staged"
    """Its private copy is what was chosen, and ready to run."""
    ANNOUNCED = "announced"
    """The successor stands by."""
    PROBED = "probed"
    """The successor is the right version, the right process, and healthy."""
    REPLACED = "replaced"
    """The successor says that it accepts on the service's address."""
    BLESSED = "blessed"
    """The successor is there to stay."""
    FAILED = "failed"
    """A step of the upgrade failed."""
    REVERTED = "reverted"
    """Everything is as it was before the upgrade."""
    REPLACE = "replace"
    """The incumbent asked the successor to accept on the service's address."""
    HAND_BACK = "hand-back"
    """The successor is there to stay, and the process that it came from is about to become the same version."""
    DISMISSED = "dismissed"
    """The process that this one was to take over from serves on."""
    ORPHANED = "orphaned"
    """The incumbent died without a blessing."""
    STOP = "stop"
    """A stop signal."""
    STOPPED = "stopped"
    """Requests under way are answered, and nothing is left to do."""


TRANSITIONS: dict[Phase, dict[Event, Phase]] = {
    # An upgrade, as the incumbent goes through it. Up to PROBING it has not stopped serving.
    Phase.RUNNING: {
        Event.UPGRADE: Phase.CHOOSING,
        Event.STOP: Phase.STOPPING,
    },
    Phase.CHOOSING: {
        Event.CHOSEN: Phase.STAGING,
        Event.UP_TO_DATE: Phase.RUNNING,
        Event.FAILED: Phase.ABORTING,
        Event.STOP: Phase.STOPPING,
    },
    Phase.STAGING: {
        Event.STAGED: Phase.STARTING,
        Event.FAILED: Phase.ABORTING,
        Event.STOP: Phase.STOPPING,
    },
    Phase.STARTING: {
        Event.ANNOUNCED: Phase.PROBING,
        Event.FAILED: Phase.ABORTING,
        Event.STOP: Phase.STOPPING,
    },
    Phase.PROBING: {
        Event.PROBED: Phase.REPLACING,
        Event.FAILED: Phase.ABORTING,
        Event.STOP: Phase.STOPPING,
    },
    # The point of no return for the successor, not for the service: the incumbent is warm until it blesses.
    Phase.REPLACING: {
        Event.REPLACED: Phase.PROBATION,
        Event.FAILED: Phase.ROLLING_BACK,
        Event.STOP: Phase.STOPPING,
    },
    Phase.PROBATION: {
        Event.BLESSED: Phase.RETIRED,
        Event.FAILED: Phase.ROLLING_BACK,
        Event.STOP: Phase.STOPPING,
    },
    # The two ways back.
    Phase.ABORTING: {
        Event.REVERTED: Phase.RUNNING,
        Event.STOP: Phase.STOPPING,
    },
    Phase.ROLLING_BACK: {
        Event.REVERTED: Phase.RUNNING,
        Event.STOP: Phase.STOPPING,
    },
    # The successor's way to RUNNING.
    Phase.STANDBY: {
        Event.REPLACE: Phase.TRIAL,
        Event.ORPHANED: Phase.RETIRED,
        Event.DISMISSED: Phase.RETIRED,
        Event.STOP: Phase.STOPPING,
    },
    Phase.TRIAL: {
        Event.BLESSED: Phase.RUNNING,
        Event.ORPHANED: Phase.RUNNING,
        # Under its original process id: as incumbent of the process that becomes the same version.
        Event.HAND_BACK: Phase.STARTING,
        Event.DISMISSED: Phase.RETIRED,
        Event.STOP: Phase.STOPPING,
    },
    # The end of either.
    Phase.STOPPING: {
        Event.STOPPED: Phase.RETIRED,
    },
    Phase.RETIRED: {},
}


class Lifecycle:
    """The phase of this process. Safe to use from any thread."""

    def __init__(self, phase: Phase) -> None:
        """Begin in `phase`: RUNNING for a service, STANDBY for a successor."""
        self._changed = threading.Condition()
        self._phase = phase
        self._followers: list[Callable[[Event, Phase], None]] = []

    @property
    def phase(self) -> Phase:
        """Where the process stands now."""
        return self._phase

    def step(self, event: Event) -> Phase:
        """Move by `event` and return the new phase.

        Raises IllegalTransitionError where the table has no such pair; the phase stays.
        """
        with self._changed:
            try:
                self._phase = TRANSITIONS[self._phase][event]
            except KeyError:
                raise IllegalTransitionError(self._phase, event) from None
            for follower in self._followers:
                follower(event, self._phase)
            self._changed.notify_all()
            return self._phase

    def follow(self, follower: Callable[[Event, Phase], None]) -> None:
        """Call `follower` with each event and the phase that it led to; it must not step itself."""
        self._followers.append(follower)

    def wait_for(self, phases: Collection[Phase], timeout: float | None) -> None:
        """Wait until the process is in one of `phases`, at most `timeout` seconds; without end where that is None."""
        with self._changed:
            self._changed.wait_for(lambda: self._phase in phases, timeout)
