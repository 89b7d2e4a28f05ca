"""A shard's figures, read in another thread while it serves: all families, with the labels and buckets that people are
told of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zmq

from broker.engine.metrics import MOST_STAGES
from broker.figures import OTHER
from cluster.observe.families import BY_NAME, SHARD
from cluster.observe.figures import Figures, HistogramFigures
from laxity import Client, Rejected, protocol
from laxity.protocol import VERSION, Goodbye, Heartbeat, Hello, Welcome
from pipelines.load import parse_spec
from pipelines.spec import PipelineSpec
from tests.conftest import Cluster

TWO_STAGES = """
name: two
slo: 20s
policy: pard
stages:
  first:  {executor: emulated, profile: {alpha_ms: 1, beta_ms: 1}, inputs: [request], max_batch: 4}
  second: {executor: emulated, profile: {alpha_ms: 1, beta_ms: 1}, inputs: [first], max_batch: 4}
output: second
"""


def two() -> PipelineSpec:
    return parse_spec(TWO_STAGES, file="two.yaml", root="")


def number(figures: Figures, family: str, *labels: str) -> float:
    """The sample with these labels behind the shard's."""
    (found,) = [value for given, value in figures.samples[family] if given == ["s0", *labels]]
    assert not isinstance(found, HistogramFigures)
    return found


def count(figures: Figures, family: str, *labels: str) -> int:
    """How many values the histogram with these labels has."""
    (found,) = [value for given, value in figures.samples[family] if given == ["s0", *labels]]
    assert isinstance(found, HistogramFigures)
    return sum(found.buckets)


def check(figures: Figures) -> None:
    """Each sample is as its family says, and there once."""
    assert set(figures.samples) == {family.name for family in SHARD}
    for name, samples in figures.samples.items():
        family = BY_NAME[name]
        assert len({tuple(labels) for labels, _ in samples}) == len(samples), name
        for labels, value in samples:
            assert len(labels) == len(family.labels), name
            assert all(isinstance(label, str) for label in labels)
            if family.kind == "histogram":
                assert isinstance(value, HistogramFigures)
                assert len(value.buckets) == len(family.bounds) + 1
            else:
                assert isinstance(value, (int, float))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(figures), type=Figures) == figures


def test_all_families_of_a_shard_that_serves(cluster: Cluster, echo: PipelineSpec) -> None:
    cluster.start(trace_sample=1.0)
    cluster.serve(echo, two())
    client = cluster.client()
    for _ in range(3):
        client.infer("echo", b"x")
    for _ in client.map("two", [b"y"] * 12):
        pass
    with pytest.raises(Rejected):
        client.infer("nobody", b"z")
    cluster.settle(ok=15, rejected=1)
    source = cluster.shard.source
    cluster.eventually(
        lambda: count(source.figures(), "laxity_request_latency_seconds", "two") == 12, "a second is over"
    )
    figures = source.figures()
    check(figures)
    assert [name for name, samples in figures.samples.items() if not samples] == []
    assert (figures.process, figures.name, figures.ready) == ("shard", "s0", "")
    assert number(figures, "laxity_requests_submitted", "two") == 12
    assert number(figures, "laxity_requests", "two", "", "ok") == 12
    assert number(figures, "laxity_requests", "", "", "rejected") == 1
    assert number(figures, "laxity_requests_in_flight", "two") == 0
    assert count(figures, "laxity_request_latency_seconds", "two") == 12
    for stage in ("first", "second"):
        assert number(figures, "laxity_stage_arrivals", "two", stage) == 12
        assert number(figures, "laxity_requests", "two", stage, "dropped") == 0
        for family in ("budget_at_enqueue", "budget_at_dispatch", "batch_wait"):
            assert count(figures, f"laxity_stage_{family}_seconds", "two", stage) == 12
        for kind in ("forced", "chosen"):
            assert count(figures, "laxity_stage_queueing_seconds", "two", stage, kind) == 12
        batches = number(figures, "laxity_batches", "two", stage, "ok")
        assert 3 <= batches <= 12
        for family in ("execution_seconds", "batch_size", "window_slack_seconds", "prediction_error_seconds"):
            assert count(figures, f"laxity_stage_{family}", "two", stage) == batches
        assert number(figures, "laxity_stage_devices", "two", stage) == 1
        assert number(figures, "laxity_stage_order", "two", stage, "lbf") == 1
    assert number(figures, "laxity_pipeline_slo_seconds", "two") == 20.0
    assert number(figures, "laxity_pipeline_admission_ratio", "two") == 1.0
    assert number(figures, "laxity_clients") == 1
    assert number(figures, "laxity_agents") == 1
    assert number(figures, "laxity_devices") == 1
    assert number(figures, "laxity_traces") == 16


@pytest.fixture
def dealer() -> Iterator[Callable[[str], Callable[..., type]]]:
    """Connects DEALERs to a shard's frontend. Each sends a message and returns the type of its answer."""
    context = zmq.Context()

    def connect(address: str) -> Callable[..., type]:
        socket = context.socket(zmq.DEALER)
        socket.connect(address)

        def say(message: protocol.FromClient | bytes) -> type:
            socket.send(message if isinstance(message, bytes) else protocol.encode(message))
            assert socket.poll(30_000), "no answer"
            return type(protocol.decode_to_client(socket.recv_multipart()[0]))

        return say

    yield connect
    context.destroy(0)


def test_counters_of_the_shell(
    cluster: Cluster, echo: PipelineSpec, dealer: Callable[[str], Callable[..., type]]
) -> None:
    agent = cluster.serve(echo)
    source = cluster.shard.source
    first, second = dealer(cluster.shard.frontend), dealer(cluster.shard.frontend)
    assert first(Hello(VERSION, "one")) is Welcome
    assert first(Heartbeat()) is Heartbeat
    assert second(Hello(VERSION, "one")) is Welcome
    assert second(b"nonsense") is Goodbye
    figures = source.figures()
    assert number(figures, "laxity_heartbeats", "client") == 1
    assert number(figures, "laxity_reconnects", "client") == 1
    assert number(figures, "laxity_malformed_messages") == 1
    assert number(figures, "laxity_agents_lost") == number(figures, "laxity_reconnects", "agent") == 0
    # An agent of the same name takes the place of the first one.
    twin = cluster.lone_agent(name=agent.agent.config.name)
    twin.hold(echo)
    twin.connect(cluster.shard.backend)
    cluster.eventually(lambda: number(source.figures(), "laxity_reconnects", "agent") >= 1, "it is known again")
    assert number(source.figures(), "laxity_agents_lost") >= 1


def test_figures_are_read_while_everything_changes(cluster: Cluster, echo: PipelineSpec) -> None:
    cluster.serve(echo, two())
    client = cluster.client()
    ended = threading.Event()
    errors: list[BaseException] = []
    seen: list[Figures] = []

    def scrape() -> None:
        try:
            while not ended.wait(0.005):
                seen.append(cluster.shard.source.figures())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        _busy(cluster, client)
    finally:
        ended.set()
        thread.join()
    assert not errors
    assert len(seen) > 1
    submitted = []
    for figures in seen:
        check(figures)
        submitted.append(number(figures, "laxity_requests_submitted", "echo"))
    assert submitted == sorted(submitted)


def _busy(cluster: Cluster, client: Client) -> None:
    """Requests, and pipelines that come and go."""
    for turn in range(6):
        spec = parse_spec(TWO_STAGES.replace("two", f"more{turn % 3}"), file="more.yaml", root="")
        cluster.shard.apply(spec)
        for _ in client.map("echo", [b"x"] * 10):
            pass
        client.infer("two", b"x")
        if turn % 2:
            cluster.shard.delete(spec.name)


def test_stages_beyond_the_most_share_their_series(cluster: Cluster) -> None:
    cluster.start()
    names = [f"p{at}" for at in range(MOST_STAGES // 2 + 2)]
    for name in names:
        cluster.shard.apply(parse_spec(TWO_STAGES.replace("two", name), file="p.yaml", root=""))
    client = cluster.client()
    futures = [client.submit(name, b"x") for name in names[-2:]]
    cluster.wait_for(lambda status: status.in_flight == 2, "they wait, as nobody holds their models")
    source = cluster.shard.source
    cluster.eventually(lambda: bool(source.figures().samples["laxity_stage_arrivals"][-1][1]), "a second is over")
    figures = source.figures()
    check(figures)
    assert len(figures.samples["laxity_stage_queue_depth"]) == MOST_STAGES + 1
    assert number(figures, "laxity_requests_submitted", OTHER) == 2
    assert number(figures, "laxity_requests_in_flight", OTHER) == 2
    assert number(figures, "laxity_stage_arrivals", OTHER, "") == 2
    assert number(figures, "laxity_stage_queue_depth", OTHER, "") == 2
    assert not any(future.done() for future in futures)
    assert len(figures.samples["laxity_requests_submitted"]) <= MOST_STAGES // 2 + 2


def test_without_metrics_there_is_what_shards_count_of_themselves(cluster: Cluster, echo: PipelineSpec) -> None:
    cluster.start(metrics=False, traces=0)
    cluster.serve(echo)
    assert cluster.client().infer("echo", b"x") == b"x"
    figures = cluster.shard.source.figures()
    check(figures)
    assert number(figures, "laxity_agents") == 1
    assert figures.samples["laxity_requests"] == figures.samples["laxity_stage_arrivals"] == []
    assert cluster.shard.source.trace("nobody-1") is None
    assert cluster.shard.source.traces(7, 10) == (7, [])
    report, _ = cluster.shard.report()
    assert report.pipelines == []


def test_who_does_not_serve_says_so(cluster: Cluster) -> None:
    cluster.start()
    cluster.status()
    source = cluster.shard.source
    assert source.figures().ready == ""
    cluster.stop_shard()
    assert "ended" in source.figures().ready
