"""Who leads, and that nobody else can write."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.election import Election, NotLeaderError
from cluster.store.base import Operation, Put, StoreError, Unchanged
from cluster.store.memory import MemoryStore

KEY = "/laxity/c/leader"
TTL = 6.0
FENCED = 4.0
"""Two thirds of the TTL."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Unreliable(MemoryStore):
    """A store whose writes can be made to fail: ``unsaid`` ones are done all the same."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock=clock)
        self.away = False
        self.unsaid = False

    def transaction(self, conditions: Sequence[Unchanged], operations: Sequence[Operation]) -> int | None:
        if self.away:
            raise StoreError("away")
        revision = super().transaction(conditions, operations)
        if self.unsaid:
            raise StoreError("no answer")
        return revision

    def keep_alive(self, lease: int) -> bool:
        if self.away:
            raise StoreError("away")
        return super().keep_alive(lease)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Unreliable:
    return Unreliable(clock)


def stand(store: MemoryStore, name: str) -> Election:
    return Election(store, KEY, name.encode(), TTL)


def leading(store: MemoryStore) -> bytes | None:
    entry = store.get(KEY)
    return entry.value if entry else None


def test_the_first_leads_and_the_others_wait(store: Unreliable, clock: Clock) -> None:
    first, second = stand(store, "first"), stand(store, "second")
    assert not first.is_leader(clock.now)
    for _ in range(20):
        first.beat(clock.now)
        second.beat(clock.now)
        assert first.is_leader(clock.now)
        assert not second.is_leader(clock.now)
        clock.now += TTL / 5
    assert leading(store) == b"first"


def test_when_the_leader_dies_another_leads_as_soon_as_the_lease_has_ended(store: Unreliable, clock: Clock) -> None:
    first, second = stand(store, "first"), stand(store, "second")
    first.beat(clock.now)
    died = clock.now
    while not second.is_leader(clock.now):
        clock.now += 0.5
        second.beat(clock.now)
    assert clock.now == died + TTL
    assert leading(store) == b"second"


def test_who_resigns_is_followed_at_once(store: Unreliable, clock: Clock) -> None:
    first, second = stand(store, "first"), stand(store, "second")
    first.beat(clock.now)
    first.resign()
    assert not first.is_leader(clock.now)
    second.beat(clock.now)
    assert second.is_leader(clock.now)
    first.resign()
    assert leading(store) == b"second"


def test_a_leader_cut_off_takes_itself_for_none_before_its_lease_ends(store: Unreliable, clock: Clock) -> None:
    leader = stand(store, "a")
    leader.beat(clock.now)
    store.away = True
    clock.now += FENCED - 0.1
    leader.beat(clock.now)
    assert leader.is_leader(clock.now)
    clock.now += 0.1
    leader.beat(clock.now)
    assert not leader.is_leader(clock.now)
    with pytest.raises(NotLeaderError, match="no keep-alive"):
        leader.transaction(clock.now, [], [Put("/a", b"")])
    store.away = False
    term = store.get(KEY)
    leader.beat(clock.now)
    assert leader.is_leader(clock.now)
    assert store.get(KEY) == term


def test_a_leader_frozen_and_released_writes_nothing(store: Unreliable, clock: Clock) -> None:
    old, new = stand(store, "old"), stand(store, "new")
    old.beat(clock.now)
    frozen = clock.now
    clock.now += TTL
    new.beat(clock.now)
    # Its last look at the clock was before.
    assert old.is_leader(frozen)
    with pytest.raises(NotLeaderError, match="nothing was written"):
        old.transaction(frozen, [], [Put("/plan", b"old")])
    assert not old.is_leader(frozen)
    assert new.transaction(clock.now, [], [Put("/plan", b"new")]) is not None
    old.beat(clock.now)
    entry = store.get("/plan")
    assert entry is not None
    assert entry.value == b"new"


def test_a_leader_writes_where_its_conditions_hold(store: Unreliable, clock: Clock) -> None:
    leader = stand(store, "a")
    leader.beat(clock.now)
    revision = leader.transaction(clock.now, [Unchanged("/plan", 0)], [Put("/plan", b"1")])
    assert revision == store.list("/").revision
    assert leader.transaction(clock.now, [Unchanged("/plan", 0)], [Put("/plan", b"2")]) is None
    assert leader.is_leader(clock.now)
    with pytest.raises(ValueError, match="belongs to the election"):
        leader.transaction(clock.now, [], [Put(KEY, b"mine")])


def test_whose_key_is_removed_stands_again(store: Unreliable, clock: Clock) -> None:
    leader = stand(store, "a")
    leader.beat(clock.now)
    store.delete(KEY)
    with pytest.raises(NotLeaderError):
        leader.transaction(clock.now, [], [Put("/plan", b"")])
    leader.beat(clock.now)
    assert leader.transaction(clock.now, [], [Put("/plan", b"")]) is not None
    store.delete(KEY)
    other = stand(store, "b")
    other.beat(clock.now)
    clock.now += TTL / 4
    leader.beat(clock.now)
    assert not leader.is_leader(clock.now)
    assert other.is_leader(clock.now)


def test_an_election_that_the_store_does_not_confirm_is_recognised(store: Unreliable, clock: Clock) -> None:
    leader = stand(store, "a")
    store.unsaid = True
    leader.beat(clock.now)
    assert leading(store) == b"a"
    assert not leader.is_leader(clock.now)
    store.unsaid = False
    leader.beat(clock.now)
    assert leader.is_leader(clock.now)
    assert leader.transaction(clock.now, [], [Put("/plan", b"")]) is not None


def test_a_key_that_is_nobodys_makes_nobody_leader(store: Unreliable, clock: Clock) -> None:
    store.put(KEY, b"by hand")
    candidate = stand(store, "a")
    candidate.beat(clock.now)
    assert not candidate.is_leader(clock.now)


class Terms(RuleBasedStateMachine):
    """Candidates that freeze, are cut off and act on old readings of their clocks: their writes never overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.store = Unreliable(self.clock)
        self.candidates = [stand(self.store, str(number)) for number in range(3)]
        self.offsets = [0.0, 5000.0, -800.0]
        """Each host's clock has its own beginning."""
        self.readings = [self.now(number) for number in range(3)]
        self.written: list[int] = []
        """Who wrote, in the order of the store's revisions."""
        self.terms: list[int] = []

    def now(self, number: int) -> float:
        return self.clock.now + self.offsets[number]

    @rule(seconds=st.sampled_from([0.5, 2.0, TTL]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(number=st.integers(0, 2), trouble=st.sampled_from(["", "", "", "away", "unsaid"]))
    def beat(self, number: int, trouble: str) -> None:
        self.store.away = trouble == "away"
        self.store.unsaid = trouble == "unsaid"
        self.readings[number] = self.now(number)
        self.candidates[number].beat(self.readings[number])
        self.store.away = self.store.unsaid = False

    @rule(number=st.integers(0, 2), fresh=st.booleans())
    def write(self, number: int, fresh: bool) -> None:
        """With an old reading: the process was frozen between the look at the clock and the write."""
        if fresh:
            self.readings[number] = self.now(number)
        owner = self.store.get(KEY)
        try:
            revision = self.candidates[number].transaction(self.readings[number], [], [Put("/plan", b"%d" % number)])
        except NotLeaderError:
            return
        assert revision is not None
        assert owner is not None
        assert owner.value == b"%d" % number
        self.written.append(number)
        self.terms.append(owner.mod_revision)

    @rule(number=st.integers(0, 2))
    def resign(self, number: int) -> None:
        self.candidates[number].resign()

    @precondition(lambda self: len(self.written) > 1)
    @invariant()
    def terms_follow_one_another(self) -> None:
        assert self.terms == sorted(self.terms)
        assert len(set(self.terms)) == len(set(zip(self.terms, self.written, strict=True)))

    @invariant()
    def one_leads_at_most(self) -> None:
        assert sum(candidate.is_leader(self.now(n)) for n, candidate in enumerate(self.candidates)) <= 1


TestTerms = Terms.TestCase
TestTerms.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
