"""How much may wait: counts what was admitted and refuses what would be too much. Belongs to the event loop."""

import math
from dataclasses import dataclass

from app.errors import Overloaded

SMOOTHING = 0.1
"""Weight of the newest batch in the mean time per picture."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much may be admitted, and how it is grouped."""

    max_batch: int
    max_waiting: int
    """Pictures admitted and not yet answered."""
    max_waiting_bytes: int
    deadline_seconds: float


class Admission:
    """What waits, and how long it will."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting = 0
        self.waiting_bytes = 0
        self._seconds_per_picture = 0.0

    @property
    def expected_wait_seconds(self) -> float:
        """What an item admitted now would wait: the pictures before it times the measured time for each."""
        return self.waiting * self._seconds_per_picture

    def check(self, size_bytes: int, count: int, deadline_seconds: float) -> None:
        """Whether so much more may be admitted. If nothing waits, everything may.

        Raises:
            Overloaded: as many pictures or bytes wait as are accepted, or the answer would come too late.
        """
        wait_seconds = self.expected_wait_seconds
        if self.waiting and (
            self.waiting + count > self.limits.max_waiting
            or self.waiting_bytes + size_bytes > self.limits.max_waiting_bytes
            or wait_seconds > deadline_seconds
        ):
            retry = max(1, math.ceil(wait_seconds))
            raise Overloaded(
                f"The service has as much to do as it accepts: {self.waiting:,} pictures wait. "
                f"Try again in {retry} second{'s' * (retry > 1)}.",
                retry_after_seconds=retry,
            )

    def enter(self, size_bytes: int, count: int) -> None:
        self.waiting += count
        self.waiting_bytes += size_bytes

    def leave(self, size_bytes: int, count: int) -> None:
        self.waiting -= count
        self.waiting_bytes -= size_bytes

    def learn(self, seconds_per_picture: float) -> None:
        """Take the time of a batch into the mean."""
        known = self._seconds_per_picture or seconds_per_picture
        self._seconds_per_picture = known + SMOOTHING * (seconds_per_picture - known)
