"""The protocol over gRPC."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from laxity.gateway.catalog import EXTENSIONS
from laxity.gateway.errors import GatewayError, Invalid
from laxity.gateway.gateway import REQUEST_ID, Call, Gateway
from laxity.gateway.grpc_bodies import InferRequest, InferResponse, read_call, write_answer, write_parameters
from laxity.gateway.grpc_messages import SERVICE, message
from laxity.http_access import Group, HttpAccess
from laxity.version import __version__

log = logging.getLogger("laxity.gateway")

MOST_IN_STREAM: Final = 256
"""Requests of one stream that may be under way; the next one is read when the oldest has been answered."""
UNSUPPORTED: Final = {
    "ModelStatistics": "see /metrics",
    "RepositoryModelLoad": "see `laxity pipeline apply`",
    "RepositoryModelUnload": "see `laxity pipeline delete`",
    "TraceSetting": "give requests a traceparent, and see `laxity trace`",
    "LogSettings": "see the options of `laxity gateway run`",
    **{
        f"{kind}SharedMemory{method}": "send tensors in the request"
        for kind in ("System", "Cuda")
        for method in ("Status", "Register", "Unregister")
    },
}
"""Methods of Triton's that there are not, and what there is instead."""
_STRING: Final = 13
"""TYPE_STRING of the enumeration DataType."""
_StreamResponse: Final = message("ModelStreamInferResponse")


class GrpcService:
    """The service's methods; :attr:`handler` is what a server takes. A request must be there ``body_timeout`` seconds
    after it was let in."""

    def __init__(self, gateway: Gateway, access: HttpAccess, body_timeout: float) -> None:
        self._gateway = gateway
        self._access = access
        self._body_timeout = body_timeout
        plain: dict[str, Callable[[Any], Any]] = {
            "ServerLive": lambda _: message("ServerLiveResponse")(live=True),
            "ServerReady": lambda _: message("ServerReadyResponse")(ready=not gateway.unready),
            "ServerMetadata": lambda _: message("ServerMetadataResponse")(
                name="laxity", version=__version__, extensions=EXTENSIONS
            ),
            "ModelReady": self._model_ready,
            "ModelMetadata": self._metadata,
            "ModelConfig": self._config,
            "RepositoryIndex": self._index,
        }
        # Messages are decoded by the handlers: what cannot be is the client's fault, not an internal error.
        methods = {name: self._unary("health", _answering(name, function)) for name, function in plain.items()}
        methods.update({name: self._unary("health", _unsupported(name, why)) for name, why in UNSUPPORTED.items()})
        methods["ModelInfer"] = self._unary("inference", self._infer)
        methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._stream)
        self.handler: Any = grpc.method_handlers_generic_handler(SERVICE, methods)

    # ---- who is let in --------------------------------------------------------------------------

    def _unary(self, group: Group, function: Callable[[bytes, Any], Coroutine[Any, Any, bytes]]) -> Any:
        """A handler of one request and one answer. It is a stream's to gRPC, which would otherwise read a request
        before anything can be said of it, and wait for one without end."""

        async def handle(_requests: AsyncIterator[bytes], context: Any) -> bytes:
            await self._let_in(group, context)
            try:
                async with asyncio.timeout(self._body_timeout):
                    raw = await context.read()
            except TimeoutError:
                await _abort(context, GatewayError(408, f"the message was not there within {self._body_timeout:g} s"))
            if not isinstance(raw, bytes):  # the end of the stream
                await _abort(context, Invalid("there is no message"))
            return await function(raw, context)

        return grpc.stream_unary_rpc_method_handler(handle)

    async def _let_in(self, group: Group, context: Any) -> None:
        """End the call of who may not ask for what is in a group."""
        refusal = self._access.refusal(group, _metadata(context).get("authorization", ""), context.peer())
        if refusal is not None:
            await _abort(context, GatewayError(refusal.status, refusal.why))

    # ---- what there is --------------------------------------------------------------------------

    def _model_ready(self, request: Any) -> Any:
        _, why = self._gateway.model(request.name, request.version)
        return message("ModelReadyResponse")(ready=not (why or self._gateway.unready))

    def _metadata(self, request: Any) -> Any:
        model, _ = self._gateway.model(request.name, request.version)
        response = message("ModelMetadataResponse")(name=request.name, versions=[model.version], platform="laxity")
        for tensors, names in ((response.inputs, model.inputs), (response.outputs, model.outputs)):
            for name in names:
                tensors.add(name=name, datatype="BYTES", shape=[-1])
        return response

    def _config(self, request: Any) -> Any:
        model, _ = self._gateway.model(request.name, request.version)
        response = message("ModelConfigResponse")()
        config = response.config
        config.name, config.platform, config.backend = request.name, "laxity", "laxity"
        for tensors, names in ((config.input, model.inputs), (config.output, model.outputs)):
            for name in names:
                tensors.add(name=name, data_type=_STRING, dims=[-1])
        return response

    def _index(self, request: Any) -> Any:
        response = message("RepositoryIndexResponse")()
        for name, (model, why) in self._gateway.models().items():
            if not (why and request.ready):
                state = "UNAVAILABLE" if why else "READY"
                response.models.add(name=name, version=model.version, state=state, reason=why)
        return response

    # ---- inference --------------------------------------------------------------------------------

    async def _infer(self, raw: bytes, context: Any) -> bytes:
        try:
            request = _decode(InferRequest, raw)
            with self._gateway.admit(request.model_name, "grpc"):
                answer = await self._gateway.infer(_call(request, context))
                response: bytes = write_answer(answer).SerializeToString()
        except GatewayError as error:
            await _abort(context, error)
            raise  # which it has done
        context.set_trailing_metadata(((REQUEST_ID, answer.request_id),))
        return response

    async def _stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Answers each request once, in the requests' order."""
        await self._let_in("inference", context)
        waiting: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(MOST_IN_STREAM)

        async def read() -> None:
            try:
                async for raw in requests:
                    begun = asyncio.create_task(self._infer_in_stream(raw, context))
                    try:
                        await waiting.put(begun)
                    except asyncio.CancelledError:
                        begun.cancel()
                        raise
            finally:
                await waiting.put(None)

        reader = asyncio.create_task(read())
        task: asyncio.Task[bytes] | None = None
        try:
            while (task := await waiting.get()) is not None:
                yield await task
        finally:
            reader.cancel()
            for left in (task, *(waiting.get_nowait() for _ in range(waiting.qsize()))):
                if left is not None:
                    left.cancel()

    async def _infer_in_stream(self, raw: bytes, context: Any) -> bytes:
        request = InferRequest()
        try:
            request = _decode(InferRequest, raw)
            with self._gateway.admit(request.model_name, "grpc"):
                response = write_answer(await self._gateway.infer(_call(request, context)))
            response.parameters["triton_final_response"].bool_param = True
            answer = _StreamResponse(infer_response=response)
        except GatewayError as error:
            response = InferResponse(model_name=request.model_name, model_version=request.model_version, id=request.id)
            write_parameters(response.parameters, error.headers)
            answer = _StreamResponse(error_message=error.message, infer_response=response)
        except Exception:
            log.exception("a request of a stream failed")
            answer = _StreamResponse(error_message="the gateway failed; its log says why")
        encoded: bytes = answer.SerializeToString()
        return encoded


def _metadata(context: Any) -> dict[str, str]:
    return {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}


def _call(request: Any, context: Any) -> Call:
    return read_call(request, _metadata(context), context.time_remaining(), asyncio.get_running_loop().time())


def _decode(kind: Any, raw: bytes) -> Any:
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise Invalid(f"the message is no {kind.DESCRIPTOR.name}: {error}") from None


async def _abort(context: Any, error: GatewayError) -> None:
    await context.abort(getattr(grpc.StatusCode, error.grpc_code), error.message, tuple(error.headers.items()))


def _answering(name: str, function: Callable[[Any], Any]) -> Callable[[bytes, Any], Coroutine[Any, Any, bytes]]:
    """A handler of what a function of the decoded request answers."""

    async def handle(raw: bytes, context: Any) -> bytes:
        try:
            encoded: bytes = function(_decode(message(f"{name}Request"), raw)).SerializeToString()
        except GatewayError as error:
            await _abort(context, error)
            raise
        return encoded

    return handle


def _unsupported(method: str, why: str) -> Callable[[bytes, Any], Coroutine[Any, Any, bytes]]:
    async def handle(_raw: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"Laxity's gateway does not support {method}: {why}")
        raise AssertionError("unreachable")

    return handle
