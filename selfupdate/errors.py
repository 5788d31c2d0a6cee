"""Every error that this program raises on purpose.

One root; a child for each thing that a caller does next. The text is written
for an operator: what, where, what was expected, what was found. Where a program
may want to tell one refusal from another, the error has a code; where something
can be done about it, a remedy.
"""

from __future__ import annotations


class SelfUpdateError(Exception):
    """The root: the text can be shown to an operator as it is."""

    def __init__(self, text: str, code: str | None = None, remedy: str | None = None) -> None:
        """Keep the text; `code` names the kind for programs, and `remedy` says what to do."""
        super().__init__(text)
        self.code = code
        self.remedy = remedy


class UsageError(SelfUpdateError):
    """The command line or the environment is wrong: print the text, exit with 2."""


class StartError(SelfUpdateError):
    """The service cannot start: print the text, exit with 1."""


class StateError(StartError):
    """The state directory cannot be used: serve without upgrades, and say why."""


class VersionError(SelfUpdateError):
    """A text is not a version: the file that printed it is no candidate."""


class CandidateError(SelfUpdateError):
    """One file cannot be a candidate: list it with the text as its reason."""


class ChoiceError(SelfUpdateError):
    """No candidate can be chosen: mend what the text says, and ask again."""

    upgrade_id: str | None = None
    """The upgrade that was asked for, where there was one."""


class ScanError(ChoiceError):
    """The upgrade directory cannot be read."""


class TrustError(ScanError):
    """Nobody's signature can be checked, so nothing can be chosen: upgrades are off until that is mended."""

    def __init__(self, why: str, code: str, remedy: str) -> None:
        """Say that upgrades are off, and why."""
        super().__init__(f"Upgrades are off: {why}.", code, remedy)


class NothingToRollBackToError(ChoiceError):
    """A rollback was asked for, and no earlier release is there."""


class NoSuchCandidateError(ChoiceError):
    """An upgrade was asked for by a name that is not there."""


class NotEligibleError(ChoiceError):
    """An upgrade was asked for by the name of a candidate that is not eligible."""


class BadRequestError(SelfUpdateError):
    """A request says something that its route does not take: mend it, and ask again."""


class NotNowError(SelfUpdateError):
    """The process starts no upgrade in its present phase: ask again later."""


class HandedOverError(NotNowError):
    """Another process serves now: ask that one."""


class UpgradeUnderWayError(NotNowError):
    """An upgrade is under way already: look at that one."""

    def __init__(self, upgrade_id: str) -> None:
        """Keep the id of the upgrade that is under way."""
        super().__init__(f"The upgrade {upgrade_id} is under way: wait until it has ended, then ask again.")
        self.upgrade_id = upgrade_id


class InstallError(SelfUpdateError):
    """The file that the service was started from stays as it is: go on, and say what a restart will bring."""


class UpgradeError(SelfUpdateError):
    """An upgrade failed through no fault of the release: undo it; it can be tried again."""


class SuccessorError(UpgradeError):
    """An upgrade failed through its release: undo it, and do not choose that release again unasked."""


class StopRequestedError(SelfUpdateError):
    """A stop signal arrived in the middle of an upgrade: end both processes."""


class IllegalTransitionError(SelfUpdateError):
    """An event came in a phase that has no place for it: a defect in this program."""

    def __init__(self, phase: str, event: str) -> None:
        """Keep the pair that is not in the table."""
        super().__init__(f"no transition for {event} in phase {phase}")
        self.phase = phase
        self.event = event
