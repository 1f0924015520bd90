"""Waiting for an answer as long as somebody wants it."""

import asyncio
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from app.errors import DeadlineExceeded

T = TypeVar("T")

PATIENCE_SECONDS = 0.05
"""Watching takes a task for each request, more than a small picture's share of a forward pass. So it begins only after
this time; a client that has left by then is noticed at once."""

GRACE_SECONDS = 1.0
"""What was taken up within the deadline may still be finished."""


async def unless_left(receive: Receive, future: asyncio.Future[T], deadline_seconds: float) -> T:
    """What the future gives, whose request has been read; it is cancelled when the client leaves before.

    Raises:
        ClientDisconnect: the client has left.
        DeadlineExceeded: nothing came of it. Usually that is said where it waits; not if a thread is stuck.
    """
    watching: list[asyncio.Task[Exception]] = []

    def watch() -> None:
        watching.append(asyncio.ensure_future(_give_up(receive, future, deadline_seconds)))

    timer = asyncio.get_running_loop().call_later(PATIENCE_SECONDS, watch)
    try:
        return await future
    except asyncio.CancelledError:
        if watching and watching[0].done():
            # Not left in the list: what is raised holds this frame, and the body, and would be held by it in turn.
            raise watching.pop().result() from None
        raise
    finally:
        timer.cancel()
        while watching:
            watching.pop().cancel()


async def _give_up(receive: Receive, future: asyncio.Future[T], deadline_seconds: float) -> Exception:
    """Cancel the future when nobody wants it any more, or it has taken too long; say which."""
    reason: Exception = ClientDisconnect()
    try:
        async with asyncio.timeout(deadline_seconds + GRACE_SECONDS):
            while (await receive())["type"] != "http.disconnect":
                pass
    except TimeoutError:
        reason = DeadlineExceeded(f"The request took longer than {deadline_seconds:g} seconds. Try again later.")
    future.cancel()  # changes nothing if it is done; else no forward pass is spent on it
    return reason
