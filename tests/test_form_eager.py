"""How the peers form batches, on hand-made queues. l(b) = 5 b + 5 ms throughout: 10, 15, 20, 25, ..."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker.engine.formed import Formed
from broker.engine.plan import Pipeline, StagePlan
from broker.engine.policy import make_policy
from broker.engine.predictor import LatencyTable
from broker.engine.request import Client, MapGroup, Request, Task
from broker.engine.stage import Stage
from laxity.payload import encode

MS = 1e-3
CLIENT = Client("c")
PAYLOAD = encode(None)
TABLE = LatencyTable(32, [(1, 10 * MS), (2, 15 * MS)])


class Peer:
    """One stage under a peer's policy, with requests that came in the order given and are due at these ms."""

    def __init__(self, policy: str, *due_ms: float, target: int, remaining_ms: float = 0.0) -> None:
        self.stage = Stage("p@1/s", "", 32, 10_000)
        plan = StagePlan("s", self.stage, [(-1, "")], False, 100)
        self.pipeline = Pipeline("p", 10.0, [plan], [("", 0, "")], make_policy(policy, {}))
        self.stage.target = self.stage.ceiling = target
        self.stage.remaining = remaining_ms * MS
        self.stage.devices = 1
        self.tasks = [self._task(due, -1, None) for due in due_ms]

    def _task(self, due_ms: float, item: int, group: MapGroup | None) -> Task:
        request = Request(CLIENT, 0, self.pipeline, 0.0, due_ms * MS, 0, PAYLOAD, False)
        task = Task(request, self.stage, 0, item, group, PAYLOAD, 0.0)
        self.stage.push(task)
        return task

    def map_request(self, due_ms: float, items: int) -> list[Task]:
        group = MapGroup(items)
        return [self._task(due_ms, item, group) for item in range(items)]

    def form(self, start_ms: float = 0.0) -> Formed:
        return self.stage.policy.form.form(self.stage, TABLE, start_ms * MS)

    def waiting(self) -> list[Task]:
        return list(self.stage.queue)


# ---- naive ---------------------------------------------------------------------------------------


def test_naive_takes_all_up_to_the_target_in_the_order_of_arrival() -> None:
    peer = Peer("naive", 30, 1, 20, 10, target=3)
    formed = peer.form(start_ms=50)
    assert formed.batch == peer.tasks[:3]
    assert formed.dropped == []
    assert peer.waiting() == peer.tasks[3:]


# ---- clipper++ -----------------------------------------------------------------------------------


def test_clipper_drops_only_what_is_overdue_before_it_starts() -> None:
    """Started at 5: the second was due at 4. The third is due when it starts, and is run although that is futile."""
    peer = Peer("clipper++", 50, 4, 5, 100, 100, target=3)
    first, overdue, due_now, fourth, fifth = peer.tasks
    formed = peer.form(start_ms=5)
    assert formed.batch == [first, due_now, fourth]
    assert formed.dropped == [overdue]
    assert formed.short == pytest.approx([1 * MS])
    assert peer.waiting() == [fifth]


# ---- nexus ---------------------------------------------------------------------------------------


def test_nexus_drops_whom_the_batch_being_filled_would_not_meet() -> None:
    """A batch of 4 ends at 25."""
    peer = Peer("nexus", 60, 24, 25, 50, 70, target=4)
    c, late, a, b, d = peer.tasks
    formed = peer.form()
    assert formed.dropped == [late]
    assert formed.short == pytest.approx([1 * MS])
    assert formed.batch == [a, b, c, d]


def test_nexus_shrinks_the_batch_when_the_queue_runs_short() -> None:
    """Three wait, a batch of 3 ends at 20: the first is dropped. The second makes it in the batch of 2, until 15."""
    peer = Peer("nexus", 19, 19.5, 100, target=8)
    formed = peer.form()
    assert formed.dropped == peer.tasks[:1]
    assert formed.short == pytest.approx([1 * MS])
    assert formed.batch == peer.tasks[1:]


def test_nexus_does_not_shrink_while_enough_wait() -> None:
    """A batch of 2 ends at 15, and there are always two more: the first two are dropped."""
    peer = Peer("nexus", 12, 14, 15, 16, 17, target=2)
    formed = peer.form()
    assert formed.dropped == peer.tasks[:2]
    assert formed.short == pytest.approx([3 * MS, 1 * MS])
    assert formed.batch == peer.tasks[2:4]
    assert peer.waiting() == peer.tasks[4:]


def test_nexus_may_drop_all() -> None:
    """Batches of 3, 2 and 1 end at 20, 15 and 10."""
    peer = Peer("nexus", 7, 8, 9, target=3)
    formed = peer.form()
    assert formed.batch == []
    assert formed.dropped == peer.tasks
    assert formed.short == pytest.approx([13 * MS, 7 * MS, 1 * MS])


def test_nexus_counts_the_start_and_what_is_behind_the_stage() -> None:
    """5 + 10 + 7."""
    peer = Peer("nexus", 21, 22, target=1, remaining_ms=7)
    formed = peer.form(start_ms=5)
    assert formed.dropped == peer.tasks[:1]
    assert formed.batch == peer.tasks[1:]


# ---- shepherd ------------------------------------------------------------------------------------


def test_shepherd_takes_as_many_as_the_earliest_deadline_allows() -> None:
    """Until 22: a batch of 3 ends at 20, one of 4 at 25."""
    peer = Peer("shepherd", 100, 100, 22, 100, 100, target=8)
    formed = peer.form()
    assert formed.dropped == []
    assert formed.batch == [peer.tasks[2], *peer.tasks[:2]]
    assert peer.waiting() == peer.tasks[3:]


def test_shepherd_drops_who_misses_even_alone() -> None:
    """The one until 9 would miss in a batch of one; the one until 10 runs alone."""
    peer = Peer("shepherd", 9, 10, 100, target=8)
    formed = peer.form()
    assert formed.dropped == peer.tasks[:1]
    assert formed.short == pytest.approx([1 * MS])
    assert formed.batch == peer.tasks[1:2]


def test_shepherd_takes_the_largest_batch_at_most() -> None:
    peer = Peer("shepherd", *[1000] * 9, target=8)
    assert peer.form().batch == peer.tasks[:8]


# ---- clockwork -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("waiting", "size"), [(1, 1), (2, 2), (3, 2), (7, 4), (8, 8), (15, 8), (16, 16), (32, 16)])
def test_clockworks_batch_sizes(waiting: int, size: int) -> None:
    peer = Peer("clockwork", *[1000] * waiting, target=32)
    assert peer.form().batch == peer.tasks[:size]


def test_clockwork_takes_the_largest_size_that_enough_of_them_meet_and_leaves_the_more_urgent() -> None:
    """Four of them meet the end of a batch of 4 (25), not eight that of one of 8 (45)."""
    peer = Peer("clockwork", 24, 25, 44, 45, 45, 45, 45, 45, target=32)
    formed = peer.form()
    assert formed.dropped == []
    assert formed.batch == peer.tasks[1:5]
    assert peer.waiting() == [peer.tasks[0], *peer.tasks[5:]]


def test_clockwork_runs_one_alone_where_no_two_meet_the_larger_batch() -> None:
    peer = Peer("clockwork", 13, 12, 14, target=32)
    formed = peer.form()
    assert formed.dropped == []
    assert formed.batch == [peer.tasks[1]]
    assert peer.waiting() == [peer.tasks[0], peer.tasks[2]]


def test_clockwork_drops_who_misses_even_alone() -> None:
    peer = Peer("clockwork", 11, 12, 30, 30, target=32, remaining_ms=2)
    formed = peer.form()
    assert formed.dropped == peer.tasks[:1]
    assert formed.short == pytest.approx([1 * MS])
    assert formed.batch == peer.tasks[2:]


def test_clockwork_is_bounded_by_the_stages_largest_batch() -> None:
    peer = Peer("clockwork", *[1000] * 16, target=6)
    assert len(peer.form().batch) == 4


# ---- pard ----------------------------------------------------------------------------------------


def test_pard_estimates_with_the_typical_batch() -> None:
    """Batches are of 4 as a rule: those until 24 are dropped, though they would be the first ones of this one."""
    peer = Peer("pard", 24, 25, 100, target=8, remaining_ms=0)
    peer.stage.granted(4)
    formed = peer.form()
    assert formed.dropped == peer.tasks[:1]
    assert formed.short == pytest.approx([1 * MS])
    assert formed.batch == peer.tasks[1:]


def test_pard_estimates_with_the_batch_itself_where_it_is_larger() -> None:
    """Batches are of 2 as a rule (15); the third one ends at 20."""
    peer = Peer("pard", 15, 19, 19.5, 26, target=4)
    peer.stage.granted(2)
    formed = peer.form()
    assert formed.dropped == [peer.tasks[2]]
    assert formed.short == pytest.approx([0.5 * MS])
    assert formed.batch == [peer.tasks[0], peer.tasks[1], peer.tasks[3]]


def test_pard_before_its_first_batch_takes_the_target_for_typical() -> None:
    peer = Peer("pard", 24, 25, target=4)
    formed = peer.form()
    assert formed.dropped == peer.tasks[:1]
    assert formed.batch == peer.tasks[1:]


def test_pard_fills_up_what_is_collected_already() -> None:
    """Three of at most 5 are there: the fourth ends at 25, the fifth at 30; no room for a sixth."""
    peer = Peer("pard", 24, 25, 29, 30, 100, target=5)
    peer.stage.granted(1)
    peer.stage.collected = 3
    formed = peer.form()
    assert formed.dropped == [peer.tasks[0], peer.tasks[2]]
    assert formed.short == pytest.approx([1 * MS, 1 * MS])
    assert formed.batch == [peer.tasks[1], peer.tasks[3]]
    assert peer.waiting() == peer.tasks[4:]


def test_pard_takes_the_highest_budget_first_under_overload() -> None:
    peer = Peer("pard", 30, 100, 50, target=2)
    peer.stage.order.highest_first = True
    formed = peer.form()
    assert formed.batch == [peer.tasks[1], peer.tasks[2]]
    assert formed.dropped == []
    assert peer.waiting() == peer.tasks[:1]


def test_pard_counts_what_is_behind_the_stage_in_both_orders() -> None:
    """3 + 10 + 20."""
    for highest_first in (False, True):
        peer = Peer("pard", 32, 33, target=1, remaining_ms=20)
        peer.stage.order.highest_first = highest_first
        formed = peer.form(start_ms=3)
        assert formed.batch == peer.tasks[1:]
        # With the highest budget first the batch is full before the other's turn comes.
        assert formed.dropped == ([] if highest_first else peer.tasks[:1])


def test_pard_in_arrival_order_drops_by_deadlines_all_the_same() -> None:
    peer = Peer("pard-fcfs", 100, 24, 50, target=4)
    formed = peer.form()
    assert formed.dropped == [peer.tasks[1]]
    assert formed.batch == [peer.tasks[0], peer.tasks[2]]


# ---- all of them ---------------------------------------------------------------------------------

LOOK_AHEAD = ["nexus", "shepherd", "clockwork", "pard"]
PEERS = ["naive", "clipper++", *LOOK_AHEAD]


@pytest.mark.parametrize("policy", PEERS)
def test_nothing_waits(policy: str) -> None:
    formed = Peer(policy, target=4).form()
    assert (formed.batch, formed.dropped, formed.short) == ([], [], [])


@pytest.mark.parametrize("policy", LOOK_AHEAD)
def test_a_map_request_that_cannot_be_served_whole_is_not_begun(policy: str) -> None:
    """Four items in batches of 2 take twice 15 on one device."""
    peer = Peer(policy, target=2)
    tasks = peer.map_request(29, 4)
    formed = peer.form()
    assert formed.batch == []
    assert formed.dropped[0] is tasks[0]
    assert formed.short[0] == pytest.approx(1 * MS)


@pytest.mark.parametrize("policy", PEERS)
def test_a_map_request_once_begun_is_not_dropped_any_more(policy: str) -> None:
    peer = Peer(policy, target=2)
    tasks = peer.map_request(30, 4)
    assert peer.form().batch == tasks[:2]
    formed = peer.form(start_ms=29)
    # shepherd adds nobody for whom the earliest deadline leaves no time; clockwork stays at one.
    assert formed.batch == tasks[2 : 2 + len(formed.batch)] != []
    assert formed.dropped == []


@example("pard", [10, 15], 2, 0, 0, False, 1)
@given(
    st.sampled_from(PEERS),
    st.lists(st.integers(1, 200), max_size=40),
    st.integers(1, 20),
    st.integers(0, 40),
    st.integers(0, 40),
    st.booleans(),
    st.integers(0, 8),
)
def test_every_request_is_taken_dropped_or_waits_and_who_is_taken_makes_it(
    policy: str, dues: list[int], target: int, start: int, remaining: int, highest_first: bool, typical: int
) -> None:
    peer = Peer(policy, *dues, target=target, remaining_ms=remaining)
    peer.stage.order.highest_first = highest_first and policy == "pard"
    if typical:
        peer.stage.granted(typical)
    formed = peer.form(start)
    assert sorted(map(id, [*formed.batch, *formed.dropped, *peer.waiting()])) == sorted(map(id, peer.tasks))
    assert len(formed.batch) <= target
    assert len(formed.dropped) == len(formed.short)
    assert all(short > 0.0 for short in formed.short)
    if policy in LOOK_AHEAD:
        for number, task in enumerate(formed.batch, 1):
            # pard decides on one after the other, by the batch so far or the typical one: it does not go back on it.
            size = max(number, peer.stage.typical_batch()) if policy == "pard" else len(formed.batch)
            assert start * MS + TABLE.upper(size) + remaining * MS <= task.due + 1e-9
    if not formed.batch:
        assert peer.waiting() == [], "who waits on must be waiting for a device"
