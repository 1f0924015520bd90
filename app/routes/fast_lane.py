"""A way past the framework for the requests that come a thousand times a second."""

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from time import monotonic
from typing import Any

from fastapi import FastAPI
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from app.boundary import DEFECT, LEFT, UNMATCHED, Ledger, request_id_of, server_timing
from app.errors import RequestError
from app.exchange import LIGHT_BYTES, Headers, RawReply, Reply, announced_bytes, refusal
from app.service import Service

logger = logging.getLogger(__name__)

Respond = Callable[[Headers, Receive, Service], Awaitable[Reply]]


class Application(FastAPI):
    """The framework, behind a lane of its own for POST requests without parameters to a few paths.

    There the same code answers as behind the router. Routing, dependencies, parameters and the framework's layers take
    some 200 us a request, several times what is left. Any other request goes the usual way.
    """

    def __init__(self, service: Service, ledger: Ledger, lanes: Mapping[str, Respond], **options: Any) -> None:
        super().__init__(**options)
        self._service = service
        self._ledger = ledger
        self._lanes = lanes

    def refuse(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> Callable[[], RawReply] | None:
        """What a POST request in the lane is told at its end while nothing more is admitted; None if it may come in.

        What it holds makes no difference, so the server asks before it makes a task of it. The body is then taken in
        for nothing; one that may be long comes in the usual way, with its limits.
        """
        if path not in self._lanes:
            return None
        try:
            self._service.check_room()
            return None
        except RequestError as error:
            known = dict(headers)
            length = announced_bytes(known)
            if length is None or length > LIGHT_BYTES:
                return None
            started_at, reason, request_id = monotonic(), error.reason, request_id_of(known)
            reply = refusal(error, request_id)

        def answer() -> RawReply:
            self._ledger.record(path, "POST", reply.status, monotonic() - started_at, request_id, reason)
            return reply.status, reply.head(request_id), reply.body

        return answer

    def reject(self, error: RequestError) -> RawReply:
        """What a client is told whose bytes have not become a request."""
        request_id = request_id_of({})
        reply = refusal(error, request_id)
        self._ledger.record(UNMATCHED, "OTHER", reply.status, 0.0, request_id, error.reason)
        return reply.status, reply.head(request_id), reply.body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        plain = scope["type"] == "http" and scope["method"] == "POST" and not scope["query_string"]
        respond = self._lanes.get(scope["path"]) if plain else None
        if respond is None:
            await super().__call__(scope, receive, send)
            return
        started_at = monotonic()
        path, headers = scope["path"], dict(scope["headers"])
        request_id = request_id_of(headers)
        reason = None
        try:
            reply = await respond(headers, receive, self._service)
        except ClientDisconnect:  # nobody is there to be answered
            self._ledger.record(path, "POST", LEFT, monotonic() - started_at, request_id)
            return
        except RequestError as error:
            reason, reply = error.reason, refusal(error, request_id)
            error.__traceback__ = None  # of frames that hold the error, and the body: a cycle
        except Exception:  # whatever it is, it is ours: the client gets a sentence, the log the traceback
            logger.exception("Request %s, POST %s:", request_id, path, extra={"request_id": request_id})
            reason, reply = RequestError.reason, refusal(RequestError(DEFECT), request_id)
        head = reply.head(request_id)
        if reply.timing is not None:
            head.append(server_timing(reply.timing, monotonic() - started_at))
        await send({"type": "http.response.start", "status": reply.status, "headers": head})
        await send({"type": "http.response.body", "body": reply.body})
        self._ledger.record(path, "POST", reply.status, monotonic() - started_at, request_id, reason)
