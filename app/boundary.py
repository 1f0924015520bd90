"""Where requests enter and answers leave: request ids, one shape for every error, counting and logging.

Pure ASGI: the framework's own middleware class costs several times as much for each request.
"""

import logging
import random
import re
from collections.abc import Set
from http import HTTPStatus
from reprlib import repr as show  # an error message should not repeat everything that was sent
from time import monotonic
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import InvalidParameter, MethodNotAllowed, NotFound, RequestError
from app.exchange import Headers, combine, error_reply
from app.logs import AccessLog
from app.statistics import Timing, Traffic

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=|~@-]{1,128}")
"""What X-Request-ID may be. Anything else could forge log lines."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNMATCHED = "unmatched"
"""The route of every path that does not exist: with one for each, a scanner could create any number of metrics."""
LEFT = 499
"""Never sent, only counted: the client left before its answer."""
SHOWN_LETTERS = 200
"""How much of a path an error message repeats."""
DEFECT = "Internal error: the service could not answer. Please report the request_id; the log has the details."


class Ledger:
    """Counts and logs each request."""

    def __init__(self, traffic: Traffic, access_log: AccessLog | None) -> None:
        self.traffic = traffic
        self._access_log = access_log

    @property
    def lines_dropped(self) -> int:
        """Lines of the access log that nobody read in time."""
        return self._access_log.dropped if self._access_log is not None else 0

    def record(
        self, route: str, method: str, status: int, seconds: float, request_id: str, reason: str | None = None
    ) -> None:
        self.traffic.seconds[route, method, status].add(seconds)
        if reason is not None:
            self.traffic.refusals[reason] += 1
        if self._access_log is not None:
            self._access_log.note(request_id, method, route, status, seconds)


class Boundary:
    """Gives each request an id, and turns a defect into an answer and a log entry.

    Args:
        paths: The routes without path parameters, whose template is the path itself.
    """

    def __init__(self, app: ASGIApp, paths: Set[str], ledger: Ledger) -> None:
        self.app = app
        self.paths = paths
        self.ledger = ledger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started_at = monotonic()
        status, method, root = LEFT, scope["method"], scope.get("root_path", "")
        scope.pop("route", None)  # the outer application's, if there is one
        if method == "HEAD":  # answered wherever GET is (RFC 9110, section 9.3.2); the server drops the body
            scope = {**scope, "method": "GET"}
        state = scope.setdefault("state", {})
        state["request_id"] = request_id_of(combine(scope["headers"]))

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", state["request_id"].encode())]
                if "timing" in state:
                    message["headers"].append(server_timing(state["timing"], monotonic() - started_at))
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            return  # nobody is left to answer
        except RequestError as error:
            error.__traceback__ = None  # its frames hold the error and the body: a cycle
            state["reason"] = error.reason
            await error_reply(error, state["request_id"]).send(send_with_id)
        except Exception:  # a defect of ours: the client gets a sentence, the log the traceback
            where = (state["request_id"], method, self._route(scope, root))
            logger.exception("Request %s, %s %s:", *where, extra={"request_id": where[0]})
            if status != LEFT:
                raise
            state["reason"] = RequestError.reason
            await error_reply(RequestError(DEFECT), state["request_id"]).send(send_with_id)
        finally:
            seconds = monotonic() - started_at
            counted = method if method in METHODS else "OTHER"
            route, reason = self._route(scope, root), state.get("reason")
            self.ledger.record(route, counted, status, seconds, state["request_id"], reason)

    def _route(self, scope: Scope, root: str) -> str:
        """The template of the path: the path itself, the matched route's, or a mounted application's root; relative to
        the `root` at which this application is mounted."""
        path: str = scope["path"].removeprefix(root)
        if path in self.paths:
            return path
        return getattr(scope.get("route"), "path", "") or scope.get("root_path", "").removeprefix(root) or UNMATCHED


def request_id_of(headers: Headers) -> str:
    """The client's id if it is well-formed, else a new one."""
    given = headers.get(b"x-request-id", b"")
    if REQUEST_ID.fullmatch(given):
        return given.decode()
    return f"{random.getrandbits(64):016x}"


def error_response(request: Request, error: RequestError) -> Response:
    state = request.scope["state"]
    state["reason"] = error.reason
    return error_reply(error, state["request_id"]).response(request)


def server_timing(timing: Timing, total: float) -> tuple[bytes, bytes]:
    """A Server-Timing header, in milliseconds. The remainder of the total is HTTP and waiting for the event loop."""
    queue, decode, inference = timing
    milliseconds = (queue * 1e3, decode * 1e3, inference * 1e3, total * 1e3)
    return b"server-timing", b"queue;dur=%.2f, decode;dur=%.2f, inference;dur=%.2f, total;dur=%.2f" % milliseconds


def install(app: FastAPI, paths: Set[str], ledger: Ledger) -> None:
    """Put `app` behind the boundary. The framework's own errors take the same shape as ours."""

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(request, _translate(request, error))

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(request, _explain(error.errors()))

    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_middleware(Boundary, paths=paths, ledger=ledger)


def _translate(request: Request, error: HTTPException) -> RequestError:
    if error.status_code == HTTPStatus.NOT_FOUND:
        return NotFound(f"There is nothing at {request.url.path[:SHOWN_LETTERS]}. The page /docs lists all paths.")
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        methods = (error.headers or {}).get("Allow", "").split(", ")
        allowed = ", ".join(sorted({*methods, "HEAD"} if "GET" in methods else methods))
        sentence = f"{request.url.path[:SHOWN_LETTERS]} does not take {request.method}; it takes {allowed}."
        return MethodNotAllowed(sentence, headers={"Allow": allowed})
    raise error  # the framework raises no other here: a defect


def _explain(problems: Any) -> RequestError:
    """A sentence for each parameter with an invalid value."""
    sentences = [
        f"The parameter {p['loc'][-1]} is {show(p.get('input'))}; it must be {_accepted(p)}." for p in problems
    ]
    detail = [
        {"parameter": p["loc"][-1], "given": str(p.get("input"))[:SHOWN_LETTERS], "problem": f"must be {_accepted(p)}"}
        for p in problems
    ]
    return InvalidParameter(" ".join(sentences), detail=detail)


def _accepted(problem: Any) -> str:
    """What the parameter must be, in our own words for the kinds that exist."""
    match problem["type"]:
        case "int_parsing":
            return "a whole number"
        case "int_parsing_size":
            return "a number of fewer digits"
        case "greater_than_equal":
            return f"a number of at least {problem['ctx']['ge']}"
        case "literal_error":
            return str(problem["ctx"]["expected"])
    return f"something else ({problem['msg']})"
