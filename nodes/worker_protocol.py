"""Messages between an agent and one of its worker processes, over a ZeroMQ PAIR on a local socket.

As on the wire (:mod:`laxity.protocol`): the first frame is a MessagePack header ``[kind, field, ...]``, the
frames behind it carry the payloads' parts as :func:`laxity.payload.pack` lays them, in the order of the
header's nodes. The agent passes the frames of a GRANT and of a DONE through as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Union

import msgspec

from laxity.node import Node
from laxity.protocol import Failure, Message

# ---- agent to worker -------------------------------------------------------------------


class Load(Message, tag=1):
    """Load, warm up and profile a stage's model, known as ``key`` from now on. ``spec`` is a PipelineSpec
    in JSON."""

    key: str
    stage: str
    spec: bytes
    device_type: str


class Unload(Message, tag=2):
    """Let go of a model. Nothing is answered."""

    key: str


class Infer(Message, tag=3):
    """Run a batch: for each task one node for each of the stage's inputs, in the spec's order."""

    batch: int
    key: str
    tasks: list[list[Node]]


class Stop(Message, tag=4):
    """Unload everything and exit with status 0."""


# ---- worker to agent -------------------------------------------------------------------


class Started(Message, tag=10):
    """The worker is there and waits for work."""

    pid: int


class Progress(Message, tag=11):
    """What loading is at, for people: ``profiling batch 4``."""

    key: str
    text: str


class Loaded(Message, tag=12):
    """The model can run. ``profile`` has (batch size, seconds) for what was measured or stated in the spec;
    ``seconds`` is what loading and profiling took."""

    key: str
    profile: list[tuple[int, float]]
    seconds: float


class LoadFailed(Message, tag=13):
    """The model cannot be loaded; ``detail`` says why and what to do. The worker goes on with its others."""

    key: str
    detail: str


class Finished(Message, tag=14):
    """How a batch ended, in DONE's terms: with ``code`` 'ok' there is one result a task (None at the indexes
    of ``failures``), with 'model_error' or 'unknown_model' none, and ``detail`` says what happened."""

    batch: int
    code: str
    execution_us: int
    results: list[Node] = msgspec.field(default_factory=list)
    failures: list[Failure] = msgspec.field(default_factory=list)
    detail: str = ""


ToWorker = Union[Load, Unload, Infer, Stop]  # noqa: UP007
FromWorker = Union[Started, Progress, Loaded, LoadFailed, Finished]  # noqa: UP007

encode: Final[Callable[[Any], bytes]] = msgspec.msgpack.Encoder().encode
decode_to_worker: Final[Callable[[Any], ToWorker]] = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker: Final[Callable[[Any], FromWorker]] = msgspec.msgpack.Decoder(FromWorker).decode
