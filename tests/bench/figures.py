"""Statistics of what was measured, and the tables that show them."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

SELF = "self-update"
"""The peer whose median is 1 in each ratio."""

COUNT = ""
"""The unit of what is counted: the rounds add up, and make no median and no ratio."""
RATIO = "\N{MULTIPLICATION SIGN}"
"""The unit of what is a ratio already."""


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that `percent` of the values do not pass: the nearest rank, one of the values. 0 for none."""
    if not values:
        return 0.0
    rank = math.ceil(len(values) * percent / 100)
    return sorted(values)[max(rank, 1) - 1]


def shown(value: float) -> str:
    """Write a number with three digits that mean something."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def multiple(value: float) -> str:
    """Write a ratio."""
    return RATIO + (f"{value:.2f}" if abs(value) < 10 else shown(value))


@dataclass
class Cell:
    """What one peer came to in one measure, once a round or once an upgrade."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def range(self) -> tuple[float, float]:
        return min(self.values), max(self.values)


@dataclass
class Row:
    """One measure, for each peer."""

    measure: str
    unit: str
    """`COUNT`, `RATIO` or what stands behind the number; a median and a range are shown."""
    is_compared: bool = True
    """Whether peers are compared in it; not where each peer is compared with itself."""
    cells: dict[str, Cell] = field(default_factory=dict)

    def ratio(self, peer: str) -> float | None:
        """Return a peer's median as a multiple of this program's, where there are both."""
        if not self.is_compared or self.unit in {COUNT, RATIO} or SELF not in self.cells or not self.cells[SELF].median:
            return None
        return self.cells[peer].median / self.cells[SELF].median

    def as_json(self) -> dict[str, Any]:
        return {
            "measure": self.measure,
            "unit": self.unit or "count",
            "peers": {peer: self._cell_as_json(peer, cell) for peer, cell in self.cells.items()},
        }

    def _cell_as_json(self, peer: str, cell: Cell) -> dict[str, Any]:
        if self.unit == COUNT:
            return {"sum": sum(cell.values), "values": cell.values}
        low, high = cell.range
        return {"median": cell.median, "low": low, "high": high, "ratio": self.ratio(peer), "values": cell.values}

    def lines(self) -> list[tuple[str, dict[str, str]]]:
        """Return what the table shows: the median, and below it the range and the ratio, where they say anything."""
        if self.unit == COUNT:
            return [(self.measure, {peer: f"{sum(cell.values):,.0f}" for peer, cell in self.cells.items()})]
        name, write = (self.measure, multiple) if self.unit == RATIO else (f"{self.measure}, {self.unit}", shown)
        lines = [(name, {peer: write(cell.median) for peer, cell in self.cells.items()})]
        if any(len(cell.values) > 1 for cell in self.cells.values()):
            ranges = {peer: "\N{EN DASH}".join(map(write, cell.range)) for peer, cell in self.cells.items()}
            lines.append(("  range", ranges))
        ratios = {peer: ratio for peer in self.cells if (ratio := self.ratio(peer)) is not None and peer != SELF}
        if ratios:
            lines.append((f"  of {SELF}'s", {peer: multiple(ratio) for peer, ratio in ratios.items()}))
        return lines


@dataclass
class Table:
    """What one scenario showed: a row for each measure, a column for each peer."""

    title: str
    note: str = ""
    rows: dict[str, Row] = field(default_factory=dict)

    def add(self, peer: str, measure: str, unit: str, *values: float) -> None:
        """Put values to those that are there."""
        self.rows.setdefault(measure, Row(measure, unit)).cells.setdefault(peer, Cell()).values += values

    def compare(self, peer: str, measure: str, unit: str, before: tuple[str, float], after: tuple[str, float]) -> None:
        """Put two named values of one peer beside each other, and their ratio."""
        for name, value in (before, after):
            self.add(peer, f"{measure}, {name}", unit, value)
            self.rows[f"{measure}, {name}"].is_compared = False
        if before[1]:
            self.add(peer, f"{measure}, {after[0]} : {before[0]}", RATIO, after[1] / before[1])

    @property
    def peers(self) -> list[str]:
        return list(dict.fromkeys(peer for row in self.rows.values() for peer in row.cells))

    def as_json(self) -> dict[str, Any]:
        return {"title": self.title, "note": self.note, "rows": [row.as_json() for row in self.rows.values()]}

    def text(self) -> str:
        lines = [line for row in self.rows.values() for line in row.lines()]
        first = max((len(name) for name, _ in lines), default=0)
        widths = {peer: max([len(peer), *(len(cells.get(peer, "")) for _, cells in lines)]) for peer in self.peers}
        head = " " * first + "".join(f"  {peer:>{width}}" for peer, width in widths.items())
        body = [
            f"{name:<{first}}" + "".join(f"  {cells.get(peer, ''):>{width}}" for peer, width in widths.items())
            for name, cells in lines
        ]
        about = [self.title, *([self.note] if self.note else [])]
        return "\n".join(line.rstrip() for line in (*about, head, *body))
