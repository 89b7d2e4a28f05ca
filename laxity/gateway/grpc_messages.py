"""The messages of the Open Inference Protocol's gRPC service, as classes of a descriptor pool of their own.

Names and numbers are the published interface. A pool of their own, because others of the same names (tritonclient's)
may be in the process. They are made here, of a table, rather than by a compiler: there are few of them.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE: Final = "inference"
SERVICE: Final = "inference.GRPCInferenceService"

_MESSAGES: Final = """
ServerLiveRequest
ServerLiveResponse: bool live = 1
ServerReadyRequest
ServerReadyResponse: bool ready = 1
ModelReadyRequest: string name = 1, string version = 2
ModelReadyResponse: bool ready = 1
ServerMetadataRequest
ServerMetadataResponse: string name = 1, string version = 2, string* extensions = 3
ModelMetadataRequest: string name = 1, string version = 2
ModelMetadataResponse.TensorMetadata: string name = 1, string datatype = 2, int64* shape = 3
ModelMetadataResponse: string name = 1, string* versions = 2, string platform = 3,
  ModelMetadataResponse.TensorMetadata* inputs = 4, ModelMetadataResponse.TensorMetadata* outputs = 5
InferParameter: bool bool_param = 1, int64 int64_param = 2, string string_param = 3, double double_param = 4,
  uint64 uint64_param = 5
InferTensorContents: bool* bool_contents = 1, int32* int_contents = 2, int64* int64_contents = 3,
  uint32* uint_contents = 4, uint64* uint64_contents = 5, float* fp32_contents = 6, double* fp64_contents = 7,
  bytes* bytes_contents = 8
ModelInferRequest.InferInputTensor: string name = 1, string datatype = 2, int64* shape = 3,
  map parameters = 4, InferTensorContents contents = 5
ModelInferRequest.InferRequestedOutputTensor: string name = 1, map parameters = 2
ModelInferRequest: string model_name = 1, string model_version = 2, string id = 3, map parameters = 4,
  ModelInferRequest.InferInputTensor* inputs = 5, ModelInferRequest.InferRequestedOutputTensor* outputs = 6,
  bytes* raw_input_contents = 7
ModelInferResponse.InferOutputTensor: string name = 1, string datatype = 2, int64* shape = 3,
  map parameters = 4, InferTensorContents contents = 5
ModelInferResponse: string model_name = 1, string model_version = 2, string id = 3, map parameters = 4,
  ModelInferResponse.InferOutputTensor* outputs = 5, bytes* raw_output_contents = 6
ModelStreamInferResponse: string error_message = 1, ModelInferResponse infer_response = 2
ModelConfigRequest: string name = 1, string version = 2
ModelInput: string name = 1, DataType data_type = 2, int64* dims = 4
ModelOutput: string name = 1, DataType data_type = 2, int64* dims = 3
ModelConfig: string name = 1, string platform = 2, int32 max_batch_size = 4, ModelInput* input = 5,
  ModelOutput* output = 6, string backend = 17
ModelConfigResponse: ModelConfig config = 1
RepositoryIndexRequest: string repository_name = 1, bool ready = 2
RepositoryIndexResponse.ModelIndex: string name = 1, string version = 2, string state = 3, string reason = 4
RepositoryIndexResponse: RepositoryIndexResponse.ModelIndex* models = 1
"""
"""One message a line, its fields as ``type name = number``; ``*`` stands for repeated, ``map`` for one from texts to
InferParameters. A message's own messages come before it."""

_ONE_OF: Final = {"InferParameter": "parameter_choice"}
"""Messages of which but one field is set."""
_DATA_TYPES: Final = {"TYPE_INVALID": 0, "TYPE_STRING": 13}

_Field = descriptor_pb2.FieldDescriptorProto


def _make_file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="laxity/open_inference.proto", package=PACKAGE, syntax="proto3")
    data_type = file.enum_type.add(name="DataType")
    for name, number in _DATA_TYPES.items():
        data_type.value.add(name=name, number=number)
    made: dict[str, Any] = {}
    inner: dict[str, list[Any]] = {}
    for line in _MESSAGES.strip().replace(",\n  ", ", ").splitlines():
        name, _, fields = line.partition(": ")
        outer, _, own = name.rpartition(".")
        message = descriptor_pb2.DescriptorProto(name=own)
        inner.setdefault(outer, []).append(message) if outer else made.__setitem__(name, message)
        if name in _ONE_OF:
            message.oneof_decl.add(name=_ONE_OF[name])
        for text in filter(None, fields.split(", ")):
            _add_field(message, name, text)
    for name, message in made.items():
        message.nested_type.extend(inner.get(name, ()))
        file.message_type.append(message)
    return file


def _add_field(message: Any, of: str, text: str) -> None:
    kind, name, _, number = text.split()
    field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if kind.endswith("*"):
        kind = kind[:-1]
        field.label = _Field.LABEL_REPEATED
    if of in _ONE_OF:
        field.oneof_index = 0
    if kind == "map":
        entry = message.nested_type.add(name="ParametersEntry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
        entry.field.add(
            name="value",
            number=2,
            type=_Field.TYPE_MESSAGE,
            type_name=f".{PACKAGE}.InferParameter",
            label=_Field.LABEL_OPTIONAL,
        )
        kind = f"{of}.ParametersEntry"
        field.label = _Field.LABEL_REPEATED
    if kind[0].islower():
        field.type = getattr(_Field, f"TYPE_{kind.upper()}")
    else:
        field.type = _Field.TYPE_ENUM if kind == "DataType" else _Field.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{kind}"


_POOL: Final = descriptor_pool.DescriptorPool()
_POOL.Add(_make_file())


def message(name: str) -> Any:
    """The class of a message, such as ``"ModelInferRequest"``."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))
