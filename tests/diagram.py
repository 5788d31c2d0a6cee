"""Draws the state diagram of the README from the transition table; run as a program, it writes it there."""

from __future__ import annotations

import re
from pathlib import Path

from selfupdate.lifecycle import TRANSITIONS, Event, Phase

README = Path(__file__).resolve().parent.parent / "README.md"
_BLOCK = re.compile(r"(?s)```mermaid\n(.*?)```")


def draw() -> str:
    """Return the table as a Mermaid state diagram. Each phase's way to STOPPING is told in the text, not drawn."""
    lines = ["stateDiagram-v2", f"    [*] --> {Phase.RUNNING}: started", f"    [*] --> {Phase.STANDBY}: -upgrade true"]
    lines += [
        f"    {phase} --> {target}: {event}"
        for phase, targets in TRANSITIONS.items()
        for event, target in targets.items()
        if event is not Event.STOP
    ]
    lines += [f"    {phase} --> [*]" for phase, targets in TRANSITIONS.items() if not targets]
    return "\n".join(lines) + "\n"


def drawn() -> str:
    """Return the diagram that the README shows."""
    match = _BLOCK.search(README.read_text(encoding="utf-8"))
    return match[1] if match else ""


def main() -> None:
    """Write the diagram into the README."""
    text = README.read_text(encoding="utf-8")
    README.write_text(_BLOCK.sub(lambda _: f"```mermaid\n{draw()}```", text), encoding="utf-8")


if __name__ == "__main__":
    main()
