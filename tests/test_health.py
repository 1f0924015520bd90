"""Probes and pages."""

import asyncio
import gc
import re
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest
from fastapi.testclient import TestClient
from running import ROOT
from starlette.requests import Request
from starlette.responses import Response

from app import checkpoint, main
from app.batching import Batcher, Building
from app.checkpoint import CIFAR10_CLASSES
from app.errors import StartError
from app.main import create_app
from app.routes import _service
from app.routes.pages import STATIC
from app.service import Service
from app.settings import Settings


def test_alive_and_ready(client: TestClient) -> None:
    assert (client.get("/healthz").status_code, client.get("/healthz").json()) == (200, {"status": "ok"})
    assert client.get("/health").json() == client.get("/livez").json() == {"status": "ok"}
    assert (client.get("/readyz").status_code, client.get("/readyz").json()) == (200, {"status": "ready"})


@pytest.mark.parametrize(
    "path", ["/healthz", "/readyz", "/metrics", "/metrics/per-class", "/v2", "/openapi.json", "/", "/docs"]
)
def test_head_requests_return_headers_without_a_body(client: TestClient, path: str) -> None:
    whole, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]


def test_a_draining_service_is_not_ready_but_answers(settings: Settings, png: bytes) -> None:
    app = create_app(settings)
    service: Service = app.service
    with TestClient(app) as client:
        service.draining = True
        response = client.get("/readyz")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"] == "The service is stopping. Send requests elsewhere."
        assert client.get("/healthz").status_code == 200
        assert client.post("/predict", content=png).status_code == 200


@pytest.mark.anyio
async def test_the_service_is_ready_only_between_start_and_close(settings: Settings) -> None:
    service: Service = create_app(settings).service
    assert not service.ready
    await service.start()
    assert service.ready
    await service.close()
    assert not service.ready


def test_an_application_can_be_started_again(settings: Settings, png: bytes) -> None:
    """As each `with TestClient(app)` does with an application that it imports."""
    app = create_app(settings)
    for _ in range(2):
        with TestClient(app) as client:
            assert client.get("/readyz").status_code == 200
            assert client.post("/predict", content=png).status_code == 200


def test_the_module_has_an_application_with_the_settings_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, weights: Path, png: bytes
) -> None:
    """For `uvicorn app.main:app`."""
    for name, value in {"WEIGHTS": str(weights), "DEVICE": "cpu", "ENGINE": "torch", "THREADS": "1"}.items():
        monkeypatch.setenv(f"CIFAR_{name}", value)
    monkeypatch.setitem(vars(main), "app", None)  # so that it is put back to what it was
    del main.app
    assert main.app is main.app
    with TestClient(main.app) as client:
        answer = client.post("/predict", content=png).json()
    assert answer["model"] == {"name": "net", "sha256": checkpoint.load(weights).sha256[:12]}


def test_main_lists_app_and_makes_no_other_attribute_on_demand() -> None:
    """`fastapi run app/main.py` looks for it in the list."""
    assert "app" in dir(main)
    assert not hasattr(main, "application")


@pytest.mark.parametrize(("method", "path"), [("GET", "/readyz"), ("POST", "/predict"), ("POST", "/predict/batch")])
def test_where_nothing_runs_the_lifespan_the_first_request_starts_the_service(
    settings: Settings, png: bytes, method: str, path: str
) -> None:
    """Each request without `with` has an event loop of its own."""
    app = create_app(settings)
    client = TestClient(app)
    for _ in range(3):
        response = client.request(method, path, files=[("file", png)] if method == "POST" else None)
        assert response.status_code == 200
    assert client.post("/v2/repository/index").json()[0]["state"] == "READY"
    with TestClient(app):  # runs the lifespan, whose end is the service's
        pass
    assert not app.service.running


@pytest.mark.anyio
async def test_first_requests_at_once_start_the_service_once(
    settings: Settings, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(settings)
    starts = []
    original = Batcher.start

    def start(self: Batcher[Any, Any, Any], building: Building[Any, Any]) -> None:
        starts.append(self)
        original(self, building)

    monkeypatch.setattr(Batcher, "start", start)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        responses = await asyncio.gather(*(client.post("/predict", content=png) for _ in range(8)))
    assert [response.status_code for response in responses] == [200] * 8
    assert len(starts) == 1
    await app.service.close()


@pytest.mark.anyio
async def test_a_first_client_that_leaves_does_not_end_the_start_for_the_others(settings: Settings) -> None:
    service: Service = create_app(settings).service
    first, second = (asyncio.create_task(service.start()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await second
    assert first.cancelled()
    assert service.running
    await service.close()


@pytest.mark.anyio
async def test_a_start_that_fails_fails_once_for_all_who_wait(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    service: Service = create_app(settings).service
    starts, gate = [], threading.Event()

    def fail(batcher: Batcher[Any, Any, Any], _building: Building[Any, Any]) -> None:
        starts.append(batcher)
        gate.wait()
        raise StartError("no engine")

    monkeypatch.setattr(Batcher, "start", fail)
    waiting = [asyncio.create_task(service.start()) for _ in range(8)]
    await asyncio.sleep(0)
    gate.set()
    errors = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(error) for error in errors] == [StartError] * 8
    assert len(starts) == 1


@pytest.mark.anyio
async def test_closing_ends_a_start_that_nobody_waits_for(settings: Settings) -> None:
    service: Service = create_app(settings).service
    waiting = [asyncio.create_task(service.start()) for _ in range(3)]
    await asyncio.sleep(0)
    for each in waiting:
        each.cancel()
    await service.close()
    assert not service.running
    await service.start()
    assert service.running
    await service.close()


def test_requests_from_several_event_loops_are_answered(settings: Settings, png: bytes) -> None:
    """As from threads that share a `TestClient` without `with`, the first ones included."""
    app = create_app(settings)
    client = TestClient(app)
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: client.post("/predict", content=png).status_code, range(40)))
    assert statuses == [200] * 40
    assert client.get("/v2/models/cifar/stats").json()["model_stats"][0]["inference_count"] == 40
    asyncio.run(app.service.close())


def test_a_process_ends_well_although_nothing_ended_its_service(weights: Path) -> None:
    code = (
        "from pathlib import Path\nfrom fastapi.testclient import TestClient\nfrom app.main import create_app\n"
        "from app.settings import Settings\n"
        f"client = TestClient(create_app(Settings(weights=Path({str(weights)!r}), device='cpu', threads=1)))\n"
        "print(client.get('/readyz').status_code)"
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "200\n")
    assert "Traceback" not in ran.stderr


def test_a_client_with_the_lifespan_and_others_are_answered_by_one_service(settings: Settings, png: bytes) -> None:
    app = create_app(settings)
    with TestClient(app) as client:
        assert TestClient(app).post("/predict", content=png).status_code == 200
        with TestClient(app) as second:
            assert second.post("/predict", content=png).status_code == 200
        assert client.post("/predict", content=png).status_code == 200  # started anew
    assert TestClient(app).post("/predict", content=png).status_code == 200  # and again
    asyncio.run(app.service.close())


async def deny(_request: Request, _call_next: object) -> Response:
    return Response(status_code=401)


def test_added_middleware_and_overrides_apply_to_every_path(settings: Settings, png: bytes) -> None:
    """The lane past the framework is closed then."""
    behind_a_guard = create_app(settings)
    behind_a_guard.middleware("http")(deny)
    with TestClient(behind_a_guard) as client:
        for path in ("/predict", "/predict?top_k=1", "/v2/models/cifar/infer", "/predict/batch"):
            assert client.post(path, content=png).status_code == 401
    overridden, other = create_app(settings), create_app(settings)
    overridden.dependency_overrides[_service] = lambda: other.service  # which does not run
    with TestClient(overridden) as client:
        assert client.post("/predict", content=png).status_code == 503


def test_a_closed_application_is_freed(settings: Settings) -> None:
    app = create_app(settings)
    with TestClient(app):
        service = weakref.ref(app.service)
    del app
    gc.collect()
    assert service() is None


@pytest.mark.parametrize("path", ["/", "/docs", "/static/style.css"])
def test_a_cached_file_gives_304(client: TestClient, path: str) -> None:
    whole = client.get(path)
    assert "accept-ranges" not in whole.headers
    again = client.get(path, headers={"if-none-match": whole.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_and_everything_they_link_to_exist(client: TestClient, path: str) -> None:
    page = client.get(path)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'self';")
    assert page.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script>|<style>| on\w+=| style=", page.text)  # which CSP forbids
    links = re.findall(r'(?:href|src)="([^":]*)"', page.text)
    assert "static/style.css" in links
    assert not [link for link in links if link.startswith("/")]  # a proxy may serve this below a path
    assert [client.get(urljoin(path, link)).status_code for link in links] == [200] * len(links)


def test_the_form_works_without_javascript(client: TestClient, png: bytes) -> None:
    form = re.search(r'<form .*?action="(.*?)" method="post" enctype="multipart/form-data">', client.get("/").text)
    assert form
    assert client.post(f"/{form[1]}", files={"file": png}).json()["label"] in CIFAR10_CLASSES


def test_range_requests_are_answered_with_the_whole_file(client: TestClient) -> None:
    response = client.get("/static/docs.js", headers={"range": "bytes=9-1"})
    assert (response.status_code, response.text) == (200, (STATIC / "docs.js").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("script", "path"), [("predict.js", "/"), ("docs.js", "/docs")])
def test_ids_and_urls_used_by_a_script_exist(client: TestClient, script: str, path: str) -> None:
    text, page = (STATIC / script).read_text(encoding="utf-8"), client.get(path).text
    identities = re.findall(r'(?:\$|getElementById)\("(\w+)"\)', text)
    assert identities
    assert [name for name in identities if f'id="{name}"' not in page] == []
    fetched = re.findall(r'fetch\("(.*?)"', text)
    assert fetched
    known = [*client.get("/openapi.json").json()["paths"], "/openapi.json"]
    assert [each for each in fetched if f"/{each}" not in known] == []


@pytest.mark.parametrize("name", sorted(path.name for path in STATIC.iterdir()))
def test_nothing_is_fetched_from_elsewhere(name: str) -> None:
    assert not re.search(r"https?:|//[a-z]+\.|@import", (STATIC / name).read_text(encoding="utf-8"))
