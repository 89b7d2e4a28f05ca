"""What the process that speaks HTTP for another one serves: metrics, health and traces."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp

from cluster.observe.prometheus import exposition
from cluster.observe.source import Source
from cluster.observe.trace import TraceRecord
from cluster.observe.trace_json import trace_to_json
from laxity.http_access import Group, HttpAccess
from laxity.http_guard import Guard

T = TypeVar("T")

PAGE: Final = 500
"""Traces that are asked for at a time."""
MOST_TRACES: Final = 1000
"""Traces in one answer at most."""
MOST_NAME: Final = 1024
"""Bytes of a request's id; none is nearly so long."""
COMPRESSED_FROM: Final = 4096
"""Bytes from which on metrics are compressed where the client takes that."""


def exporter_app(source: Source, access: HttpAccess, home: ASGIApp | None = None) -> Starlette:
    """``home`` serves what is not served here, to whom it likes."""
    handlers = _Handlers(source)
    routes: list[BaseRoute] = [
        Route("/metrics", handlers.metrics),
        Route("/v2/health/live", handlers.live),
        Route("/v2/health/ready", handlers.ready),
        Route("/traces", handlers.traces),
        Route("/traces/{request:path}", handlers.trace),
    ]
    if home is not None:
        routes.append(Mount("/", home))
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, access=access, group_of=_group_of)],
        exception_handlers={HTTPException: _refusal, Exception: _failure},
    )


def _group_of(path: str) -> Group | None:
    if path == "/traces" or path.startswith("/traces/"):
        return "traces"
    if path == "/metrics":
        return "metrics"
    return "health" if path.startswith("/v2/") else None


class _Handlers:
    """Each is called in a thread of a pool: asking the process may take its time."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def metrics(self, request: Request) -> Response:
        body, content_type = exposition(_asked(self._source.figures), request.headers.get("accept", ""))
        headers = {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}
        if len(body) >= COMPRESSED_FROM and "gzip" in request.headers.get("accept-encoding", ""):
            headers["Content-Encoding"] = "gzip"
            body = gzip.compress(body, 1)
        return Response(body, headers=headers)

    def live(self, _request: Request) -> Response:
        try:
            self._source.figures()
        except TimeoutError as error:
            return JSONResponse({"live": False, "why": str(error)}, 503)
        except RuntimeError:
            pass  # it is ending, and says so
        return JSONResponse({"live": True})

    def ready(self, _request: Request) -> Response:
        try:
            why = self._source.figures().ready
        except (RuntimeError, TimeoutError) as error:
            why = str(error)
        return JSONResponse({"ready": False, "why": why}, 503) if why else JSONResponse({"ready": True})

    def trace(self, request: Request) -> Response:
        name = request.path_params["request"]
        if len(name.encode()) > MOST_NAME:
            raise HTTPException(404, f"no request has an id of more than {MOST_NAME} bytes")
        found = _asked(lambda: self._source.trace(name))
        if found is None:
            raise HTTPException(404, f"no trace of {name!r} is kept here; it was not sampled, or too long ago")
        return JSONResponse(trace_to_json(found))

    def traces(self, request: Request) -> Response:
        wanted = request.query_params
        try:
            limit = min(max(int(wanted.get("limit", "100")), 0), MOST_TRACES)
        except ValueError:
            raise HTTPException(400, f"limit={wanted['limit']!r} is no number") from None
        outcome, pipeline = wanted.get("outcome", ""), wanted.get("pipeline", "")
        found: list[dict[str, Any]] = []
        for trace in _newest_first(self._source):
            if len(found) == limit:
                break
            if (not outcome or trace.outcome == outcome) and (not pipeline or trace.pipeline == pipeline):
                found.append(trace_to_json(trace))
        return JSONResponse({"traces": found})


def _newest_first(source: Source) -> Iterator[TraceRecord]:
    """All traces that are kept, asked for a page at a time."""
    end, page = _asked(partial(source.traces, -PAGE, PAGE))
    yield from reversed(page)
    end -= PAGE
    while page and end > 0:
        begin = max(end - PAGE, 0)
        last, page = _asked(partial(source.traces, begin, end - begin))
        # Where the oldest are no longer there, younger ones come in their place, which there were already.
        page = page[: max(len(page) - max(last - end, 0), 0)]
        yield from reversed(page)
        end = begin


def _asked(question: Callable[[], T]) -> T:
    """What the process answers; 503 where it does not."""
    try:
        return question()
    except (RuntimeError, TimeoutError) as error:
        raise HTTPException(503, str(error)) from error


def _refusal(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


def _failure(_request: Request, _error: Exception) -> Response:
    return JSONResponse({"error": "internal error; the log has more"}, 500)
