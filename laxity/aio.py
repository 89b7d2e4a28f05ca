"""The client for asyncio: the same I/O thread, its answers handed to the event loop."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, overload

from laxity.channel import Channel
from laxity.keys import KeyFile
from laxity.outcomes import LaxityError, Outcome
from laxity.protocol import Answer
from laxity.reply import Reply, reply_of
from laxity.routes import ServedPipeline
from laxity.transport import Ended


class AsyncReplyFuture(asyncio.Future[Any]):
    """A request in flight: awaiting it gives the pipeline's value or raises the error named after the outcome.

    Cancelling it (or a task that awaits it) tells the shard.
    """

    def __init__(self, channel: Channel, id: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._channel = channel
        self._id = id
        self._answer: Answer | None = None

    @property
    def request_id(self) -> str:
        """The name under which shards log the request."""
        return self._channel.request_id(self._id)

    def cancel(self, msg: Any | None = None) -> bool:
        """End the request and tell the shard. False if it has ended before."""
        if not super().cancel(msg):
            return False
        self._channel.cancel(self._id)
        return True

    async def reply(self) -> Reply:
        """How the request ended, whatever its outcome."""
        try:
            value = await self
        except LaxityError:
            value = None
        answer = self._answer
        assert answer is not None
        return reply_of(answer, value, self.request_id)

    def _end(self, answer: Answer, value: Any) -> None:
        if self.done():
            return  # it was cancelled
        self._answer = answer
        if answer.outcome is Outcome.OK:
            self.set_result(value)
        else:
            self.set_exception(reply_of(answer, None, self.request_id).error())


class _Delivery:
    """Takes what has ended from the I/O thread to the event loop."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, ended: list[Ended]) -> None:
        if self.loop is None:
            return
        try:
            self.loop.call_soon_threadsafe(_deliver, ended)
        except RuntimeError:
            pass  # the loop is closed, so nobody waits any more


class AsyncClient:
    """What :class:`laxity.Client` is, for one asyncio event loop: the one in which it is used first.

    Its arguments are those of :class:`laxity.Client`.
    """

    def __init__(
        self,
        url: str,
        *,
        max_pending: int = 10_000,
        key: KeyFile | str | Path | None = None,
        plain: bool | None = None,
    ) -> None:
        self._delivery = _Delivery()
        self._channel = Channel(url, max_pending, self._delivery, key, plain)
        self._finalizer = weakref.finalize(self, self._channel.close)

    async def wait_ready(self, timeout: float = 5.0) -> None:
        """Wait until a shard is connected; see :meth:`laxity.Client.wait_ready`."""
        await asyncio.get_running_loop().run_in_executor(None, self._channel.wait_ready, timeout)

    @property
    def is_connected(self) -> bool:
        """Whether a shard is connected at present."""
        return self._channel.is_connected

    @property
    def pipelines(self) -> Mapping[str, ServedPipeline]:
        """The pipelines that the cluster serves, by name, as the connected shards tell; {} while none is connected."""
        return self._channel.pipelines

    async def infer(
        self,
        pipeline: str,
        payload: Any,
        slo: float | None = None,
        *,
        priority: int = 0,
        traceparent: str = "",
    ) -> Any:
        """The answer of ``pipeline`` to ``payload``; see :meth:`laxity.Client.infer`.

        When the task is cancelled, or a time-out around it strikes, the request is cancelled at the shard.
        """
        return await self.submit(pipeline, payload, slo, priority=priority, traceparent=traceparent)

    def submit(
        self,
        pipeline: str,
        payload: Any,
        slo: float | None = None,
        *,
        priority: int = 0,
        timings: bool = False,
        traceparent: str = "",
    ) -> AsyncReplyFuture:
        """Send a request without waiting for its end; see :meth:`laxity.Client.submit`."""
        loop = asyncio.get_running_loop()
        if self._delivery.loop is None:
            self._delivery.loop = loop
        elif self._delivery.loop is not loop:
            raise RuntimeError("this AsyncClient is used in another event loop; make one for each loop")
        channel = self._channel
        number = next(channel.ids)
        future = AsyncReplyFuture(channel, number, loop)
        channel.submit(number, (self, future), pipeline, payload, slo, priority, timings, traceparent)
        return future

    @overload
    def map(
        self,
        pipeline: str,
        payloads: Iterable[Any] | AsyncIterable[Any],
        slo: float | None = None,
        *,
        max_in_flight: int = 64,
        priority: int = 0,
        traceparent: str = "",
        replies: Literal[False] = False,
    ) -> AsyncIterator[Any]: ...

    @overload
    def map(
        self,
        pipeline: str,
        payloads: Iterable[Any] | AsyncIterable[Any],
        slo: float | None = None,
        *,
        max_in_flight: int = 64,
        priority: int = 0,
        traceparent: str = "",
        replies: Literal[True],
    ) -> AsyncIterator[Reply]: ...

    def map(
        self,
        pipeline: str,
        payloads: Iterable[Any] | AsyncIterable[Any],
        slo: float | None = None,
        *,
        max_in_flight: int = 64,
        priority: int = 0,
        traceparent: str = "",
        replies: bool = False,
    ) -> AsyncIterator[Any]:
        """The answers to ``payloads`` (an iterable or an asynchronous one), in order; see :meth:`Client.map`."""
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight must be 1 or more, not {max_in_flight}")
        return self._map(pipeline, payloads, slo, max_in_flight, priority, traceparent, replies)

    async def _map(
        self,
        pipeline: str,
        payloads: Iterable[Any] | AsyncIterable[Any],
        slo: float | None,
        max_in_flight: int,
        priority: int,
        traceparent: str,
        replies: bool,
    ) -> AsyncIterator[Any]:
        window: deque[AsyncReplyFuture] = deque()
        try:
            async for payload in _each(payloads):
                if len(window) >= max_in_flight:
                    future = window.popleft()
                    yield await (future.reply() if replies else future)
                try:
                    future = self.submit(
                        pipeline, payload, slo, priority=priority, timings=replies, traceparent=traceparent
                    )
                    window.append(future)
                except LaxityError as error:
                    window.append(self._ended(error))
            while window:
                future = window.popleft()
                yield await (future.reply() if replies else future)
        finally:
            for future in window:
                if not future.cancel() and not future.cancelled():
                    future.exception()  # it ended already; nobody will ask any more

    def _ended(self, error: LaxityError) -> AsyncReplyFuture:
        """A future for a request that was refused here."""
        future = AsyncReplyFuture(self._channel, next(self._channel.ids), asyncio.get_running_loop())
        future._end(Answer(future._id, error.outcome, None, detail=error.detail), None)
        return future

    async def close(self) -> None:
        """Cancel what is in flight, say goodbye to the shards and end the client's thread."""
        await asyncio.get_running_loop().run_in_executor(None, self._channel.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


def _deliver(ended: list[Ended]) -> None:
    for pending, answer, value in ended:
        pending.sink[1]._end(answer, value)


async def _each(payloads: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(payloads, AsyncIterable):
        async for payload in payloads:
            yield payload
    else:
        for payload in payloads:
            yield payload
