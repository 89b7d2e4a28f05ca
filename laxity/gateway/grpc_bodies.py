"""Inference requests and answers as gRPC's messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from laxity.gateway.errors import Invalid
from laxity.gateway.gateway import REQUEST_ID, Answer, Call, RequestedOutput
from laxity.gateway.grpc_messages import message
from laxity.gateway.options import read_options, refuse_unsupported
from laxity.gateway.tensors import DTYPES, Parameters, Tensor, check_elements, count_of, from_binary, shaped, to_binary

InferRequest: Final = message("ModelInferRequest")
InferResponse: Final = message("ModelInferResponse")
_CONTENTS: Final = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Where a datatype's elements lie, unless they are raw."""


def read_call(request: Any, headers: Mapping[str, str], remaining: float | None, arrived: float) -> Call:
    """What a ModelInferRequest says, with the metadata that came along and what is left of the RPC's deadline."""
    parameters = read_parameters(request.parameters)
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise Invalid(f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs")
    check_elements(request.inputs)
    inputs = []
    for index, each in enumerate(request.inputs):
        own = read_parameters(each.parameters)
        refuse_unsupported(own)
        if not raw:
            inputs.append(_typed(each, own))
        elif each.HasField("contents"):
            raise Invalid(f"input {each.name!r} has contents beside raw_input_contents; send one of them")
        else:
            inputs.append(from_binary(each.name, each.datatype, each.shape, raw[index], own))
    outputs = [RequestedOutput(each.name, read_parameters(each.parameters)) for each in request.outputs]
    options = read_options(headers, parameters, remaining)
    return Call(request.model_name, request.model_version, request.id, parameters, inputs, outputs, options, arrived)


def write_answer(answer: Answer) -> Any:
    """A ModelInferResponse."""
    response = InferResponse(model_name=answer.model, model_version=answer.version, id=answer.id)
    response.parameters[REQUEST_ID].string_param = answer.request_id
    for tensor in answer.outputs:
        output = response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        write_parameters(output.parameters, tensor.parameters)
        response.raw_output_contents.append(to_binary(tensor))
    return response


def read_parameters(fields: Any) -> Parameters:
    """A dict of a map of InferParameters."""
    found = {}
    for name, parameter in fields.items():
        kind = parameter.WhichOneof("parameter_choice")
        found[name] = None if kind is None else getattr(parameter, kind)
    return found


def write_parameters(fields: Any, parameters: Parameters) -> None:
    """Put texts, numbers and truth values into a map of InferParameters."""
    for name, value in parameters.items():
        if isinstance(value, bool):
            fields[name].bool_param = value
        elif isinstance(value, float | int):
            fields[name].double_param = value
        else:
            fields[name].string_param = str(value)


def _typed(each: Any, parameters: Parameters) -> Tensor:
    name, datatype, shape = each.name, each.datatype, list(each.shape)
    count = count_of(name, datatype, shape)
    field = _CONTENTS.get(datatype)
    if field is None:
        raise Invalid(f"input {name!r}: {datatype} can only be sent in raw_input_contents")
    others = [kind.name for kind, _ in each.contents.ListFields() if kind.name != field]
    if others:
        raise Invalid(f"input {name!r}: {datatype} belongs into {field}, not into {others[0]}")
    elements = getattr(each.contents, field)
    if len(elements) != count:
        raise Invalid(f"input {name!r}: its shape has {count} elements; {field} has {len(elements)}")
    if datatype == "BYTES":
        return Tensor(name, datatype, shape, list(elements), parameters)
    try:
        array = np.array(elements, DTYPES[datatype]) if count else np.zeros(0, DTYPES[datatype])
    except OverflowError as error:
        raise Invalid(f"input {name!r}: {error}") from None
    return Tensor(name, datatype, shape, shaped(name, array, shape), parameters)
