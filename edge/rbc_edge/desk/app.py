"""The routes of the review page: they read requests, ask the desk, and write answers."""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import lru_cache
from importlib.resources import files
from math import isfinite
from typing import Any, Final, TypeVar

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from rbc_edge.desk.review import Desk, picture
from rbc_edge.errors import ImageError, RbcEdgeError, UsageError, machine_trouble
from rbc_edge.store.corrections import Box, Kind
from rbc_edge.store.rows import FieldRow

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_FILES: Final = {
    "index.html": "text/html",
    "review.js": "text/javascript",
    "login.js": "text/javascript",
    "review.css": "text/css",
}
_MAX_NAME, _MAX_WHO, _MAX_REASON = 1000, 60, 300
_PICTURES_KEPT: Final = 6


class Review:
    """The application of a desk. It has a thread for the ledger, one for pictures and one for tables."""

    def __init__(self, desk: Desk, *, who: str = "", read_only: bool = False) -> None:
        self._desk, self._who, self._read_only = desk, who, read_only
        self._ledger, self._pictures, self._tables = (
            ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("ledger", "pictures", "tables")
        )
        self._ends = threading.Event()
        self._picture = lru_cache(_PICTURES_KEPT)(picture)
        folder = files("rbc_edge.desk") / "page"
        self._files = {name: (folder / name).read_bytes() for name in _FILES}

    def app(self) -> Starlette:
        """Returns the application, without its guard."""
        routes = [
            Route("/", self._index),
            Route("/static/{name}", self._static),
            Route("/api/slides", self._slides),
            Route("/api/fields", self._fields),
            Route("/api/field", self._field),
            Route("/picture", self._shown),
            Route("/api/correct", self._correct, methods=["POST"]),
            Route("/api/undo", self._undo, methods=["POST"]),
            Route("/api/exclude", self._exclude, methods=["POST"]),
        ]
        handlers: Any = {RbcEdgeError: _told, ClientDisconnect: _told, Exception: _told}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._life)

    @asynccontextmanager
    async def _life(self, _: Starlette) -> AsyncIterator[None]:
        self._later()
        yield
        self._ends.set()
        await self._at(self._ledger, self._desk.close)
        await self._at(self._tables, self._write_tables)  # once more
        for each in (self._ledger, self._pictures, self._tables):
            each.shutdown()

    async def _at(self, where: ThreadPoolExecutor, do: Callable[..., _T], *given: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(where, do, *given)

    def _later(self) -> None:
        """Has the tables written, as soon as no other process does."""
        self._tables.submit(self._write_tables)

    def _write_tables(self) -> None:
        try:
            # Each call waits a second for the other writer. At the end, the next run writes them.
            while not self._read_only and not self._desk.write_tables() and not self._ends.is_set():
                pass
        except RbcEdgeError as error:
            log.warning("%s; the corrections are kept, and the next run writes the tables", error)

    # -- reading ----------------------------------------------------------------------------------------

    async def _index(self, _: Request) -> Response:
        return Response(self._files["index.html"], media_type="text/html")

    async def _static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _FILES:
            return PlainTextResponse("no such file\n", 404)
        return Response(self._files[name], media_type=_FILES[name])

    async def _slides(self, _: Request) -> Response:
        found = await self._at(self._ledger, self._desk.slides)
        return JSONResponse(found | {"who": self._who, "read_only": self._read_only})

    async def _fields(self, request: Request) -> Response:
        return JSONResponse(await self._at(self._ledger, self._desk.fields, _asked(request, "slide")))

    async def _field(self, request: Request) -> Response:
        asked = _asked(request, "slide"), _asked(request, "fov")
        return JSONResponse(await self._at(self._ledger, self._desk.field, *asked))

    async def _shown(self, request: Request) -> Response:
        asked = _asked(request, "slide"), _asked(request, "fov")
        # What lies on the disk is opened where the ledger says, never where a request says.
        row: FieldRow = await self._at(self._ledger, self._desk.row, *asked)
        file = row.path, row.page, row.slide_id, row.fov
        jpeg = await self._at(self._pictures, self._picture, *file, row.sha256)
        return Response(jpeg, media_type="image/jpeg")

    # -- writing ----------------------------------------------------------------------------------------

    async def _correct(self, request: Request) -> Response:
        of = await _body(request)
        kind, what = _word(of, "kind", 20), _word(of, "what", _MAX_WHO)
        if kind not in list(Kind):
            raise UsageError(f"kind {kind!r} is none of {', '.join(Kind)}")
        box, place = _box(of.get("box")), (_word(of, "slide"), _word(of, "fov"), _word(of, "sha256"))
        return await self._changed(self._desk.correct, *place, Kind(kind), what, box, self._person(of))

    async def _undo(self, request: Request) -> Response:
        of = await _body(request)
        key = of.get("key")
        if type(key) is not int or not 0 < key < 2**62:
            raise UsageError("key is no number")
        return await self._changed(
            self._desk.undo, _word(of, "slide"), _word(of, "fov"), key, self._person(of)
        )

    async def _exclude(self, request: Request) -> Response:
        of = await _body(request)
        reason = None if of.get("reason") is None else _word(of, "reason", _MAX_REASON)
        place = _word(of, "slide"), _word(of, "fov"), _word(of, "sha256")
        return await self._changed(self._desk.exclude, *place, reason)

    async def _changed(self, do: Callable[..., dict[str, Any]], *given: Any) -> Response:
        now = await self._at(self._ledger, do, *given)
        self._later()
        return JSONResponse(now)

    def _person(self, of: dict[str, Any]) -> str:
        return _word(of, "who", _MAX_WHO).strip() or self._who


async def _body(request: Request) -> dict[str, Any]:
    try:
        of = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise UsageError("the request is no JSON") from error
    if not isinstance(of, dict):
        raise UsageError("the request is no JSON object")
    return of


def _asked(request: Request, name: str) -> str:
    return _word(dict(request.query_params), name)


def _word(of: dict[str, Any], name: str, longest: int = _MAX_NAME) -> str:
    """Returns a text of a request: not too long, and on one line."""
    value = of.get(name, "")
    if not isinstance(value, str) or len(value) > longest:
        raise UsageError(f"{name} is no text of at most {longest} characters")
    if longest != _MAX_NAME and not value.isprintable():
        raise UsageError(f"{name} has characters that cannot be shown")
    return value


def _box(value: object) -> Box | None:
    if value is None:
        return None
    numbers = [v for v in value if type(v) in (int, float)] if isinstance(value, list) else []
    if not isinstance(value, list) or not len(numbers) == len(value) == 4 or not all(map(_is_pixel, numbers)):
        raise UsageError("box is not four numbers")
    x0, y0, x1, y1 = map(float, numbers)
    return x0, y0, x1, y1


def _is_pixel(value: float) -> bool:
    return -1e9 < value < 1e9 and isfinite(value)


async def _told(_: Request, error: Exception) -> Response:
    """Returns an error in words. What a user cannot cause stays in the log."""
    if isinstance(error, ClientDisconnect):  # or the guard has cut it off
        return PlainTextResponse("too much at once\n", 413)
    if isinstance(error, ImageError):
        return _error(410 if error.reason == "vanished" else 422, error)
    if isinstance(error, UsageError):
        return _error(409, error)
    if isinstance(error, RbcEdgeError):
        return _error(503, error)
    if trouble := machine_trouble(error):
        return JSONResponse({"error": trouble, "advice": "try again"}, 503)
    log.error("a request failed: %s: %s", type(error).__name__, error)
    log.debug("the request", exc_info=error)
    return JSONResponse({"error": "this is a bug: the log of rbc-edge review says more", "advice": ""}, 500)


def _error(status: int, error: RbcEdgeError) -> Response:
    return JSONResponse({"error": error.message, "advice": error.advice}, status)
