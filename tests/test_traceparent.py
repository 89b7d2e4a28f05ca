"""The W3C trace context, and where the client gets it from."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest
from conftest import Peer
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

import laxity
from laxity.traceparent import current_traceparent, new_traceparent, parse_traceparent

GOOD = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_traceparent_is_read_as_the_specification_says() -> None:
    parent = parse_traceparent(GOOD)
    assert parent is not None
    assert (parent.trace, parent.span, parent.sampled) == (GOOD[3:35], GOOD[36:52], True)
    assert str(parent) == GOOD
    for flags, sampled in (("00", False), ("02", False), ("03", True), ("ff", True)):
        other = parse_traceparent(GOOD[:-2] + flags)
        assert other is not None
        assert other.sampled is sampled
    later = parse_traceparent("cc" + GOOD[2:] + "-what-will-be-there-one-day")
    assert later == parent


@pytest.mark.parametrize(
    "text",
    [
        "", "x", GOOD[:-1], GOOD + "-more", GOOD + "0", GOOD.upper(), "ff" + GOOD[2:], "cc" + GOOD[2:] + "more",
        "00-" + "0" * 32 + GOOD[35:], GOOD[:36] + "0" * 16 + "-01", GOOD.replace("-", "_"), " " + GOOD,
        GOOD[:-2] + "0x",
    ],
)  # fmt: skip
def test_what_is_none_is_ignored(text: str) -> None:
    assert parse_traceparent(text) is None


@given(st.text(max_size=80))
def test_no_text_does_harm(text: str) -> None:
    parse_traceparent(text)
    parse_traceparent(GOOD[: len(text)] + text)


def test_a_new_one_is_sampled() -> None:
    parent = parse_traceparent(new_traceparent())
    assert parent is not None
    assert parent.sampled
    assert new_traceparent() != new_traceparent()


def test_the_current_span_is_sent_along(peer: Peer) -> None:
    tracer = TracerProvider().get_tracer("test")
    with laxity.Client(peer.url) as client:
        peer.welcome()
        with tracer.start_as_current_span("handler") as span:
            context = span.get_span_context()
            client.submit("ocr", b"x")
            client.submit("ocr", b"x", traceparent=GOOD)
        client.submit("ocr", b"x")
        requests = [incoming.request for incoming in peer.requests(3)]
    current = f"00-{context.trace_id:032x}-{context.span_id:016x}-01"
    assert [request.traceparent for request in requests] == [current, GOOD, ""]


def test_the_current_span_of_a_task_is_sent_along(peer: Peer) -> None:
    tracer = TracerProvider(sampler=ALWAYS_OFF).get_tracer("test")

    async def ask() -> tuple[str, str]:
        async with laxity.AsyncClient(peer.url) as client:
            welcome = asyncio.get_running_loop().run_in_executor(None, peer.welcome)
            await welcome
            with tracer.start_as_current_span("handler"):
                inside = current_traceparent()
                client.submit("ocr", b"x")
            incoming = await asyncio.get_running_loop().run_in_executor(None, peer.request)
            return inside, incoming.request.traceparent

    inside, sent = asyncio.run(ask())
    assert sent == inside
    assert sent.endswith("-00"), "what the caller does not sample is not sampled here"


def test_all_of_a_map_have_the_traceparent(peer: Peer) -> None:
    with laxity.Client(peer.url) as client:
        peer.welcome()
        answers = client.map("ocr", [b"a", b"b"], traceparent=GOOD, max_in_flight=2)
        requests = []

        def take() -> None:
            for incoming in peer.requests(2):
                requests.append(incoming.request.traceparent)
                peer.answer(incoming, b"y")

        thread = threading.Thread(target=take)
        thread.start()
        assert list(answers) == [b"y", b"y"]
        thread.join()
    assert requests == [GOOD, GOOD]


def test_a_process_without_opentelemetry_sends_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry.trace", raising=False)
    assert current_traceparent() == ""
    assert "opentelemetry.trace" not in sys.modules
