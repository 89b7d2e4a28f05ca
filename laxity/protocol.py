"""Wire protocol, version 1: every message between services, shards and agents.

A message is a ZeroMQ multipart message. Its first frame is the *header*, a MessagePack
array ``[kind, field, ...]`` with the fields of the class below in the order given there;
the frames behind it carry the payloads' parts (see :mod:`laxity.payload`). Fields at the
end that have a default may be left out, and unknown fields at the end are ignored.

Services and agents use DEALER sockets, shards bind one ROUTER for each of the two. All
times are microseconds. No wall-clock time is ever sent: a deadline is what remains of it,
and a stamp (``sent_us``, ``pulled_us``) means something to its sender's clock alone.
docs/protocol.md tells the whole story for people who write a client in another language.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar, Union

import msgspec

from laxity.node import Node
from laxity.outcomes import Outcome

VERSION: Final = 1
"""The protocol version that HELLO, READY and WELCOME carry; a shard refuses any other."""
MAX_NAME: Final = 200
"""The longest name (pipeline, stage, client, agent) in characters."""
MAX_HEADER: Final = 4 * 1024 * 1024
"""The longest header in bytes."""
MAX_SHARED: Final = 256
"""The most requests in one SUBMIT, and answers in one RESULT."""


class Message(msgspec.Struct, array_like=True):
    """Base of all headers."""


# ---- services to shards ---------------------------------------------------------------


class Hello(Message, tag=1):
    """HELLO, the first message of a connection. ``client`` names the service instance; with a
    request's ``id`` it is the key by which a shard knows a repeat, so it must be hard to guess
    and stay the same over reconnects."""

    version: int
    client: str
    software: str = ""


class Request(msgspec.Struct, array_like=True, gc=False):
    """One request inside a SUBMIT. ``budget_us`` is the remaining latency budget (None: the
    pipeline's SLO); ``timings`` asks for the stages' times in the answer."""

    id: int
    pipeline: str
    budget_us: int | None
    payload: Node
    priority: int = 0
    traceparent: str = ""
    timings: bool = False


class Submit(Message, tag=2):
    """SUBMIT: requests, their payload frames following in the same order. ``sent_us`` is the
    sender's monotonic clock: a connection's smallest (received - sent) is its zero, and what a
    message took beyond that is taken off its budgets."""

    sent_us: int
    requests: list[Request]


class Cancel(Message, tag=3):
    """CANCEL: the service no longer wants these. Each is answered ``cancelled`` unless it ended before."""

    ids: list[int]


# ---- both ways -----------------------------------------------------------------------


class Heartbeat(Message, tag=4):
    """HEARTBEAT: sent where nothing else was for an interval. Any message counts as one."""

    sent_us: int = 0


class Goodbye(Message, tag=5):
    """GOODBYE: the sender leaves, or will not talk to this peer. ``reason`` is for people;
    ``retry`` says whether to greet again (an unknown peer) or not (a wrong version)."""

    reason: str = ""
    retry: bool = False


# ---- shards to services and agents ---------------------------------------------------------


class Welcome(Message, tag=6):
    """WELCOME: the answer to HELLO and READY. A peer silent for ``heartbeat_us * 4`` is taken for gone.
    A shard sends it again, unasked, when what it says changes."""

    version: int
    shard: str
    heartbeat_us: int
    max_payload: int = 0
    """The largest payload of one request in bytes."""
    pipelines: list[tuple[str, int]] = []
    """To services: the pipelines served and their SLOs in µs. A service ends a request without an explicit
    budget by these when no answer comes; a name that is missing here may be submitted all the same."""
    shards: list[tuple[str, str]] = []
    """To services: the names of the cluster's shards and the addresses at which they serve services."""
    routes: list[tuple[str, list[tuple[int, float]]]] = []
    """To services: for each pipeline the shards that serve it, as (index into ``shards``, weight): the parts of the
    requests that they are to get are in proportion to the weights. Any shard takes a pipeline that is missing here."""
    revision: int = 0
    """To services: of the ``shards`` and ``routes`` that different shards tell, those of the highest revision hold."""
    unready: list[str] = []
    """To services: those of ``pipelines`` of which no device of this shard holds some stage at present. Their requests
    wait for one here; they are better submitted to another shard."""
    keys: list[list[str]] = []
    """To services: the CURVE public keys (Z85) of ``shards``, in the same order: several while one is replaced, none
    of a shard that serves in plain text; [] where no shard has any."""


class StageTiming(msgspec.Struct, array_like=True, gc=False):
    """How one stage went: waiting and execution in µs, the batch's size, the items (map stages)
    and what was left of the budget when the stage ended."""

    stage: str
    queued_us: int
    execution_us: int
    batch: int
    items: int
    remaining_us: int


class Answer(msgspec.Struct, array_like=True, gc=False):
    """One request's end. ``remaining_us`` is what was left of the budget (negative: late by);
    ``short_us`` by how much a dropped request was predicted to miss."""

    id: int
    outcome: Outcome
    payload: Node
    remaining_us: int = 0
    stage: str = ""
    detail: str = ""
    short_us: int = 0
    timings: list[StageTiming] = []


class Result(Message, tag=7):
    """RESULT: answers, their payload frames following in the same order."""

    answers: list[Answer]


# ---- agents to shards ------------------------------------------------------------------


class ModelReport(msgspec.Struct, array_like=True):
    """A model that a device can run: its key (``pipeline@version/stage``), the accuracy variant, the share of
    the device in percent, and its latency profile as ``[batch, seconds]`` pairs. One that is not ``resident`` lies in
    the host's memory: LOAD brings it into the device's, of which it takes ``memory_mb``, in about ``load_us``."""

    model: str
    variant: str
    share: int
    profile: list[tuple[int, float]]
    resident: bool = True
    memory_mb: float = 0.0
    load_us: int = 0


class DeviceReport(msgspec.Struct, array_like=True):
    """One device of an agent: its number there, its type (``A100``, ``cpu``, ...), what it can run, and the memory that
    models may take there (0: enough for all)."""

    device: int
    type: str
    models: list[ModelReport]
    memory_mb: float = 0.0


class Ready(Message, tag=10):
    """READY, the agent's greeting, with the devices that work for this shard; and again whenever these change, or the
    models that they hold. A device that is named no more has still to answer what it was granted."""

    version: int
    agent: str
    devices: list[DeviceReport]


class Pull(Message, tag=11):
    """PULL: the device takes one batch, from ``free_in_us`` on. ``seq`` grows with each pull of a
    device; a shard holds the newest only. ``sent_us`` is the agent's monotonic clock."""

    device: int
    seq: int
    sent_us: int
    free_in_us: int


class Failure(msgspec.Struct, array_like=True):
    """What went wrong with the task at ``index`` of its batch: its own ``before``/``after`` raised."""

    index: int
    detail: str


class Done(Message, tag=12):
    """DONE: how a granted batch ended. ``code`` is one of :data:`DONE_CODES`; ``results`` has one node a task
    when it is ``ok`` (None at the indexes listed in ``failures``) and is empty otherwise. ``execution_us`` is how long
    the device was taken by it; ``input_us`` and ``output_us`` what was done before and after that, beside other
    batches' execution."""

    device: int
    batch: int
    code: str
    queued_us: int = 0
    execution_us: int = 0
    results: list[Node] = []
    failures: list[Failure] = []
    detail: str = ""
    input_us: int = 0
    output_us: int = 0


DONE_CODES: Final = (
    "ok",
    "too_late",
    "model_error",
    "out_of_memory",
    "bad_input",
    "worker_died",
    "unavailable",
    "unknown_model",
    "not_loaded",
    "busy",
    "cancelled",
)
"""How a batch, a LOAD or an UNLOAD ends. It ran: ``ok``; ``model_error``: the model raised, or returned the wrong
number of outputs; ``out_of_memory``: the device's memory did not suffice for it; ``bad_input``: the frames are no
inputs of this stage. It was lost: ``worker_died``: the process that ran it died or had to be killed; ``unavailable``:
the server behind the executor was away. It never began, which is no attempt, but for ``too_late``: ``too_late``: its
window had closed; ``unknown_model``: the device is not to run this model; ``not_loaded``: the model is not in the
device's memory; ``busy``: something else is in the way (another batch waits, the model is in use or being loaded, no
room); ``cancelled``: the device works for another shard by now."""


class Acted(Message, tag=16):
    """ACTED: how a LOAD or an UNLOAD ended, with one of :data:`DONE_CODES`; ``took_us`` is what it took by itself."""

    device: int
    action: int
    code: str
    took_us: int = 0
    detail: str = ""


# ---- shards to agents ------------------------------------------------------------------


class Grant(Message, tag=13):
    """GRANT: a batch for a device, the answer to its PULL ``seq``. ``pulled_us`` echoes the PULL's ``sent_us``
    and ``dwell_us`` is how long the PULL lay at the shard, so the agent knows that the grant left no earlier
    than ``pulled_us + dwell_us`` on its own clock. ``opens_us`` and ``closes_us`` count from there: run it no
    earlier and start it no later. ``expected_us`` is the predicted execution time."""

    device: int
    batch: int
    seq: int
    pulled_us: int
    dwell_us: int
    model: str
    variant: str
    opens_us: int
    closes_us: int
    expected_us: int
    tasks: list[list[Node]]
    """The batch: for each element one node for each of the stage's inputs, in the spec's order."""


class Load(Message, tag=14):
    """LOAD: bring a model from the host's memory into the device's. The window is as in GRANT, counted from the
    device's newest PULL. Answered by ACTED; READY does not repeat what ACTED has told."""

    device: int
    action: int
    pulled_us: int
    dwell_us: int
    model: str
    opens_us: int
    closes_us: int
    expected_us: int


class Unload(Message, tag=15):
    """UNLOAD: free the memory that a model takes in the device's; it stays in the host's. As LOAD."""

    device: int
    action: int
    pulled_us: int
    dwell_us: int
    model: str
    opens_us: int
    closes_us: int


# ---- files: anybody who connects to either side of a shard, without a greeting -----------


class Fetch(Message, tag=20):
    """FETCH: up to ``length`` bytes, from ``offset`` on, of the file with this digest (SHA-256, hex)."""

    digest: str
    offset: int
    length: int


class Chunk(Message, tag=21):
    """CHUNK, the answer to FETCH, with one frame: the bytes. ``total`` is the file's size; -1 where it is not to be had
    (the frame is empty then, and ``detail`` says why, for people), -2 where it is being uploaded or the shard is busy:
    ask again later."""

    digest: str
    offset: int
    total: int
    detail: str = ""


class Store(Message, tag=22):
    """STORE, to a shard's frontend, with one frame: bytes, from ``offset`` on, of the file with this digest and of
    ``total`` bytes. With an empty frame it asks how much the shard has."""

    digest: str
    offset: int
    total: int


class Stored(Message, tag=23):
    """STORED, the answer to STORE: the shard has the first ``have`` bytes; the whole file, and checked, once that is
    its total. With a ``detail`` it refused, ``retry`` saying whether to try again in a while."""

    digest: str
    have: int
    detail: str = ""
    retry: bool = False


# ---- recording: operators to a shard's frontend, without a greeting ------------------------


class Tap(Message, tag=24):
    """TAP: tell me of the requests that come for these pipelines (none named: for all), from now on. Sent again every
    second, so that it goes on, with the bytes of TAPPED (headers and frames) ``taken`` so far, so that the shard sends
    no more than its peer can take. Without ``payloads`` the shard tells what payloads are made of, not what is in
    them. GOODBYE ends it."""

    pipelines: list[str] = []
    payloads: bool = True
    taken: int = 0


class TappedRequest(msgspec.Struct, array_like=True, gc=False):
    """One request as it came, ``at_us`` on the shard's clock; the rest is as in SUBMIT."""

    at_us: int
    pipeline: str
    budget_us: int | None
    priority: int
    payload: Node


class Tapped(Message, tag=25):
    """TAPPED: requests, the frames of their payloads following in the same order (none without ``payloads``); also
    without any, to answer TAP. ``began_us`` is when the tap began and ``sent_us`` now, on the shard's clock; ``lost``
    counts the requests since then that were not told because the peer was too slow."""

    began_us: int
    sent_us: int
    lost: int = 0
    payloads: bool = True
    requests: list[TappedRequest] = []


TAP_EVERY: Final = 1.0
"""Seconds after which TAP is sent again."""
TAP_WINDOW: Final = 32 * 1024 * 1024
"""Bytes of TAPPED on their way to a peer, at most (one message may be larger)."""
MAX_CHUNK: Final = 1024 * 1024
"""The most bytes of a file in one message."""
NOT_HERE: Final = -1
NOT_YET: Final = -2
"""What CHUNK's ``total`` is where there are no bytes."""


FromClient = Union[Hello, Submit, Cancel, Heartbeat, Goodbye, Fetch, Store, Tap]  # noqa: UP007
ToClient = Union[Welcome, Result, Heartbeat, Goodbye, Chunk, Stored, Tapped]  # noqa: UP007
FromAgent = Union[Ready, Pull, Done, Acted, Heartbeat, Goodbye, Fetch]  # noqa: UP007
ToAgent = Union[Welcome, Grant, Load, Unload, Heartbeat, Goodbye, Chunk]  # noqa: UP007

encode: Final[Callable[[Any], bytes]] = msgspec.msgpack.Encoder().encode
"""A message's header frame."""


def too_structured(what: str, size: int) -> str:
    """What to tell about a value whose header would have ``size`` bytes."""
    return f"the {what}'s structure takes {size} bytes, at most {MAX_HEADER} are allowed; use arrays for numbers"


class ProtocolError(ValueError):
    """The frames received are no message of this protocol."""


T = TypeVar("T")


def _decoder(kinds: Any) -> Callable[[Any], Any]:
    decode = msgspec.msgpack.Decoder(kinds).decode

    def decode_header(frame: Any) -> Any:
        if len(frame) > MAX_HEADER:
            raise ProtocolError(f"a header of {len(frame)} bytes; at most {MAX_HEADER} are allowed")
        try:
            return decode(frame)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise ProtocolError(f"not a header of protocol version {VERSION}: {error}") from error

    return decode_header


decode_from_client: Final[Callable[[Any], FromClient]] = _decoder(FromClient)
decode_to_client: Final[Callable[[Any], ToClient]] = _decoder(ToClient)
decode_from_agent: Final[Callable[[Any], FromAgent]] = _decoder(FromAgent)
decode_to_agent: Final[Callable[[Any], ToAgent]] = _decoder(ToAgent)
