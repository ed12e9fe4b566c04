"""The web application: the three APIs behind the guard, with metrics and a word on health."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response

from controlkit import __version__
from controlkit.errors import one_line
from controlkit.serve.a1111 import A1111
from controlkit.serve.desk import Desk
from controlkit.serve.front import Front
from controlkit.serve.guard import Guard
from controlkit.serve.openai import OpenAI
from controlkit.serve.v1 import V1

_PAGE = """<!doctype html><html lang="en"><title>ControlKit</title><h1>ControlKit</h1>
<p>This server makes pictures for other programs. Its routes are listed in <a href="/openapi.json">/openapi.json</a>.
</html>"""


def app_of(desk: Desk) -> Guard:
    """The application of a desk that is open; it is not closed with it."""

    @asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        desk.bind(asyncio.get_running_loop())
        yield

    app = FastAPI(title="ControlKit", version=__version__, lifespan=living, docs_url=None, redoc_url=None)
    apis: tuple[Front, ...] = (A1111(desk), OpenAI(desk), V1(desk))
    for api in apis:
        app.include_router(api.router())
    _add_own(app, desk)
    return Guard(app, desk.settings, lambda reason: desk.meters.refused.labels(reason).inc())


def _add_own(app: FastAPI, desk: Desk) -> None:
    """Add the routes that belong to no API."""

    async def front_page() -> Response:
        return HTMLResponse(_PAGE)

    async def health() -> Response:
        counts = await asyncio.to_thread(desk.queue.counts)
        told = {key: counts.get(key, 0) for key in ("waiting", "running")}
        return JSONResponse({"status": "ok" if desk.is_alive else "no worker", **told}, 200 if desk.is_alive else 503)

    async def metrics() -> Response:
        counts = await asyncio.to_thread(desk.queue.counts)
        return Response(desk.meters.text(counts), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def mistake(http: HttpRequest, error: Exception) -> Response:
        logging.getLogger(__name__).error("a mistake of the server", exc_info=error)
        sentence = "This is a mistake of the server; its log says more."
        return JSONResponse({"error": {"message": sentence, "type": "Mistake", "code": 500}, "detail": sentence}, 500)

    async def no_route(http: HttpRequest, error: HTTPException) -> Response:
        sentence = f"There is no {http.method} {one_line(http.url.path)}: GET /openapi.json lists the routes."
        told = {"message": sentence, "type": str(error.detail), "code": error.status_code}
        return JSONResponse({"error": told, "detail": error.detail}, error.status_code, headers=error.headers)

    routes: dict[str, Any] = {"/": front_page, "/healthz": health, "/metrics": metrics}
    for path, handler in routes.items():
        app.add_api_route(path, handler, methods=["GET"], include_in_schema=path != "/")
    app.add_exception_handler(HTTPException, no_route)  # type: ignore[arg-type]  # of this kind alone
    app.add_exception_handler(Exception, mistake)
