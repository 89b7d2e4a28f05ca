"""The blocking client: one call a request, from any thread."""

from __future__ import annotations

import concurrent.futures
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, overload

from laxity.channel import Channel
from laxity.keys import KeyFile
from laxity.outcomes import Cancelled, LaxityError, Outcome
from laxity.protocol import Answer
from laxity.reply import Reply, reply_of
from laxity.routes import ServedPipeline
from laxity.transport import Ended


class ReplyFuture(concurrent.futures.Future[Any]):
    """A request in flight.

    ``result()`` gives the pipeline's value or raises the error named after the outcome; ``reply()`` gives the
    whole :class:`Reply` and raises for no outcome. Works with :func:`concurrent.futures.wait`,
    :func:`~concurrent.futures.as_completed` and :func:`asyncio.wrap_future`. Callbacks run in the client's I/O
    thread and must not block.
    """

    def __init__(self, client: Client, id: int) -> None:
        super().__init__()
        self._client = client  # keeps it open until the request has ended
        self._id = id
        self._answer: Answer | None = None

    @property
    def request_id(self) -> str:
        """The name under which shards log the request."""
        return self._client._channel.request_id(self._id)

    def cancel(self) -> bool:
        """End the request as cancelled and tell the shard. False if it has ended otherwise before."""
        if self.done():
            return self.cancelled()
        if not self._end_cancelled():
            return self.cancelled()
        self._client._channel.cancel(self._id)
        return True

    def result(self, timeout: float | None = None) -> Any:
        """The pipeline's value. Waits ``timeout`` seconds at most (``TimeoutError``), without one until the
        request ends. Raises a subclass of :class:`LaxityError` for every outcome but ``ok``."""
        try:
            return super().result(timeout)
        except concurrent.futures.CancelledError:
            raise self._cancelled_error() from None

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error that :meth:`result` would raise, or None."""
        try:
            return super().exception(timeout)
        except concurrent.futures.CancelledError:
            return self._cancelled_error()

    def reply(self, timeout: float | None = None) -> Reply:
        """How the request ended, whatever its outcome. Waits as :meth:`result` does."""
        error = self.exception(timeout)
        answer = self._answer
        if answer is None or self.cancelled():
            answer = Answer(self._id, Outcome.CANCELLED, None, detail=self._cancelled_error().detail)
        return reply_of(answer, None if error is not None else super().result(0), self.request_id)

    def _end(self, answer: Answer, value: Any) -> None:
        """The I/O thread: the request has ended."""
        self._answer = answer
        try:
            if answer.outcome is Outcome.CANCELLED:
                self._end_cancelled()
            elif answer.outcome is Outcome.OK:
                self.set_result(value)
            else:
                self.set_exception(reply_of(answer, None, self.request_id).error())
        except concurrent.futures.InvalidStateError:
            pass  # the caller cancelled it at the same moment

    def _end_cancelled(self) -> bool:
        """Whether this call is the one that ended it."""
        token = object()
        # setdefault is atomic: of several threads that cancel at once, one tells those who wait.
        first = self.__dict__.setdefault("_cancelled_by", token) is token
        if not super().cancel() or not first:
            return False
        self.set_running_or_notify_cancel()
        return True

    def _cancelled_error(self) -> Cancelled:
        answer = self._answer
        if answer is not None and answer.outcome is Outcome.CANCELLED:
            return Cancelled(answer.detail, request_id=self.request_id)
        return Cancelled("cancelled by the caller", request_id=self.request_id)


class _Waiter:
    """A request in flight that one thread waits for: a future's cost is half of a small request's."""

    __slots__ = ("_answer", "_ended", "_id", "_value")

    def __init__(self, id: int) -> None:
        self._id = id
        self._answer: Answer | None = None
        self._value: Any = None
        self._ended = threading.Lock()
        self._ended.acquire()

    def _end(self, answer: Answer, value: Any) -> None:
        self._answer = answer
        self._value = value
        self._ended.release()

    def reply(self, channel: Channel) -> Reply:
        """How it ended; waits for that, once."""
        return reply_of(self._wait(), self._value, channel.request_id(self._id))

    def result(self, channel: Channel) -> Any:
        """Its value, or its error; waits for that, once."""
        answer = self._wait()
        if answer.outcome is Outcome.OK:
            return self._value
        raise reply_of(answer, None, channel.request_id(self._id)).error()

    def _wait(self) -> Answer:
        self._ended.acquire()
        assert self._answer is not None
        return self._answer

    def cancel(self, channel: Channel) -> None:
        """Nobody will wait for it."""
        if self._answer is None:
            channel.cancel(self._id)


class Client:
    """A connection to Laxity, safe to share between threads.

    ``url`` is ``'tcp://host:port'``, the address at which a shard serves services, or several of them separated by
    commas, which are tried in turn. One that answers is enough: shards tell which of them serve which pipeline, and
    where, and requests are spread over a pipeline's shards as the cluster's plan says, also when it changes. A shard
    whose address there is out of reach from here is left out, unless a given address leads to it.

    Connecting goes on in the background, again and again. Requests wait for it, and those that a lost shard leaves
    unanswered are submitted to another one while their latency budget lasts; each ends exactly once. ``max_pending``
    bounds the requests in flight.

    ``key`` is the path of a key file, as `laxity keys new` writes them (default: the one that LAXITY_KEY names; '' for
    none). With it every connection is encrypted, to shards whose keys the file knows or that these tell of; the file is
    read again when it was replaced. Without a key, connections are plain, which is for addresses on this host, and for
    others only where ``plain`` (LAXITY_PLAIN=1) asks for it. Raises ``ValueError`` for what is no address, no key, or
    needs one.

    Use one client a process: it has a thread of its own, and requests of many callers share messages. Close it
    (it is a context manager) when done; what is in flight then ends as cancelled.
    """

    def __init__(
        self,
        url: str,
        *,
        max_pending: int = 10_000,
        key: KeyFile | str | Path | None = None,
        plain: bool | None = None,
    ) -> None:
        self._channel = Channel(url, max_pending, _deliver, key, plain)
        self._finalizer = weakref.finalize(self, self._channel.close)

    def wait_ready(self, timeout: float = 5.0) -> None:
        """Wait until a shard is connected, so that connecting takes nothing from a request's latency budget.

        Not needed before a request. Raises :class:`Unavailable` with the reason after ``timeout`` seconds; the client
        keeps on trying.
        """
        self._channel.wait_ready(timeout)

    @property
    def is_connected(self) -> bool:
        """Whether a shard is connected at present."""
        return self._channel.is_connected

    @property
    def pipelines(self) -> Mapping[str, ServedPipeline]:
        """The pipelines that the cluster serves, by name, as the connected shards tell; {} while none is connected."""
        return self._channel.pipelines

    def infer(
        self,
        pipeline: str,
        payload: Any,
        slo: float | None = None,
        *,
        priority: int = 0,
        traceparent: str = "",
    ) -> Any:
        """The answer of ``pipeline`` to ``payload``; blocks until it is there.

        ``payload`` is None, a bool, int, float, text, bytes, a numpy array, or a list or dict of these. ``slo`` is
        the latency budget in seconds, at most the pipeline's own, which is the default. Under overload requests
        of ``priority`` 0 are dropped before those of 1. ``traceparent`` is a W3C trace context; without one the current
        OpenTelemetry span is taken, where the process uses OpenTelemetry. Raises a subclass of :class:`LaxityError`,
        named after the outcome, when there is no answer in time.
        """
        channel = self._channel
        waiter = _Waiter(next(channel.ids))
        try:
            channel.submit(waiter._id, waiter, pipeline, payload, slo, priority, False, traceparent)
            return waiter.result(channel)
        except BaseException:
            waiter.cancel(channel)  # Ctrl-C; nothing to do for a request that has ended
            raise

    def submit(
        self,
        pipeline: str,
        payload: Any,
        slo: float | None = None,
        *,
        priority: int = 0,
        timings: bool = False,
        traceparent: str = "",
    ) -> ReplyFuture:
        """Send a request without waiting for its end; the arguments are those of :meth:`infer`.

        Large arrays are sent as they lie in memory: do not change them before the future is done. ``timings`` asks
        for the times of each stage, to be found in ``future.reply().timings``. Raises :class:`Rejected` or
        ``TypeError`` at once for what cannot be sent, and :class:`Rejected` above ``max_pending``.
        """
        channel = self._channel
        number = next(channel.ids)
        future = ReplyFuture(self, number)
        channel.submit(number, future, pipeline, payload, slo, priority, timings, traceparent)
        return future

    @overload
    def map(
        self,
        pipeline: str,
        payloads: Iterable[Any],
        slo: float | None = None,
        *,
        max_in_flight: int = 64,
        priority: int = 0,
        traceparent: str = "",
        replies: Literal[False] = False,
    ) -> Iterator[Any]: ...

    @overload
    def map(
        self,
        pipeline: str,
        payloads: Iterable[Any],
        slo: float | None = None,
        *,
        max_in_flight: int = 64,
        priority: int = 0,
        traceparent: str = "",
        replies: Literal[True],
    ) -> Iterator[Reply]: ...

    def map(
        self,
        pipeline: str,
        payloads: Iterable[Any],
        slo: float | None = None,
        *,
        max_in_flight: int = 64,
        priority: int = 0,
        traceparent: str = "",
        replies: bool = False,
    ) -> Iterator[Any]:
        """The answers to ``payloads``, in their order, with up to ``max_in_flight`` requests at a time.

        The first request that is not answered raises its error, and the others are cancelled. With ``replies`` the
        iterator gives a :class:`Reply` for each payload (with stage times) and goes on whatever the outcomes.
        ``payloads`` may be endless: it is read only as far as requests are sent.
        """
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight must be 1 or more, not {max_in_flight}")
        return self._map(pipeline, payloads, slo, max_in_flight, priority, traceparent, replies)

    def _map(
        self,
        pipeline: str,
        payloads: Iterable[Any],
        slo: float | None,
        max_in_flight: int,
        priority: int,
        traceparent: str,
        replies: bool,
    ) -> Iterator[Any]:
        channel = self._channel
        take = _Waiter.reply if replies else _Waiter.result
        window: deque[_Waiter] = deque()
        try:
            for payload in payloads:
                if len(window) >= max_in_flight:
                    yield take(window[0], channel)
                    window.popleft()
                waiter = _Waiter(next(channel.ids))
                window.append(waiter)
                try:
                    channel.submit(waiter._id, waiter, pipeline, payload, slo, priority, replies, traceparent)
                except LaxityError as error:
                    waiter._end(Answer(waiter._id, error.outcome, None, detail=error.detail), None)
            while window:
                yield take(window[0], channel)
                window.popleft()
        finally:
            for waiter in window:
                waiter.cancel(channel)

    def close(self) -> None:
        """Cancel what is in flight, say goodbye to the shards and end the client's thread."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _deliver(ended: list[Ended]) -> None:
    for pending, answer, value in ended:
        pending.sink._end(answer, value)
