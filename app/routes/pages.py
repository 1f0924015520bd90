"""The pages for people. Everything they need is in app/static; nothing is fetched from elsewhere."""

from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

STATIC = Path(__file__).resolve().parent.parent / "static"
FILES = StaticFiles(directory=STATIC)

router = APIRouter(include_in_schema=False)


@router.get("/")
async def index(request: Request) -> Response:
    return await FILES.get_response("index.html", request.scope)


@router.get("/docs")
async def docs(request: Request) -> Response:
    return await FILES.get_response("docs.html", request.scope)
