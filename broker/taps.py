"""Telling operators of the requests that come, as they come, for as long as they want and can keep up."""

from __future__ import annotations

from typing import Final

from broker.endpoint import Endpoint, Sent, Unsent
from broker.engine.request import Request as EngineRequest
from laxity import protocol
from laxity.node import DictNode, ListNode, Node, TextNode
from laxity.payload import Payload, pack
from laxity.protocol import Goodbye, Request, Tap, Tapped, TappedRequest

MOST_TAPS: Final = 4
"""Operators that are told at a time."""
SILENCE: Final = 5.0
"""Seconds without TAP after which an operator is gone."""


class _Tap:
    """One operator: what it wants, and what it was sent."""

    def __init__(self, now: float, tap: Tap) -> None:
        self.began = now
        self.sent = tap.taken  # what it took over an earlier connection counts on its side
        self.unsent = Unsent()
        self.lost = 0
        self.requests: list[TappedRequest] = []
        self.payloads: list[Payload] = []
        self.heard(now, tap)

    def heard(self, now: float, tap: Tap) -> None:
        self.heard_at = now
        self.pipelines = frozenset(tap.pipelines)
        self.contents = tap.payloads
        self.taken = tap.taken


class Taps:
    """The operators that tap a shard. Nothing of this costs serving more than one look whether there is any."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._taps: dict[bytes, _Tap] = {}

    def __len__(self) -> int:
        return len(self._taps)

    def tap(self, now: float, sender: bytes, message: Tap) -> None:
        """An operator wants to be told, or to go on being told."""
        tap = self._taps.get(sender)
        if tap is not None:
            tap.heard(now, message)
        elif len(self._taps) < MOST_TAPS:
            tap = self._taps[sender] = _Tap(now, message)
        else:
            refusal = Goodbye(reason=f"{MOST_TAPS} others record here already: end one of them", retry=False)
            self._endpoint.send(sender, protocol.encode(refusal), [])
            return
        self._send(now, sender, tap)

    def leave(self, sender: bytes) -> None:
        self._taps.pop(sender, None)

    def check(self, now: float) -> None:
        """Forget the operators that are silent."""
        for sender in [sender for sender, tap in self._taps.items() if tap.heard_at < now - SILENCE]:
            del self._taps[sender]

    def note(self, known: dict[int, EngineRequest], arrival: float, request: Request, payload: Payload) -> None:
        """A request has come from a service of which these are in flight: a repeat is none."""
        if request.id in known:
            return
        for tap in self._taps.values():
            if tap.pipelines and request.pipeline not in tap.pipelines:
                continue
            node = payload.node if tap.contents else outline(payload.node)
            at_us = round(arrival * 1e6)
            tap.requests.append(TappedRequest(at_us, request.pipeline, request.budget_us, request.priority, node))
            if tap.contents:
                tap.payloads.append(payload)

    def send(self, now: float) -> None:
        """Tell of what was noted."""
        for sender, tap in list(self._taps.items()):
            if tap.requests:
                self._send(now, sender, tap)

    def _send(self, now: float, sender: bytes, tap: _Tap) -> None:
        requests, payloads = tap.requests, tap.payloads
        tap.requests, tap.payloads = [], []
        began_us, sent_us = round(tap.began * 1e6), round(now * 1e6)
        header = protocol.encode(Tapped(began_us, sent_us, tap.lost, tap.contents, requests))
        frames = pack(payloads)
        size = len(header) + sum(len(frame) for frame in frames)
        under_way = tap.sent - tap.taken
        full = under_way > 0 and under_way + size > protocol.TAP_WINDOW
        full = full or tap.unsent.bytes() > protocol.TAP_WINDOW  # whatever it says that it took
        if full or len(header) > protocol.MAX_HEADER:
            sent = Sent.FULL
        else:
            sent = self._endpoint.send(sender, header, frames, tap.unsent)
        if sent is Sent.YES:
            tap.sent += size
        elif sent is Sent.FULL:
            tap.lost += len(requests)
        else:
            self.leave(sender)


def outline(node: Node) -> Node:
    """What a value is made of, without what is in it: texts by their sizes, numbers as zeros."""
    if isinstance(node, str):
        return TextNode(len(node.encode()))
    if isinstance(node, ListNode):
        return ListNode([outline(item) for item in node.items])
    if isinstance(node, DictNode):
        return DictNode({name: outline(item) for name, item in node.items.items()})
    if isinstance(node, bool):
        return False
    if isinstance(node, int):
        return 0
    return 0.0 if isinstance(node, float) else node
