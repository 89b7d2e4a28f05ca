"""The protocol over HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine
from typing import Any, Final

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from laxity.gateway.catalog import EXTENSIONS, Model
from laxity.gateway.errors import GatewayError
from laxity.gateway.gateway import REQUEST_ID, Answer, Call, Gateway
from laxity.gateway.http_bodies import (
    HEADER_LENGTH,
    Body,
    compress,
    decompress,
    read_body,
    too_large,
    write_body,
)
from laxity.gateway.options import read_options
from laxity.http_access import Group, HttpAccess
from laxity.http_guard import Guard
from laxity.version import __version__

log = logging.getLogger("laxity.gateway")

COMPRESSED_FROM: Final = 1024
"""Bytes from which on answers are compressed for those who ask for that."""
MOST_WISHES: Final = 4096
"""Bytes of a body that asks for anything but inference."""
_UNSUPPORTED: Final = {
    "systemsharedmemory": "shared memory; send tensors in the request",
    "cudasharedmemory": "shared memory; send tensors in the request",
    "trace": "trace settings; give requests a traceparent, and see `laxity trace`",
    "logging": "log settings; see the options of `laxity gateway run`",
    "repository": "loading and unloading; see `laxity pipeline apply` and `laxity pipeline delete`",
    "stats": "statistics; see /metrics",
}
"""Extensions of Triton's, by a part of their paths, and what there is instead."""


class HttpApp:
    """The ASGI application. Bodies may have ``max_body`` bytes, and must be there within ``body_timeout`` seconds."""

    def __init__(self, gateway: Gateway, access: HttpAccess, max_body: int, body_timeout: float) -> None:
        self._gateway = gateway
        self._max_body = max_body
        self._body_timeout = body_timeout
        of_model = [("", self._metadata), ("/ready", self._model_ready), ("/config", self._config)]
        prefixes = ["/v2/models/{model}", "/v2/models/{model}/versions/{version}"]
        self.app = Starlette(
            routes=[
                Route("/metrics", self._metrics),
                Route("/v2", self._server),
                Route("/v2/health/live", self._live),
                Route("/v2/health/ready", self._ready),
                Route("/v2/repository/index", self._index, methods=["POST"]),
                Route("/v2/models/stats", self._elsewhere),
                *(Route(prefix + path, endpoint) for prefix in prefixes for path, endpoint in of_model),
                *(Route(prefix + "/infer", self._infer, methods=["POST"]) for prefix in prefixes),
                Route("/v2/{path:path}", self._elsewhere, methods=["GET", "POST"]),
            ],
            middleware=[Middleware(Guard, access=access, group_of=_group_of)],
            exception_handlers={GatewayError: self._refused, HTTPException: _not_found, Exception: _failed},
        )

    # ---- what there is ------------------------------------------------------------------------

    async def _live(self, _request: Request) -> Response:
        return JSONResponse({"live": True})

    async def _ready(self, _request: Request) -> Response:
        why = self._gateway.unready
        return JSONResponse({"ready": False, "error": why} if why else {"ready": True}, 503 if why else 200)

    async def _server(self, _request: Request) -> Response:
        return JSONResponse({"name": "laxity", "version": __version__, "extensions": EXTENSIONS})

    async def _metadata(self, request: Request) -> Response:
        name, model, _ = self._model(request)
        return JSONResponse(
            {
                "name": name,
                "versions": [model.version],
                "platform": "laxity",
                "inputs": [{"name": each, "datatype": "BYTES", "shape": [-1]} for each in model.inputs],
                "outputs": [{"name": each, "datatype": "BYTES", "shape": [-1]} for each in model.outputs],
            }
        )

    async def _config(self, request: Request) -> Response:
        name, model, _ = self._model(request)
        return JSONResponse(
            {
                "name": name,
                "platform": "laxity",
                "backend": "laxity",
                "max_batch_size": 0,
                "input": [{"name": each, "data_type": "TYPE_STRING", "dims": [-1]} for each in model.inputs],
                "output": [{"name": each, "data_type": "TYPE_STRING", "dims": [-1]} for each in model.outputs],
            }
        )

    async def _model_ready(self, request: Request) -> Response:
        name, _, why = self._model(request)
        why = self._gateway.unready or why
        return JSONResponse(
            {"name": name, "ready": False, "error": why} if why else {"name": name, "ready": True}, 503 if why else 200
        )

    async def _index(self, request: Request) -> Response:
        body = await self._read(request, MOST_WISHES)
        try:
            wish = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            wish = None
        if not isinstance(wish, dict):
            raise GatewayError(400, 'the body must be empty or an object such as {"ready": true}')
        models = self._gateway.models().items()
        return JSONResponse(
            [
                {"name": name, "version": model.version, "state": "UNAVAILABLE" if why else "READY", "reason": why}
                for name, (model, why) in models
                if not (why and wish.get("ready") is True)
            ]
        )

    async def _metrics(self, _request: Request) -> Response:
        return Response(self._gateway.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def _elsewhere(self, request: Request) -> Response:
        for part in request.scope["path"].split("/"):
            if part in _UNSUPPORTED:
                raise GatewayError(400, f"Laxity's gateway does not support {_UNSUPPORTED[part]}")
        raise HTTPException(404)

    def _model(self, request: Request) -> tuple[str, Model, str]:
        name = request.path_params["model"]
        model, why = self._gateway.model(name, request.path_params.get("version", ""))
        return name, model, why

    # ---- inference ------------------------------------------------------------------------------

    async def _infer(self, request: Request) -> Response:
        arrived = asyncio.get_running_loop().time()
        model = request.path_params["model"]
        with self._gateway.admit(model, "http"):
            self._gateway.model(model, request.path_params.get("version", ""))
            body = read_body(await self._read(request, self._max_body), request.headers.get(HEADER_LENGTH))
            call = Call(
                model,
                request.path_params.get("version", ""),
                body.id,
                body.parameters,
                body.inputs,
                body.outputs,
                read_options(request.headers, body.parameters),
                arrived,
            )
            answer = await _unless_gone(request, self._gateway.infer(call))
            return await _respond(request, answer, body)

    async def _read(self, request: Request, most: int) -> bytes:
        """The body, decompressed, of so many bytes at most."""
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise too_large(most)
        chunks = []
        size = 0
        try:
            async with asyncio.timeout(self._body_timeout):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > most:
                        raise too_large(most)
                    chunks.append(chunk)
        except TimeoutError:
            raise GatewayError(408, f"the body was not there within {self._body_timeout:g} s") from None
        except ClientDisconnect:
            raise _gone() from None
        body = b"".join(chunks)
        encoding = request.headers.get("content-encoding", "identity").lower()
        if encoding == "identity":
            return body
        return await asyncio.to_thread(decompress, body, encoding, most)

    def _refused(self, _request: Request, error: Exception) -> Response:
        assert isinstance(error, GatewayError)
        headers = error.headers
        if self._gateway.draining or error.status in (408, 413):
            headers["connection"] = "close"
        return JSONResponse({"error": error.message, **error.fields}, error.status, headers)


def _group_of(path: str) -> Group:
    """What the protocol tells of the gateway and its models counts as their health."""
    if path == "/metrics":
        return "metrics"
    return "inference" if path.endswith("/infer") else "health"


async def _respond(request: Request, answer: Answer, body: Body) -> Response:
    content, length = write_body(answer, body)
    headers = {REQUEST_ID: answer.request_id}
    if length is not None:
        headers[HEADER_LENGTH] = str(length)
    accepted = request.headers.get("accept-encoding", "")
    if len(content) >= COMPRESSED_FROM and accepted:
        content, encoding = await asyncio.to_thread(compress, content, accepted)
        if encoding:
            headers["content-encoding"] = encoding
    return Response(content, 200, headers, "application/json" if length is None else "application/octet-stream")


async def _unless_gone(request: Request, coroutine: Coroutine[Any, Any, Answer]) -> Answer:
    """What the coroutine returns. It is cancelled when the client goes away."""
    work = asyncio.create_task(coroutine)
    watch = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise _gone()
    finally:
        watch.cancel()
        work.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _gone() -> GatewayError:
    return GatewayError(499, "the client went away", outcome="cancelled")


def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return JSONResponse({"error": f"there is nothing at {request.scope['path']}; see docs/gateway.md"}, 404)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def _failed(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.scope["path"], exc_info=error)
    return JSONResponse({"error": "the gateway failed; its log says why"}, 500)
