"""Requests by the SDK, for the generator."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

from cli.load.generator import Ended, Sent
from laxity import Client
from laxity.outcomes import LaxityError
from laxity.reply import Reply


class ClientPort:
    """Sends through a client and notes, in that one's thread, when answers come."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._came = threading.Event()
        self.ended: deque[Ended] = deque()
        gc.collect()
        gc.freeze()  # a full collection of all that was imported would hold up what is due

    def clock(self) -> float:
        return time.monotonic()

    def send(self, sent: Sent) -> None:
        call = sent.call
        try:
            future = self._client.submit(call.pipeline, call.payload, call.slo, priority=call.priority)
        except LaxityError as error:
            self._end(sent, error.outcome, error.stage, error.detail)
        else:
            future.add_done_callback(partial(self._answered, sent))

    def wait(self, seconds: float, for_answers: bool) -> None:
        if not for_answers:
            time.sleep(seconds)
            return
        self._came.clear()
        if not self.ended:
            self._came.wait(seconds)

    def _answered(self, sent: Sent, future: Any) -> None:
        """Called in the client's thread."""
        reply: Reply = future.reply(0)
        self._end(sent, reply.outcome, reply.stage, reply.detail)

    def _end(self, sent: Sent, outcome: Any, stage: str, detail: str) -> None:
        self.ended.append(Ended(sent, time.monotonic(), outcome, stage, detail))
        self._came.set()


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Tells whether Ctrl-C (or SIGTERM) came; a second one raises KeyboardInterrupt."""
    came = 0

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came += 1
        if came > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came > 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
