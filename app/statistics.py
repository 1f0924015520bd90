"""What has been answered since the start, and where the time went. Counted in the event loop; seconds throughout."""

from dataclasses import dataclass, field


@dataclass
class Total:
    """How often, and how long altogether."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        self.count += count
        self.seconds += seconds


@dataclass(frozen=True, kw_only=True)
class Execution:
    """One batch, as the thread that ran it saw it. A request is what was admitted as one: one picture or several."""

    requests: int
    pictures: int
    forward_passes: int
    queue_seconds: float
    """Summed over the requests; the others passed once, for all of them together."""
    prepare_seconds: float
    run_seconds: float


@dataclass
class Statistics:
    """Totals over requests: each has waited the whole time that its batch took."""

    success: Total = field(default_factory=Total)
    fail: Total = field(default_factory=Total)
    queue: Total = field(default_factory=Total)
    prepare: Total = field(default_factory=Total)
    run: Total = field(default_factory=Total)
    pictures: int = 0
    forward_passes: int = 0
    """Fewer than pictures when requests run together."""
    last_at: float = 0.0
    """Seconds since 1970 when a batch last ended; 0 before the first."""

    def record(self, execution: Execution, now: float) -> None:
        self.queue.add(execution.queue_seconds, execution.requests)
        self.prepare.add(execution.prepare_seconds * execution.requests, execution.requests)
        self.run.add(execution.run_seconds * execution.requests, execution.requests)
        self.pictures += execution.pictures
        self.forward_passes += execution.forward_passes
        self.last_at = now
