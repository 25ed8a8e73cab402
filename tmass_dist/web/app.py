"""The routes of the search page. Only the page's own files and the gallery's own videos are served."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.convertors import IntegerConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tmass_dist.errors import UserError
from tmass_dist.pages import TEMPLATES
from tmass_dist.retrieval.videos import SUFFIXES
from tmass_dist.web.service import MAX_RESULTS, BusyError, NotReadyError, Service

STATIC = Path(__file__).parent / "static"
SHARED = ("colours.css", "player.css", "player.js")
"""Files of ``TEMPLATES`` that the page uses too."""
HEADERS = {
    # The page needs nothing from elsewhere, and nothing inline: text that slips through as markup still runs no script.
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class _Number(IntegerConvertor):
    """Number of a row or a frame. A longer one is in no gallery, and ``int`` refuses thousands of digits."""

    regex = "[0-9]{1,11}"


register_url_convertor("number", _Number())


class _CutOff:
    """Ends the requests that the end of the server cuts off. Without it each would leave a traceback in the log."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except asyncio.CancelledError:
            if not started:
                await JSONResponse({"error": "the server is ending"}, 503)(scope, receive, send)


class _Headers:
    """Adds ``HEADERS`` to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


def make_app(service: Service, hosts: list[str]) -> Starlette:
    """The application.

    Args:
        service: answers the searches.
        hosts: names under which the server may be addressed; ``["*"]`` for any. On loopback it keeps other web sites
            from reading the gallery through a name of theirs that points here.
    """

    def page(path: Path) -> Any:
        async def answer(_: Request) -> Response:
            return FileResponse(path)

        return answer

    async def state(_: Request) -> Response:
        return JSONResponse(service.state())

    async def search(request: Request) -> Response:
        query, name, k = request.query_params.get("q", ""), request.query_params.get("name"), _number(request)
        return JSONResponse(await service.search(query, k, name))

    async def similar(request: Request) -> Response:
        row, k = _row(request.query_params.get("row", "")), _number(request)
        _known(service, row)
        return JSONResponse(await service.similar(row, k))

    async def thumbnail(request: Request) -> Response:
        row, frame = request.path_params["row"], request.path_params["frame"]
        try:
            return Response(service.searcher.gallery.thumbnail(row, frame), media_type="image/jpeg")
        except UserError as error:
            raise HTTPException(404, str(error)) from error

    async def video(request: Request) -> Response:
        path = Path(_known(service, request.path_params["row"]).path)
        if not path.name:
            raise HTTPException(404, "only the frames of this video were packed")
        # As tmass index chooses files: a gallery of someone else may name any file of this machine.
        if path.suffix.lower() not in SUFFIXES or path.is_symlink():
            raise HTTPException(404, "this is no video file of the gallery")
        if not path.is_file():
            raise HTTPException(404, "the file of this video no longer exists")
        return FileResponse(path)  # it answers byte ranges, which seeking needs

    async def refused(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, 400)

    async def unavailable(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, 503, {"retry-after": "2"})

    async def http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    async def failed(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": f"the server failed: {type(error).__name__}; its log has the details"}, 500)

    return Starlette(
        routes=[
            Route("/", page(STATIC / "index.html")),
            Route("/api", page(STATIC / "api.html")),
            Route("/api/state", state),
            Route("/api/search", search),
            Route("/api/similar", similar),
            Route("/thumbnail/{row:number}/{frame:number}.jpg", thumbnail),
            Route("/video/{row:number}", video),
            *(Route(f"/static/{name}", page(TEMPLATES / name)) for name in SHARED),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[Middleware(_Headers), Middleware(_CutOff), Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={
            UserError: refused,
            NotReadyError: unavailable,
            BusyError: unavailable,
            HTTPException: http_error,
            Exception: failed,
        },
    )


def _known(service: Service, row: int) -> Any:
    """The video of a row that is in the gallery, else status 404."""
    try:
        return service.searcher.gallery.video(row)
    except UserError as error:
        raise HTTPException(404, str(error)) from error


def _row(text: str) -> int:
    if not _is_number(text):
        raise UserError("row is the number of a video, as in the results of a search")
    return int(text)


def _number(request: Request) -> int:
    text = request.query_params.get("k", "10")
    if not (_is_number(text) and 1 <= int(text) <= MAX_RESULTS):
        raise UserError(f"k is the number of results, from 1 to {MAX_RESULTS}")
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 12
