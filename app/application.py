"""The ASGI application: FastAPI with the service and the counters, and a faster lane to a few paths."""

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import monotonic
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema
from starlette.types import Receive, Scope, Send

from app.boundary import UNMATCHED, Boundary, Ledger, request_id_of
from app.errors import RequestError
from app.exchange import LIGHT_BYTES, Headers, RawReply, Reply, announced_bytes, combine, error_reply
from app.open_inference.schemas import InferenceRequest
from app.service import Service
from app.statistics import Counts

Lane = Callable[[Headers, Receive, Service], Awaitable[Reply]]


class Application(FastAPI):
    """FastAPI, with a fast lane past it for POST requests to a few paths, without query parameters.

    The same code answers there, behind the same boundary. Routing, dependencies, parameters and the framework's layers
    take some 200 us a request, several times as much as the rest. All other requests go the usual way, as does every
    request once the embedding program has added middleware or overridden a dependency.
    """

    def __init__(self, service: Service, ledger: Ledger, lanes: Mapping[str, Lane], **options: Any) -> None:
        super().__init__(**options)
        self.service = service
        self.total: Callable[[], Awaitable[Counts]] = self._own
        """Returns the counts of all serving processes. The default, replaced if there are several, is this one's."""
        self._ledger = ledger
        self._lanes = lanes
        self._lane = Boundary(self._answer, lanes.keys(), ledger)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        plain = scope["type"] == "http" and scope["method"] == "POST" and not scope["query_string"]
        unchanged = len(self.user_middleware) == 1 and not self.dependency_overrides  # one: the boundary
        in_lane = plain and unchanged and scope["path"] in self._lanes
        await (self._lane if in_lane else super().__call__)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.service.start()
        reply = await self._lanes[scope["path"]](combine(scope["headers"]), receive, self.service)
        if reply.timing is not None:
            scope["state"]["timing"] = reply.timing
        await reply.send(send)

    def count(self) -> Counts:
        """The counts of this process."""
        service = self.service
        return Counts(
            self._ledger.traffic,
            service.statistics,
            service.predictions,
            lines_dropped=self._ledger.lines_dropped,
            pids=(os.getpid(),),
            waiting=service.waiting,
            ready=service.ready,
        )

    async def _own(self) -> Counts:
        return self.count()

    def refuse(self, path: str, headers: Sequence[tuple[bytes, bytes]]) -> Callable[[], RawReply] | None:
        """While nothing more is admitted, a function that makes the refusal of a POST request in a lane once it
        has ended; None to let the request in.

        The body makes no difference, so the server asks before it creates a task; it then reads and drops the body. A
        request whose body may be long comes in the usual way, with its limits.
        """
        if path not in self._lanes:
            return None
        try:
            self.service.check_room()
            return None
        except RequestError as error:
            known = combine(headers)
            length = announced_bytes(known)
            if length is None or length > LIGHT_BYTES:
                return None
            started_at, reason, request_id = monotonic(), error.reason, request_id_of(known)
            reply = error_reply(error, request_id)
            return lambda: self._tell(reply, reason, request_id, path, "POST", monotonic() - started_at)

    def reject(self, error: RequestError) -> RawReply:
        """The answer to bytes that are not a valid request."""
        request_id = request_id_of({})
        return self._tell(error_reply(error, request_id), error.reason, request_id, UNMATCHED, "OTHER", 0.0)

    def _tell(self, reply: Reply, reason: str, request_id: str, route: str, method: str, seconds: float) -> RawReply:
        self._ledger.record(route, method, reply.status, seconds, request_id, reason)
        return reply.status, [*reply.head(), (b"x-request-id", request_id.encode())], reply.body

    def openapi(self) -> dict[str, Any]:
        """The document with the schema of the one JSON request body, which the framework does not know: we parse it."""
        document = super().openapi()
        _, bodies = models_json_schema([(InferenceRequest, "validation")], ref_template="#/components/schemas/{model}")
        document["components"]["schemas"].update(bodies["$defs"])
        return document
