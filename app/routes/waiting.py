"""Waiting for an answer as long as somebody wants it."""

import asyncio
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

T = TypeVar("T")

PATIENCE_SECONDS = 0.05
"""Watching takes a task for each request, more than a small picture's share of a forward pass. So it begins only when
an answer has not come for so long; who has left by then is noticed at once."""


async def unless_left(receive: Receive, future: asyncio.Future[T]) -> T:
    """What the future gives, whose request has been read; it is cancelled when the client leaves before.

    Raises:
        ClientDisconnect: the client has left.
    """
    watching: list[asyncio.Task[None]] = []

    def watch() -> None:
        watching.append(asyncio.ensure_future(_cancel_when_left(receive, future)))

    timer = asyncio.get_running_loop().call_later(PATIENCE_SECONDS, watch)
    try:
        return await future
    except asyncio.CancelledError:
        if watching and watching[0].done():
            raise ClientDisconnect from None
        raise
    finally:
        timer.cancel()
        for task in watching:
            task.cancel()


async def _cancel_when_left(receive: Receive, future: asyncio.Future[T]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    future.cancel()  # changes nothing if it is done; else no forward pass is spent on it
