"""Messages between an agent and one of its worker processes, over a ZeroMQ PAIR on a local socket.

As on the wire (:mod:`laxity.protocol`): the first frame is a MessagePack header ``[kind, field, ...]``, the
frames behind it carry the payloads' parts as :func:`laxity.payload.pack` lays them, in the order of the
header's nodes. The agent passes the frames of a GRANT and of a DONE through as they are.

``earliest``, ``latest`` and ``at`` are seconds of CLOCK_MONOTONIC (``time.monotonic``), which all processes of a host
share. Batches and actions (``Load``, ``Unload``) are numbered by the agent, each kind by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Union

import msgspec

from laxity.node import Node
from laxity.protocol import Failure, Message

# ---- agent to worker -------------------------------------------------------------------


class Hold(Message, tag=1):
    """Bring a stage's model, known as ``key`` from now on, into host memory and onto the device, warm it up and profile
    it; it stays loaded. ``spec`` is a PipelineSpec in JSON. Where ``profile`` has (batch size, seconds) it is known
    already and nothing is measured. No batch may be under way."""

    key: str
    stage: str
    spec: bytes
    device_type: str
    profile: list[tuple[int, float]] = msgspec.field(default_factory=list)


class Release(Message, tag=2):
    """Forget a model entirely, on the device and in host memory. Nothing is answered."""

    key: str


class Load(Message, tag=3):
    """Page a held model in; answered by :class:`Acted`. It begins within the window or not at all."""

    action: int
    key: str
    earliest: float
    latest: float


class Unload(Message, tag=4):
    """Page a model out; its host copy stays. Answered by :class:`Acted`."""

    action: int
    key: str
    earliest: float
    latest: float


class Infer(Message, tag=5):
    """Run a batch: for each task one node for each of the stage's inputs, in the spec's order. Its execution begins
    within the window or not at all."""

    batch: int
    key: str
    earliest: float
    latest: float
    tasks: list[list[Node]]


class Drop(Message, tag=6):
    """Take back a batch that does not execute yet; answered by ``Finished`` with 'cancelled' if it was taken back."""

    batch: int


class Stop(Message, tag=7):
    """Release everything and exit with status 0."""


# ---- worker to agent -------------------------------------------------------------------


class Started(Message, tag=10):
    """The worker is there and waits for work."""

    pid: int


class Progress(Message, tag=11):
    """What a Hold is at, for people: ``profiling batch 4``."""

    key: str
    text: str


class Held(Message, tag=12):
    """The model is loaded and can run. ``profile`` has (batch size, seconds) for what was measured, told by Hold or
    stated in the spec; ``seconds`` is what all of it took, ``load_seconds`` what paging it in takes, ``memory_mb`` what
    it holds of the device's memory (0 where nobody knows)."""

    key: str
    profile: list[tuple[int, float]]
    seconds: float
    load_seconds: float
    memory_mb: float


class LoadFailed(Message, tag=13):
    """The model cannot be held; ``detail`` says why and what to do, ``code`` is 'out_of_memory' where that was why. The
    worker goes on with its others."""

    key: str
    detail: str
    code: str = "model_error"


class Acted(Message, tag=14):
    """How a Load or an Unload ended, with one of :data:`laxity.protocol.DONE_CODES`; ``took_us`` is what it took by
    itself, from ``at`` on (0 where it never began)."""

    action: int
    code: str
    took_us: int
    detail: str = ""
    at: float = 0.0


class Executing(Message, tag=15):
    """A batch's execution began at ``at``."""

    batch: int
    at: float


class Finished(Message, tag=16):
    """How a batch ended, with one of :data:`laxity.protocol.DONE_CODES`: with 'ok' there is one result a task (None at
    the indexes of ``failures``), otherwise none, and ``detail`` says what happened. ``execution_us`` is execution
    alone, ``input_us`` and ``output_us`` what was done for it before and after. ``copying``: its inputs are still under
    way, and keep the next ones waiting until :class:`CopiedIn` follows."""

    batch: int
    code: str
    execution_us: int
    results: list[Node] = msgspec.field(default_factory=list)
    failures: list[Failure] = msgspec.field(default_factory=list)
    detail: str = ""
    input_us: int = 0
    output_us: int = 0
    copying: bool = False


class CopiedIn(Message, tag=17):
    """What was still done for the inputs of a batch when it was answered has come to its end."""

    batch: int


ToWorker = Union[Hold, Release, Load, Unload, Infer, Drop, Stop]  # noqa: UP007
FromWorker = Union[Started, Progress, Held, LoadFailed, Acted, Executing, Finished, CopiedIn]  # noqa: UP007

encode: Final[Callable[[Any], bytes]] = msgspec.msgpack.Encoder().encode
decode_to_worker: Final[Callable[[Any], ToWorker]] = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker: Final[Callable[[Any], FromWorker]] = msgspec.msgpack.Decoder(FromWorker).decode
