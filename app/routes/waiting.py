"""Waiting for an answer as long as somebody wants it."""

import asyncio
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

T = TypeVar("T")


async def unless_left(request: Request, future: asyncio.Future[T]) -> T:
    """What the future gives, whose request has been read; it is cancelled when the client leaves before.

    Raises:
        ClientDisconnect: the client has left.
    """
    leaving = asyncio.ensure_future(_leaving(request))
    try:
        await asyncio.wait((future, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise ClientDisconnect
        return future.result()
    finally:
        leaving.cancel()
        future.cancel()  # changes nothing if it is done; else no forward pass is spent on it


async def _leaving(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
