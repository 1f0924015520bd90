"""How much may wait: counts what was admitted and refuses what would be too much. Belongs to the event loop."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from app.errors import Overloaded

SMOOTHING = 0.1
"""Weight of the newest in a mean time."""
USUAL_BATCH = 32
"""From which a larger batch hardly saves the forward pass anything, and all in it would wait longer."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much may be admitted, and how it is grouped."""

    max_batch: int
    max_waiting: int
    """Pictures admitted and not yet answered."""
    max_waiting_bytes: int
    deadline_seconds: float

    @property
    def usual_batch(self) -> int:
        """Pictures that run together unless many wait."""
        return min(USUAL_BATCH, self.max_batch)


class Load(NamedTuple):
    """What one item, or all of a request, adds to what waits."""

    size_bytes: int
    pictures: int
    light: bool
    """Whether the event loop can afford to prepare it; else it also waits for a thread."""
    bulk: bool
    """Whether it is of a request of several pictures."""


class Admission:
    """What waits, and how long it will. Requests of one picture take turns with those of many, as `entries.Turns` has
    it, so that they wait for a part of these only."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting = 0
        self.waiting_bytes = 0
        self._singles = 0
        """Of those that wait, in requests of one."""
        self._heavy = 0
        """Of those that wait, to be prepared aside."""
        self._heavy_singles = 0
        self._seconds_per_picture = 0.0
        self._seconds_per_heavy = 0.0

    def expected_wait_seconds(self, load: Load) -> float:
        """What an item admitted now would wait: the pictures before it times the measured time for each.

        One that is not light also waits for the others like it to be prepared.
        """
        pictures, heavy = self.waiting, self._heavy
        if not load.bulk:
            pictures = min(pictures, 2 * self._singles + self.limits.usual_batch)
            heavy = min(heavy, 2 * self._heavy_singles + 1)
        for_inference = pictures * self._seconds_per_picture
        return for_inference if load.light else max(for_inference, heavy * self._seconds_per_heavy)

    def check(self, load: Load, deadline_seconds: float) -> None:
        """Whether this may be admitted as well. If nothing waits, anything may.

        Raises:
            Overloaded: as many pictures or bytes wait as are accepted, or the answer would come too late.
        """
        wait_seconds = self.expected_wait_seconds(load)
        if self.waiting and (
            self.waiting + load.pictures > self.limits.max_waiting
            or self.waiting_bytes + load.size_bytes > self.limits.max_waiting_bytes
            or wait_seconds > deadline_seconds
        ):
            retry = max(1, math.ceil(wait_seconds))
            raise Overloaded(
                f"The service has as much to do as it accepts: {self.waiting:,} pictures wait. "
                f"Try again in {retry} second{'s' * (retry > 1)}.",
                retry_after_seconds=retry,
            )

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
        """Take the time of a batch into the mean."""
        self._seconds_per_picture = _blend(self._seconds_per_picture, seconds_per_picture)

    def learn_preparation(self, seconds: float) -> None:
        """Take the time of preparing an item that is not light into the mean."""
        self._seconds_per_heavy = _blend(self._seconds_per_heavy, seconds)


def _blend(known: float, new: float) -> float:
    known = known or new
    return known + SMOOTHING * (new - known)
