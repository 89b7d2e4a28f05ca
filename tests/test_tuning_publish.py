"""A shard's reports in the store, and what the leader writes back: a real shard, a real store."""

from __future__ import annotations

import threading
import time

import msgspec

from broker.process import TuningFollower
from broker.reporting import reporter
from cluster.decoded import Decoded
from cluster.membership import Follower, Membership
from cluster.records import Paths, TuningRecord, decode, encode
from cluster.store.base import StoreError
from cluster.store.memory import MemoryStore
from cluster.tuning.report import ReportRecord
from pipelines.spec import PipelineSpec

PATHS = Paths("test")


class Faulty(MemoryStore):
    """A store some of whose writes hang, or fail, as those of an etcd without a quorum do."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix
        self.healthy = threading.Event()
        self.healthy.set()
        self.hangs = threading.Event()
        """Set while a write hangs."""
        self.fails = False
        self.failed = 0

    def put(self, key: str, value: bytes, lease: int = 0) -> int:
        if key.startswith(self._prefix):
            if self.fails:
                self.failed += 1
                raise StoreError("no quorum")
            if not self.healthy.is_set():
                self.hangs.set()
                self.healthy.wait(30.0)
        return super().put(key, value, lease)


class Reporting:
    """A reporter for a cluster's shard."""

    def __init__(self, cluster, store: MemoryStore) -> None:  # type: ignore[no-untyped-def]
        self.cluster = cluster
        self.store = store
        self.membership = Membership(store, PATHS.broker("s0"))
        self.membership.publish(b"{}")
        self._watch = store.watch(PATHS.reports, 1)
        self._seen: list[ReportRecord] = []
        self.reporter = reporter(cluster.shard.report, store, PATHS.report("s0"), self.membership)

    def report(self) -> ReportRecord | None:
        entry = self.store.get(PATHS.report("s0"))
        return decode(ReportRecord, entry.key, entry.value) if entry is not None else None

    def next_report(self) -> ReportRecord:
        """The one after that which was last returned."""
        while not self._seen:
            events = self._watch.get(30.0)
            assert events, "there is no further report"
            self._seen += [decode(ReportRecord, event.key, event.entry.value) for event in events if event.entry]
        return self._seen.pop(0)


def test_reports_are_published_under_the_shards_lease(cluster, echo: PipelineSpec) -> None:  # type: ignore[no-untyped-def]
    cluster.serve(echo)
    reporting = Reporting(cluster, MemoryStore())
    reporting.reporter.start()
    try:
        assert reporting.report() is None  # not registered yet
        reporting.membership.beat(time.monotonic())
        report = reporting.next_report()
        while not report.stages[0].devices:  # its agent has still to be noticed
            report = reporting.next_report()
        assert report.agents == ["a0"]
        assert list(report.in_flight) == [f"echo@{echo.model_key('echo').partition('@')[2].rpartition('/')[0]}"]
        assert report.stages[0].model == echo.model_key("echo")
        client = cluster.client()
        for number in range(5):
            assert client.infer("echo", number) == number
        arrived = started = 0
        while started < 5:
            report = reporting.next_report()
            arrived += report.stages[0].arrived
            started += report.stages[0].started
        assert (arrived, started) == (5, 5)
        entry = reporting.store.get(PATHS.report("s0"))
        assert entry is not None
        assert entry.lease == reporting.membership.lease
        reporting.membership.leave()
        assert reporting.report() is None
    finally:
        reporting.reporter.stop()


def test_a_push_that_hangs_holds_nothing_up(cluster, echo: PipelineSpec) -> None:  # type: ignore[no-untyped-def]
    """Requests are answered and the lease is kept while it hangs, there is no second push, and what was not told is
    told afterwards."""
    cluster.serve(echo)
    store = Faulty(PATHS.reports)
    reporting = Reporting(cluster, store)
    reporting.membership.beat(time.monotonic())
    reporting.reporter.start()
    try:
        reporting.next_report()
        store.healthy.clear()
        assert store.hangs.wait(30.0)
        before = reporting.report()
        assert before is not None
        client = cluster.client()
        for each in range(20):
            assert client.infer("echo", each) == each
        reporting.membership.publish(b'{"pid": 2}')
        reporting.membership.beat(time.monotonic())
        entry = store.get(PATHS.broker("s0"))
        assert entry is not None
        assert entry.value == b'{"pid": 2}'
        assert reporting.report() == before
        store.healthy.set()
        told = 0
        while told < 20:
            report = reporting.next_report()
            told += report.stages[0].arrived
        assert told == 20
        assert report.number == before.number + 2  # after the one that hung
    finally:
        store.healthy.set()
        reporting.reporter.stop()


def test_reports_go_on_after_an_outage(cluster, echo: PipelineSpec) -> None:  # type: ignore[no-untyped-def]
    cluster.serve(echo)
    store = Faulty(PATHS.reports)
    reporting = Reporting(cluster, store)
    reporting.membership.beat(time.monotonic())
    store.fails = True
    reporting.reporter.start()
    try:
        cluster.eventually(lambda: store.failed >= 1, "a report failed")
        store.fails = False
        reporting.next_report()
        store.revoke(reporting.membership.lease)  # it ended while the store was away
        assert reporting.report() is None
        # Puts are refused until the member has a new lease.
        reporting.membership.publish(b'{"pid": 3}')
        cluster.eventually(
            lambda: reporting.membership.beat(time.monotonic()) or reporting.report() is not None, "it reports again"
        )
    finally:
        reporting.reporter.stop()


def test_the_thread_ends_with_the_shard(cluster, echo: PipelineSpec) -> None:  # type: ignore[no-untyped-def]
    """Also where it was never started, and when the shard has gone before."""
    cluster.serve(echo)
    store = MemoryStore()
    reporting = Reporting(cluster, store)
    reporting.reporter.stop()
    reporting = Reporting(cluster, store)
    reporting.membership.beat(time.monotonic())
    reporting.reporter.start()
    reporting.next_report()
    cluster.stop_shard()
    reporting.reporter.stop()


def test_a_shard_follows_what_is_tuned(cluster, echo: PipelineSpec) -> None:  # type: ignore[no-untyped-def]
    """An admission of nothing at all shows at once in what its service is answered, and so does its end."""
    cluster.serve(echo)
    store = MemoryStore()
    follower = Follower(store, (PATHS.tuning,))
    decoded = Decoded()
    tuning = TuningFollower(cluster.shard)
    record = TuningRecord(0.1, 5.0, 0.0, {"echo": 0.1}, "echo")

    def follow() -> None:
        while follower.poll(0.0):
            decoded.update(follower.entries)
            tuning.update(decoded.under(TuningRecord, PATHS.tuning))
        cluster.status()  # the shard has come to it

    store.put(PATHS.tuned("echo"), encode(record))
    store.put(PATHS.tuned("broken"), b"{")
    follow()
    client = cluster.client()
    outcome = client.submit("echo", 1)
    cluster.eventually(outcome.done, "it is answered")
    error = outcome.exception()
    assert error is not None
    assert "stage 'echo' cannot keep up: 0% of the requests are let in at present" in str(error)
    store.put(PATHS.tuned("echo"), encode(msgspec.structs.replace(record, admission=1.0)))
    follow()
    assert client.infer("echo", 2) == 2
    follower.close()
