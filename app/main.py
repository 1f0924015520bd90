"""create_app(settings): wiring only."""

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.staticfiles import StaticFiles

from app import boundary, engine
from app.device import choose_device
from app.errors import SettingsError
from app.routes import admin, batch, health, metrics, open_inference, pages, predict
from app.routes.fast_lane import FastLane
from app.service import Service, load_aside
from app.settings import Settings

DESCRIPTION = """Send a picture, get the probability of each class.

Every error has the same body, `ErrorBody`; every answer has the header `X-Request-ID`, taken from the request if it
has a well-formed one."""


def create_app(settings: Settings) -> FastAPI:
    """The application. Reads the weights file at once; builds and warms the network when the lifespan starts.

    Raises:
        StartError: the weights file, the device or the engine cannot be used.
    """
    try:
        device = choose_device(settings.device)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    engine.check(settings.engine, device)
    service = Service(settings, load_aside(settings.weights), device)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        # What is loaded stays; without this, a full garbage collection stops all requests for 60 ms now and then.
        gc.collect()
        gc.freeze()
        yield
        await service.close()

    app = FastAPI(
        title="CIFAR classification",
        description=DESCRIPTION,
        version="0.1.0",
        lifespan=lifespan,
        docs_url=None,  # the framework's pages load their scripts from elsewhere; ours is in static
        redoc_url=None,
    )
    app.state.service = service
    for routes in (predict, batch, open_inference, metrics, health, pages):
        app.include_router(routes.router)
    if settings.admin_key is not None:
        app.include_router(admin.router)
    app.mount("/static", StaticFiles(directory=pages.STATIC), name="static")
    lanes = {"/predict": predict.respond, f"/v2{open_inference.MODEL}/infer": open_inference.respond}
    app.add_middleware(FastLane, service=service, lanes=lanes)
    boundary.install(app, settings.max_body_bytes)
    return app
