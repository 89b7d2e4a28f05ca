"""Bodies of inference requests and answers over HTTP: JSON, with Triton's binary data behind it."""

from __future__ import annotations

import gzip
import re
import zlib
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from laxity.gateway.catalog import INPUT
from laxity.gateway.errors import GatewayError, Invalid
from laxity.gateway.gateway import REQUEST_ID, Answer, RequestedOutput
from laxity.gateway.json_tensors import from_json, to_json
from laxity.gateway.options import refuse_unsupported
from laxity.gateway.tensors import Parameters, Tensor, check_elements, from_binary, to_binary

HEADER_LENGTH: Final = "inference-header-content-length"
"""The header that says how many bytes of a body are JSON."""
MOST_JSON: Final = 16 * 1024 * 1024
"""Bytes of a body that may be JSON: while it is read, nothing else is done."""
_NUMBER: Final = re.compile(r"\d{1,18}", re.ASCII)
_BINARY_SIZE: Final = "binary_data_size"


class _Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] | None = None
    data: msgspec.Raw = msgspec.Raw()  # as it stands in the body; its type depends on the datatype


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] | None = None


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: str = ""
    parameters: dict[str, Any] | None = None
    outputs: list[_Output] | None = None


_DECODER: Final = msgspec.json.Decoder(_Request)


@dataclass(slots=True)
class Body:
    """A request's body."""

    id: str
    parameters: Parameters
    inputs: list[Tensor]
    outputs: list[RequestedOutput]


# ---- requests -----------------------------------------------------------------------------------


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """The body of a request with a Content-Encoding, no larger than ``limit``."""
    if encoding not in ("gzip", "deflate"):
        raise GatewayError(415, f"the Content-Encoding {encoding!r} is not supported; known are gzip and deflate")
    reader = zlib.decompressobj(31 if encoding == "gzip" else 15)
    try:
        content = reader.decompress(body, limit + 1)
    except zlib.error as error:
        raise Invalid(f"the body is no {encoding}: {error}") from None
    if len(content) > limit:
        raise too_large(limit)
    if not reader.eof or reader.unused_data:
        raise Invalid(f"the body is no {encoding}: it ends too early, or something follows it")
    return content


def too_large(limit: int) -> GatewayError:
    return GatewayError(
        413, f"the body is larger than the {limit} bytes that are taken here (--max-body, for inference)"
    )


def read_body(body: bytes, header_length: str | None) -> Body:
    """What a request's body says. ``header_length`` is the header :data:`HEADER_LENGTH`, where there is one."""
    length = len(body)
    if header_length is not None:
        if not _NUMBER.fullmatch(header_length) or int(header_length) > length:
            raise Invalid(f"the header {HEADER_LENGTH} must be a number of bytes of the body, which has {length}")
        length = int(header_length)
        if length == 0:  # the whole body is the only input's only element
            return Body("", {}, [Tensor(INPUT, "BYTES", [1], [body])], [])
    if length > MOST_JSON:
        raise GatewayError(
            413, f"the body has {length} bytes of JSON, at most {MOST_JSON} are allowed; send tensors as binary data"
        )
    view = memoryview(body)
    try:
        request = _DECODER.decode(view[:length])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise Invalid(f"the body is no inference request: {error}") from None
    check_elements(request.inputs)
    at = length
    inputs = []
    for each in request.inputs:
        parameters = each.parameters or {}
        refuse_unsupported(parameters)
        size = parameters.pop(_BINARY_SIZE, None)
        if size is None:
            if not each.data:
                raise Invalid(f"input {each.name!r} has neither 'data' nor the parameter {_BINARY_SIZE}")
            inputs.append(from_json(each.name, each.datatype, each.shape, each.data, parameters))
            continue
        if each.data:
            raise Invalid(f"input {each.name!r} has both 'data' and the parameter {_BINARY_SIZE}")
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(body) - at:
            raise Invalid(
                f"input {each.name!r}: {_BINARY_SIZE} is {size!r}, but {len(body) - at} bytes are left of the body"
            )
        inputs.append(from_binary(each.name, each.datatype, each.shape, view[at : at + size], parameters))
        at += size
    if at < len(body):
        raise Invalid(
            f"{len(body) - at} bytes of the body belong to no input; each says how many are its own: {_BINARY_SIZE}"
        )
    outputs = [RequestedOutput(each.name, each.parameters or {}) for each in request.outputs or []]
    return Body(request.id, request.parameters or {}, inputs, outputs)


# ---- answers ------------------------------------------------------------------------------------


def write_body(answer: Answer, request: Body) -> tuple[bytes, int | None]:
    """The body of an answer, and how many bytes of it are JSON (None: all)."""
    default = request.parameters.get("binary_data_output") is True
    wanted = {output.name: output.parameters.get("binary_data", default) is True for output in request.outputs}
    outputs = []
    parts: list[bytes] = []
    for tensor in answer.outputs:
        parameters = dict(tensor.parameters)
        output: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if wanted.get(tensor.name, default):
            parts.append(to_binary(tensor))
            parameters[_BINARY_SIZE] = len(parts[-1])
        else:
            output["data"] = to_json(tensor)
        if parameters:
            output["parameters"] = parameters
        outputs.append(output)
    head: dict[str, Any] = {"model_name": answer.model, "model_version": answer.version}
    if answer.id:
        head["id"] = answer.id
    head["parameters"] = {REQUEST_ID: answer.request_id}
    head["outputs"] = outputs
    encoded = msgspec.json.encode(head)
    return b"".join([encoded, *parts]), len(encoded) if parts else None


def compress(body: bytes, accepted: str) -> tuple[bytes, str]:
    """The body, and its Content-Encoding ('': none), as the header Accept-Encoding of the request wishes."""
    wishes = {}
    for part in accepted.lower().split(","):
        name, _, quality = part.replace(" ", "").partition(";")
        wishes[name] = quality not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    if wishes.get("gzip"):
        return gzip.compress(body, 1, mtime=0), "gzip"
    if wishes.get("deflate"):
        return zlib.compress(body, 1), "deflate"
    return body, ""
