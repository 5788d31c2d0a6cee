"""What the sections have in common: who takes part, how long it goes on, and where each runs."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from bench.peers import Kind, Peer
    from programs import Programs


@dataclass(frozen=True)
class Scale:
    """How much is measured. Times in seconds."""

    rounds: int = 2
    """How often each peer has its turn."""
    upgrades: int = 20
    """Of each peer in each scenario, in all rounds together."""
    calm: float = 1.0
    """Between two upgrades, at least."""
    starts: int = 20
    seconds: float = 5.0
    """For one peer's turn where nothing happens but requests."""
    candidates: tuple[int, ...] = (1, 10, 100, 1000)
    idle: int = 1000
    slow: int = 100
    long_requests: int = 0
    """Of this program alone, in all; 0 for none."""
    long_upgrades: int = 100


WHOLE = Scale()
QUICK = Scale(rounds=1, upgrades=2, calm=0.5, starts=5, seconds=1.0, candidates=(1, 10))


@dataclass
class Course:
    """One run: its peers, its scale, and a place for what they leave on disk."""

    directory: Path
    programs: Programs
    kinds: Sequence[Kind]
    scale: Scale
    _turns: int = field(default=0, init=False)

    def among(self, *names: str) -> list[Kind]:
        """Return the peers of these names that take part."""
        return [kind for kind in self.kinds if kind.name in names]

    def place(self) -> Path:
        """Return a new directory."""
        self._turns += 1
        path = self.directory / str(self._turns)
        path.mkdir()
        return path

    @contextlib.contextmanager
    def running(self, kind: Kind, place: Path | None = None) -> Iterator[Peer]:
        """Start a peer, and stop it at the end."""
        peer = kind.start(self.programs, place or self.place())
        try:
            yield peer
        finally:
            peer.stop()

    def say(self, text: str) -> None:
        """Tell whoever waits what is measured now."""
        print(f"… {text}", file=sys.stderr, flush=True)
