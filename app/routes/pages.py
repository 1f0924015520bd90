"""The pages for people. Everything they need is in app/static; nothing is fetched from elsewhere."""

from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

STATIC = Path(__file__).resolve().parent.parent / "static"
POLICY = "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
"""What the pages may load and who may frame them, in case HTML in a class name ever gets in. The preview is a blob."""


class WholeFiles(StaticFiles):
    """Ignores ranges: files are only a few KB, and the framework refuses odd ranges with a body unlike ours."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        scope["headers"] = [header for header in scope["headers"] if header[0] != b"range"]
        response = await super().get_response(path, scope)
        del response.headers["accept-ranges"]
        response.headers["content-security-policy"] = POLICY
        response.headers["x-content-type-options"] = "nosniff"
        return response


FILES = WholeFiles(directory=STATIC)

router = APIRouter(include_in_schema=False)


@router.get("/")
async def index(request: Request) -> Response:
    return await FILES.get_response("index.html", request.scope)


@router.get("/docs")
async def docs(request: Request) -> Response:
    return await FILES.get_response("docs.html", request.scope)
