"""Admission control: counts the waiting work and refuses what would be too much. Its owner locks it."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from app.errors import Overloaded

SMOOTHING = 0.1
"""Weight of the newest value in a moving average."""
USUAL_BATCH = 32
"""A larger batch hardly makes a picture cheaper, and everything in it would wait longer."""


def usual_batch(max_batch: int) -> int:
    """How many pictures run together, unless many are waiting."""
    return min(USUAL_BATCH, max_batch)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much may be admitted, and how it is grouped."""

    max_batch: int
    max_waiting: int
    """Pictures admitted and not yet answered."""
    max_waiting_bytes: int
    deadline_seconds: float


class Load(NamedTuple):
    """What one item, or a whole request, adds to the waiting work."""

    size_bytes: int
    pictures: int
    light: bool
    """Whether the event loop can afford to prepare it; if not, it also waits for the decode thread."""
    bulk: bool
    """Whether it belongs to a request of several pictures."""


class Admission:
    """The waiting work, and how long it will take. Requests of one picture alternate with requests of many
    (`entries.FairQueue`), so they wait for only some of those."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting = 0
        self.waiting_bytes = 0
        self._singles = 0
        """Waiting items from requests of one picture."""
        self._heavy = 0
        """Waiting items that are not light."""
        self._heavy_singles = 0
        self._seconds_per_picture = 0.0
        self._seconds_per_heavy = 0.0

    def expected_wait_seconds(self, load: Load) -> float:
        """How long an item admitted now would wait: the pictures ahead of it times the measured time for each.

        An item that is not light also waits for others like it to be prepared; if that takes longer, it counts instead.
        """
        pictures, heavy = self.waiting, self._heavy
        if not load.bulk:
            pictures = min(pictures, 2 * self._singles + usual_batch(self.limits.max_batch))
            heavy = min(heavy, 2 * self._heavy_singles + 1)
        for_inference = pictures * self._seconds_per_picture
        return for_inference if load.light else max(for_inference, heavy * self._seconds_per_heavy)

    def check(self, load: Load, deadline_seconds: float) -> None:
        """Refuse `load` if it would be too much. While nothing is waiting, nothing is refused.

        Raises:
            Overloaded: too many pictures or bytes would be waiting, or the answer would come too late.
        """
        if not self.waiting:
            return
        wait_seconds = self.expected_wait_seconds(load)
        if (
            self.waiting + load.pictures > self.limits.max_waiting
            or self.waiting_bytes + load.size_bytes > self.limits.max_waiting_bytes
        ):
            sentence = f"The service has as much work as it accepts (pictures waiting: {self.waiting:,})."
        elif wait_seconds > deadline_seconds:
            sentence = f"The answer would take {plain(wait_seconds)} seconds; it may take {plain(deadline_seconds)}."
        else:
            return
        retry = max(1, math.ceil(wait_seconds))
        raise Overloaded(f"{sentence} Try again in {retry} second{'s' * (retry > 1)}.", retry_after_seconds=retry)

    def enter(self, load: Load) -> None:
        self._count(load, 1)

    def leave(self, load: Load) -> None:
        self._count(load, -1)

    def _count(self, load: Load, sign: int) -> None:
        self.waiting += sign * load.pictures
        self.waiting_bytes += sign * load.size_bytes
        self._singles += sign * (not load.bulk)
        self._heavy += sign * (not load.light)
        self._heavy_singles += sign * (not load.light and not load.bulk)

    def learn(self, seconds_per_picture: float) -> None:
        """Add the time of a batch to the moving average."""
        self._seconds_per_picture = _blend(self._seconds_per_picture, seconds_per_picture)

    def learn_preparation(self, seconds: float) -> None:
        """Add the time that preparing an item that is not light took to its moving average."""
        self._seconds_per_heavy = _blend(self._seconds_per_heavy, seconds)


def plain(seconds: float) -> str:
    """Seconds for a sentence, without an exponent: a client's own deadline may be some microseconds."""
    return f"{seconds:.6f}".rstrip("0").rstrip(".")


def _blend(known: float, new: float) -> float:
    known = known or new
    return known + SMOOTHING * (new - known)
