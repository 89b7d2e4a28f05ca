"""What HTTP and gRPC have in common: a request's way from its tensors through Laxity to those of its answer."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import msgspec

from laxity import AsyncClient, LaxityError
from laxity.gateway.catalog import Catalog, Lookup, Model
from laxity.gateway.errors import GatewayError, Invalid, Overloaded, error_of
from laxity.gateway.metrics import UNKNOWN, Metrics
from laxity.gateway.options import Options, refuse_unsupported
from laxity.gateway.tensors import Parameters, Tensor
from laxity.gateway.values import from_payload, to_payload
from laxity.keys import KeyFile, read_key_file
from laxity.outcomes import Outcome
from laxity.reply import Reply

log = logging.getLogger("laxity.gateway")

REFRESH: Final = 1.0
"""Seconds between two lookups."""
MOST_NAME: Final = 1024
"""Characters of any name in a request, and of its id."""
REQUEST_ID: Final = "laxity-request-id"
"""The header, the metadata and the parameter that says under which name shards log a request."""


@dataclass(slots=True)
class RequestedOutput:
    """An output that a request asks for."""

    name: str
    parameters: Parameters = field(default_factory=dict)


@dataclass(slots=True)
class Call:
    """One inference request. ``arrived`` is the event loop's time; ``outputs`` is empty where all are wanted."""

    model: str
    version: str
    id: str
    parameters: Parameters
    inputs: Sequence[Tensor]
    outputs: Sequence[RequestedOutput]
    options: Options
    arrived: float


@dataclass(slots=True)
class Answer:
    """Its answer, the outputs in the order in which they were asked for."""

    model: str
    version: str
    id: str
    request_id: str
    outputs: list[Tensor]


class Gateway:
    """Serves one event loop. ``connect`` names shards; '' leaves it to the ``lookup`` to find them. At most
    ``max_concurrency`` requests are under way at once. ``key`` (a file's path, '' for none) and ``plain`` are as those
    of :class:`laxity.Client`; the shards' keys are those that the lookup finds, or else the file's."""

    def __init__(
        self, connect: str, lookup: Lookup | None, max_concurrency: int, key: str = "", plain: bool = False
    ) -> None:
        self.metrics = Metrics()
        self.draining = False
        self.in_flight = 0
        self._connect = connect
        self._lookup = lookup
        self._limit = max_concurrency
        self._key = key
        self._plain = plain
        self._catalog = Catalog()
        self._tried: tuple[str, KeyFile | str] = ("", "")
        """The shards and the key of the client."""
        self._trouble = ""
        self._client: AsyncClient | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._following: asyncio.Task[None] | None = None

    # ---- shards and the catalog -----------------------------------------------------------

    async def start(self) -> None:
        """Connect, and follow the catalog. ``ValueError`` for what is no shard's address or no key, or needs one."""
        if self._connect:
            self._client = self._new_client(self._connect, self._key)
        if self._lookup is not None:
            await self._refresh(self._lookup)
            self._following = asyncio.create_task(self._follow(self._lookup))

    async def close(self) -> None:
        """Cancel what is under way, and leave the shards."""
        if self._following is not None:
            self._following.cancel()
        if self._client is not None:
            await self._client.close()

    async def _follow(self, lookup: Lookup) -> None:
        while True:
            await asyncio.sleep(REFRESH)
            try:
                await self._refresh(lookup)
            except ValueError as error:
                if str(error) != self._trouble:
                    self._trouble = str(error)
                    log.error("the shards cannot be connected to: %s", error)

    async def _refresh(self, lookup: Lookup) -> None:
        try:
            self._catalog = await asyncio.to_thread(lookup)
        except Exception as error:
            log.warning("the store cannot be read, what was known holds: %s", error)
            return
        if self._connect or not self._catalog.shards:
            return
        if self._client is not None and self._client.is_connected:
            return  # it follows the shards itself, as long as it reaches one
        wanted = (self._catalog.shards, self._key and self._known_key())
        if self._tried == wanted:
            return
        self._tried = wanted
        left, self._client = self._client, self._new_client(*wanted)
        log.info("the shards are at %s", self._catalog.shards)
        if left is not None:
            await left.close()

    def _known_key(self) -> KeyFile:
        """The key in the file by now, with the shards that the catalog has."""
        key = read_key_file(self._key)
        servers = list(self._catalog.servers)
        return msgspec.structs.replace(key, servers=servers) if servers else key

    def _new_client(self, shards: str, key: KeyFile | str) -> AsyncClient:
        return AsyncClient(shards, max_pending=self._limit + 1, key=key, plain=self._plain)

    # ---- what is served ----------------------------------------------------------------------

    @property
    def unready(self) -> str:
        """Why requests should go elsewhere; '' where they need not."""
        if self.draining:
            return "the gateway is being stopped"
        if self._client is None or not self._client.is_connected:
            return "no shard is connected"
        return ""

    def models(self) -> dict[str, tuple[Model, str]]:
        """All pipelines, by name, with why one is not ready ('': it is)."""
        served = {} if self._client is None else self._client.pipelines
        return {
            name: (
                self._catalog.models.get(name, Model()),
                "" if name in served and served[name].ready else "no device holds all its stages",
            )
            for name in sorted({*served, *self._catalog.models})
        }

    def model(self, name: str, version: str = "") -> tuple[Model, str]:
        """One pipeline, as :meth:`models` has it. :class:`GatewayError` (404) where it is not served, or not in that
        version."""
        served = {} if self._client is None else self._client.pipelines
        known = self._catalog.models.get(name)
        if known is None and name not in served:
            if not served and not self._catalog.models:
                raise GatewayError(503, f"nothing is known of {name!r}: {self.unready or 'no shard serves anything'}")
            some = ", ".join(sorted({*served, *self._catalog.models})[:20])
            raise GatewayError(404, f"unknown pipeline {name!r}; served here: {some}")
        model = known or Model()
        if version not in ("", model.version):
            raise GatewayError(404, f"pipeline {name!r} is served in version {model.version}, not {version!r}")
        return model, "" if name in served and served[name].ready else "no device holds all its stages"

    # ---- requests -----------------------------------------------------------------------------

    @contextmanager
    def admit(self, model: str, protocol: str) -> Iterator[None]:
        """Around all that is done for a request: holds one of the places, and counts how the request ends.
        :class:`GatewayError` where it is not let in."""
        began = time.monotonic()
        status = "200"
        self.in_flight += 1
        self.metrics.in_flight.set(self.in_flight)
        self._idle.clear()
        try:
            if self.draining:
                raise GatewayError(503, "the gateway is being stopped; send the request to another one")
            if self.in_flight > self._limit:
                raise Overloaded(self._limit)
            yield
        except GatewayError as error:
            status = str(error.status)
            raise
        except asyncio.CancelledError:
            status = "499"
            raise
        except BaseException:
            status = "500"
            raise
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()
            self.metrics.in_flight.set(self.in_flight)
            served = {} if self._client is None else self._client.pipelines
            self.metrics.ended(model if model in served else UNKNOWN, protocol, status, time.monotonic() - began)

    async def drain(self) -> None:
        """Let nobody in any more, and wait until those who are in have left."""
        self.draining = True
        await self._idle.wait()

    async def infer(self, call: Call) -> Answer:
        """The answer to a request that was admitted; :class:`GatewayError` says why there is none. When this is
        cancelled, so is the request."""
        _check_names(call)
        model, _ = self.model(call.model, call.version)
        for output in call.outputs:
            refuse_unsupported(output.parameters)
            if model.fixed and output.name not in model.outputs:
                raise _no_such_output(call.model, output.name, model.outputs)
        payload = to_payload(call.inputs, call.parameters)
        reply = await self._submit(call, payload)
        if reply.outcome is not Outcome.OK:
            raise error_of(reply)
        tensors = from_payload(reply.value)
        if call.outputs:
            by_name = {tensor.name: tensor for tensor in tensors}
            for output in call.outputs:
                if output.name not in by_name:
                    raise _no_such_output(call.model, output.name, by_name)
            tensors = [by_name[output.name] for output in call.outputs]
        return Answer(call.model, model.version, call.id, reply.request_id, tensors)

    async def _submit(self, call: Call, payload: object) -> Reply:
        client = self._client
        assert client is not None  # else no model was found
        options = call.options
        remaining = options.timeout - (asyncio.get_running_loop().time() - call.arrived)
        if remaining <= 0.0:
            return _refused(Outcome.EXPIRED, "the time allowed was used up on the way to the gateway")
        known = client.pipelines.get(call.model)
        slo = None if known is None else known.slo
        try:
            future = client.submit(
                call.model,
                payload,
                remaining if slo is not None and remaining < slo else None,
                priority=options.priority,
                traceparent=options.traceparent,
            )
        except LaxityError as error:
            return _refused(error.outcome, error.detail, error.request_id)
        # Without an SLO nobody knows yet whether the shard would take a budget for too long: it is watched here.
        watched = slo is None and math.isfinite(remaining)
        try:
            async with asyncio.timeout(remaining if watched else None):
                reply = await future.reply()
        except TimeoutError:
            return _refused(Outcome.EXPIRED, "the time allowed has passed without an answer", future.request_id)
        if reply.outcome is Outcome.CANCELLED and self.draining:
            return _refused(
                Outcome.UNAVAILABLE, "the gateway was stopped before the answer was there", reply.request_id
            )
        return reply


def _refused(outcome: Outcome, detail: str, request_id: str = "") -> Reply:
    """The end of a request that no shard ended."""
    return Reply(outcome, None, 0.0, "", detail, 0.0, (), request_id)


def _check_names(call: Call) -> None:
    names = [call.model, call.version, call.id, *(tensor.name for tensor in call.inputs)]
    longest = max([*names, *(output.name for output in call.outputs)], key=len)
    if len(longest) > MOST_NAME:
        raise Invalid(f"{longest[:40]!r}... has {len(longest)} characters; names and ids have {MOST_NAME} at most")


def _no_such_output(model: str, name: str, known: Sequence[str] | Mapping[str, Tensor]) -> Invalid:
    return Invalid(f"pipeline {model!r} has no output {name!r}; its outputs are {', '.join(known) or 'none'}")
