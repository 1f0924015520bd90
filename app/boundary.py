"""Where requests enter and errors leave: request ids, the limit on bodies, one shape for every error.

Pure ASGI: the framework's own middleware class costs several times as much for each request.
"""

import logging
import random
import re
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BodyTooLarge, RequestError

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
"""What is taken over from X-Request-ID. Anything else could forge lines of a log."""
DEFECT = "The service has a defect and could not answer. Please report the request_id; the log has the details."


class Boundary:
    """Gives each request an id, counts the bytes of its body, turns a defect into an answer and a line in the log."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if REQUEST_ID.fullmatch(given) else b"%016x" % random.getrandbits(64)
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        received = 0
        started = False

        async def receive_within_limit() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise self._too_large()
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            length = headers.get(b"content-length", b"")
            if length.isdigit() and int(length) > self.max_body_bytes:
                raise self._too_large()
            await self.app(scope, receive_within_limit, send_with_id)
        except ClientDisconnect:
            return  # nobody is there to be answered
        except RequestError as error:
            await error_response(scope, error)(scope, receive, send_with_id)
        except Exception:
            logger.exception("Request %s, %s %s:", request_id.decode(), scope["method"], scope["path"])
            if started:
                raise
            await error_response(scope, RequestError(DEFECT))(scope, receive, send_with_id)

    def _too_large(self) -> BodyTooLarge:
        limit = self.max_body_bytes
        return BodyTooLarge(
            f"The request body is too large; accepted are at most {limit:,} bytes.", detail={"max_body_bytes": limit}
        )


def error_response(scope: Scope, error: RequestError, headers: dict[str, str] | None = None) -> Response:
    headers = {**(headers or {}), **error.headers}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    body = {"error": str(error), "detail": error.detail, "request_id": scope["state"]["request_id"]}
    return Response(to_json(body), error.status, headers, "application/json")


def install(app: FastAPI, max_body_bytes: int) -> None:
    """Put `app` behind the boundary. The framework's own errors take the same shape as ours."""

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(request.scope, _translate(request, error), dict(error.headers or {}))

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(request.scope, _explain(error.errors()))

    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_middleware(Boundary, max_body_bytes=max_body_bytes)


def _with_status(status: int, sentence: str, detail: object = None) -> RequestError:
    error = RequestError(sentence, detail=detail)
    error.status = status
    return error


def _translate(request: Request, error: HTTPException) -> RequestError:
    if error.status_code == HTTPStatus.NOT_FOUND:
        return _with_status(404, f"There is no page {request.url.path}. The page /docs lists what there is.")
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "another method")
        return _with_status(405, f"The page {request.url.path} does not take {request.method}; it takes {allowed}.")
    return _with_status(error.status_code, f"{error.detail}.".replace("..", "."))


def _explain(problems: Any) -> RequestError:
    """A sentence for each parameter that was not accepted."""
    sentences = [f"The parameter {p['loc'][-1]} is {p.get('input')!r}. {p['msg']}." for p in problems]
    detail = [{"parameter": p["loc"][-1], "given": p.get("input"), "problem": p["msg"]} for p in problems]
    return _with_status(422, " ".join(sentences), detail)
