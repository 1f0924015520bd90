"""Waiting for an answer for as long as somebody wants it."""

import asyncio
from collections.abc import Sequence
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from app.entries import Answer
from app.errors import DeadlineExceeded
from app.statistics import Timing

T = TypeVar("T")

PATIENCE_SECONDS = 0.05
"""How long to wait before watching the client: that takes a task, which costs more than a small picture's share of a
forward pass. A client that has left by then is noticed at once."""

GRACE_SECONDS = 1.0
"""How long past the deadline work that has begun may take to finish."""


async def unless_left(receive: Receive, future: asyncio.Future[T], deadline_seconds: float) -> T:
    """The result of the future; cancels it if the client leaves first. The request must have been read.

    Raises:
        ClientDisconnect: the client has left.
        DeadlineExceeded: there is no result in time. Usually the queue says so, but not if a thread is stuck.
    """
    watching: list[asyncio.Task[Exception]] = []

    def watch() -> None:
        watching.append(asyncio.ensure_future(_give_up(receive, future, deadline_seconds)))

    timer = asyncio.get_running_loop().call_later(PATIENCE_SECONDS, watch)
    try:
        return await future
    except asyncio.CancelledError:
        if watching and watching[0].done():
            # Popped, because the error holds this frame, and with it the body, and the list would hold the error.
            raise watching.pop().result() from None
        raise
    finally:
        timer.cancel()
        while watching:
            watching.pop().cancel()


async def all_unless_left(
    receive: Receive, answers: Sequence[Answer[T]], deadline_seconds: float
) -> tuple[list[T | BaseException], Timing | None]:
    """Wait for all as `unless_left` does: the outcome of each, and where the time of the slowest went (None if nothing
    ran)."""
    outcomes = await unless_left(receive, asyncio.gather(*answers, return_exceptions=True), deadline_seconds)
    timings = [answer.timing for answer in answers if hasattr(answer, "timing")]  # not if it failed before it ran
    return outcomes, max(timings, key=sum, default=None)


async def _give_up(receive: Receive, future: asyncio.Future[T], deadline_seconds: float) -> Exception:
    """Cancel the future when the client has left or it has taken too long; return which, as an error."""
    reason: Exception = ClientDisconnect()
    try:
        async with asyncio.timeout(deadline_seconds + GRACE_SECONDS):
            while (await receive())["type"] != "http.disconnect":
                pass
    except TimeoutError:
        reason = DeadlineExceeded(f"The request took longer than {deadline_seconds:g} seconds. Try again later.")
    future.cancel()  # saves its forward pass; changes nothing if it is done
    return reason
