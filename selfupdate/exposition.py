"""What a monitor reads: Prometheus' text format, version 0.0.4.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import bisect
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LABEL = r'[a-z_]+="(?:[^"\\\n]|\\[\\"n])*"'
# Compiled by the first who scrapes.
_SERIES = rf"([a-z_]+)(?:\{{({_LABEL}(?:,{_LABEL})*)\}})?"
_BUCKET = r'(?:(.*),)?le="(\+Inf|[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)"'
_ESCAPED = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


def series(name: str, **labels: str) -> str:
    """Return the name of a series: that of its metric, and its labels."""
    pairs = ",".join(f'{label}="{value.translate(_ESCAPED)}"' for label, value in labels.items())
    return f"{name}{{{pairs}}}" if pairs else name


def family(name: str, kind: str, about: str, samples: Iterable[tuple[str, float]]) -> str:
    """Return the lines of a metric: what it is, and each of its series with its value."""
    lines = [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
    lines += [f"{key} {_number(value)}" for key, value in samples]
    return "\n".join([*lines, ""])


def gauge(name: str, about: str, samples: Iterable[tuple[str, float]]) -> str:
    """Return the lines of a metric that rises and falls."""
    return family(name, "gauge", about, samples)


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def by_name(totals: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return the numbers of each metric by the text of their labels; what is no series is passed over."""
    found: dict[str, dict[str, float]] = {}
    for key, number in totals.items():
        if match := re.fullmatch(_SERIES, key):
            found.setdefault(match[1], {})[match[2] or ""] = number
    return found


def _labelled(name: str, *labels: str) -> str:
    text = ",".join(filter(None, labels))
    return f"{name}{{{text}}}" if text else name


class Counter(NamedTuple):
    """A metric that only grows; its series are counted under their names."""

    name: str
    about: str

    def key(self, **labels: str) -> str:
        """Return what a series is counted under."""
        return series(self.name, **labels)

    def text(self, counted: Mapping[str, Mapping[str, float]]) -> str:
        """Return the lines of what was `counted`, by name."""
        samples = sorted(counted.get(self.name, {}).items())
        return family(
            self.name, "counter", self.about, ((_labelled(self.name, labels), number) for labels, number in samples)
        )


class Observed(NamedTuple):
    """What the observations of one series are counted under: a key for each bucket, and one for their sum."""

    bounds: tuple[float, ...]
    buckets: tuple[str, ...]
    total: str

    def amounts(self, value: float) -> tuple[tuple[str, float], tuple[str, float]]:
        """Return what an observation adds to which keys."""
        return (self.buckets[bisect.bisect_left(self.bounds, value)], 1.0), (self.total, value)


class Histogram(NamedTuple):
    """How many observations were not greater than each bound; what is counted is those between two bounds."""

    name: str
    about: str
    bounds: tuple[float, ...]

    def of(self, **labels: str) -> Observed:
        """Return what the observations with these labels are counted under."""
        buckets = tuple(series(f"{self.name}_bucket", **labels, le=text) for text in self._texts)
        return Observed(self.bounds, buckets, series(f"{self.name}_sum", **labels))

    def text(self, counted: Mapping[str, Mapping[str, float]]) -> str:
        """Return the lines of what was `counted`, by name, by whichever version with whichever bounds."""
        numbers: dict[str, list[float]] = {}
        for key, number in counted.get(f"{self.name}_bucket", {}).items():
            if match := re.fullmatch(_BUCKET, key):
                buckets = numbers.setdefault(match[1] or "", [0.0] * len(self._texts))
                buckets[bisect.bisect_left(self.bounds, float(match[2]))] += number
        sums = counted.get(f"{self.name}_sum", {})
        samples = (self._samples(labels, numbers[labels], sums.get(labels, 0.0)) for labels in sorted(numbers))
        return family(self.name, "histogram", self.about, itertools.chain.from_iterable(samples))

    @property
    def _texts(self) -> tuple[str, ...]:
        return (*(f"{bound:g}" for bound in self.bounds), "+Inf")

    def _samples(self, labels: str, buckets: Sequence[float], total: float) -> Iterator[tuple[str, float]]:
        numbers = tuple(itertools.accumulate(buckets))
        for bound, number in zip(self._texts, numbers, strict=True):
            yield _labelled(f"{self.name}_bucket", labels, f'le="{bound}"'), number
        yield _labelled(f"{self.name}_sum", labels), total
        yield _labelled(f"{self.name}_count", labels), numbers[-1]
