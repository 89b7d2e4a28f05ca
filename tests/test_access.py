"""Who is let in: the directory of keys, and what becomes of connections, in virtual time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from broker.access import ENTER, MAY, Access, Task
from broker.connections import FAREWELL, IDLE, Connections
from broker.refusals import MOST, Refusals
from cluster.records import KeyRecord, PublicKey

ROLES = ("client", "node", "shard", "operator")


def record(role, *publics, **fields):
    """``publics``: each a name, or (name, until)."""
    pairs = [(each, None) if isinstance(each, str) else each for each in publics]
    return KeyRecord(role=role, publics=[PublicKey(name, 0.0, until) for name, until in pairs], **fields)


def admitted(**records):
    access = Access()
    access.admit(records)
    return access


# ---- the directory ---------------------------------------------------------------------------------


def test_nobody_is_let_in_before_the_directory_was_read():
    access = Access()
    refused = access.keeps_out(0.0, "A", "frontend")
    assert refused is not None
    assert refused.reason == "not_ready"
    access.admit({})
    refused = access.keeps_out(0.0, "A", "frontend")
    assert refused is not None
    assert refused.reason == "unknown_key"


def test_a_refusal_says_why():
    access = admitted(
        billing=record("client", "new", ("old", 50.0), ("ended", 0.0)), gone=record("client", "g", revoked=5.0)
    )
    assert access.keeps_out(49.9, "old", "frontend") is None
    expired = access.keeps_out(50.0, "old", "frontend")
    assert expired is not None
    assert expired.text == (
        "key 'billing' comes with a pair that was replaced, and good until 1970-01-01T00:00:50.000Z"
    )
    at_once = access.keeps_out(50.0, "ended", "frontend")
    assert at_once is not None
    assert at_once.text == "key 'billing' comes with a pair that was replaced"
    revoked = access.keeps_out(0.0, "g", "frontend")
    assert revoked is not None
    assert (revoked.reason, revoked.text) == ("revoked_key", "key 'gone' was revoked")
    role = access.keeps_out(0.0, "new", "backend")
    assert role is not None
    assert role.text == "key 'billing' is of role client, which does not come to the port for agents"
    task = access.forbids(0.0, "new", "frontend", Task.STORE)
    assert task is not None
    assert task.text == "key 'billing' is of role client, which may not upload files"


def test_the_roles_may_do_what_the_protocol_says():
    may = {role: {task.name for task in Task if role in MAY[task]} for role in ROLES}
    assert may == {
        "client": {"SUBMIT"},
        "operator": {"SUBMIT", "FETCH", "STORE", "TAP"},
        "node": {"SERVE", "FETCH"},
        "shard": {"FETCH"},
    }


@given(
    st.dictionaries(
        st.sampled_from("abcd"),
        st.tuples(
            st.sampled_from(ROLES),
            st.lists(
                st.tuples(st.sampled_from("UVWXYZ"), st.none() | st.floats(0, 100)),
                max_size=3,
                unique_by=lambda x: x[0],
            ),
            st.sampled_from([0.0, 7.0]),
        ),
    ),
    st.floats(0, 100),
    st.sampled_from("UVWXYZ"),
    st.sampled_from(["frontend", "backend"]),
    st.sampled_from(list(Task)),
)
def test_only_good_keys_of_the_right_role_are_let_in(records, now, public, domain, task):
    directory = {name: record(role, *pairs, revoked=revoked) for name, (role, pairs, revoked) in records.items()}
    access = Access()
    access.admit(directory)
    owner = next(
        (name for name in sorted(directory) if any(key.public == public for key in directory[name].publics)), None
    )
    good = owner is not None and public in directory[owner].good(now)
    role = directory[owner].role if owner is not None else None
    assert (access.keeps_out(now, public, domain) is None) == (good and role in ENTER[domain])
    assert (access.forbids(now, public, domain, task) is None) == (good and role in ENTER[domain] and role in MAY[task])
    known = access.known(public)
    assert (known.owner if known is not None else None) == owner


@given(st.lists(st.floats(0, 100), max_size=5), st.lists(st.floats(0, 120), min_size=1, max_size=20).map(sorted))
def test_whenever_a_key_has_ended_everybody_is_looked_at_again(untils, looks):
    access = Access()
    access.admit({"a": record("client", *((f"K{n}", until) for n, until in enumerate(untils)))})
    assert access.turned(0.0)
    before = 0.0
    for now in looks:
        assert access.turned(now) == any(before < until <= now for until in untils)
        before = now
    access.admit({})
    assert access.turned(before)
    assert not access.turned(before)


# ---- connections -----------------------------------------------------------------------------------


class ConnectionsMachine(RuleBasedStateMachine):
    """Peers come, speak, fall silent and go, and the numbers of their connections are used again."""

    MOST = 4

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.connections = Connections(self.MOST, 10.0)
        self.open = {}
        """Number: (since when it is to speak or None, whether it ever spoke)."""
        self.cut = {}
        self.next = 100

    def _collect(self):
        for cut in self.connections.take_cuts(self.now):
            assert cut.number in self.open
            self.cut[cut.number] = (cut, self.open.pop(cut.number))

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 9.0, 30.0]))
    def wait(self, seconds):
        self.now += seconds
        self._collect()

    @rule()
    def accept(self):
        number = next(n for n in range(100) if n not in self.open and n not in self.cut)
        silent = [n for n, (_, spoke) in self.open.items() if not spoke]
        full = len(self.open) >= self.MOST
        self.open[number] = (self.now + 10.0, False)
        self.connections.accepted(self.now, number, f"h:{number}")
        before = set(self.open)
        self._collect()
        if full:
            assert before - set(self.open) == {silent[0] if silent else number}

    @rule(stays=st.booleans(), data=st.data())
    def speak(self, stays, data):
        if self.open:
            number = data.draw(st.sampled_from(sorted(self.open)))
            due, _ = self.open[number]
            self.connections.heard(self.now, number, b"id%d" % number, "K", stays)
            parting = number not in self.connections.users() and due is not None
            if not parting:
                due = None if stays or due is None else self.now + IDLE
            self.open[number] = (due, True)

    @rule(data=st.data())
    def part(self, data):
        if self.open:
            number = data.draw(st.sampled_from(sorted(self.open)))
            self.connections.part(self.now, number)
            due, spoke = self.open[number]
            if due is None or due > self.now + FAREWELL or number in self.connections.users():
                self.open[number] = (self.now + FAREWELL, spoke)

    @rule(data=st.data())
    def end(self, data):
        numbers = sorted({*self.open, *self.cut})
        if numbers:
            number = data.draw(st.sampled_from(numbers))
            ended = self.connections.ended(number)
            assert ended.was_cut == (number in self.cut)
            assert ended.address == f"h:{number}"
            _, spoke = self.cut.pop(number)[1] if number in self.cut else self.open.pop(number)
            assert bool(ended.sender) == spoke

    @precondition(lambda self: self.open)
    @rule()
    def end_unknown(self):
        assert self.connections.ended(999) == (999, "", b"", False, False)

    @invariant()
    def never_more_than_the_most(self):
        assert len(self.connections) == len(self.open) <= self.MOST

    @invariant()
    def nobody_stays_beyond_its_time(self):
        dues = [due for due, _ in self.open.values() if due is not None]
        assert all(due > self.now - 1e-9 for due in dues)
        assert self.connections.due() <= min(dues, default=float("inf"))


ConnectionsTest = ConnectionsMachine.TestCase


def test_a_peer_that_is_forgotten_may_greet_again():
    connections = Connections(10, 10.0)
    connections.accepted(0.0, 7, "h:1")
    connections.heard(1.0, 7, b"id", "K", True)
    assert connections.take_cuts(1000.0) == []
    connections.forgotten(1000.0, 7)
    assert connections.take_cuts(1009.0) == []
    connections.heard(1009.0, 7, b"id", "K", True)
    assert connections.take_cuts(2000.0) == []
    connections.forgotten(2000.0, 7)
    (cut,) = connections.take_cuts(connections.due())
    assert (cut.number, cut.reason) == (7, "silent")
    assert connections.ended(7).sender == b"id"


# ---- what is said ----------------------------------------------------------------------------------


def test_what_goes_on_and_on_is_said_ever_more_seldom_and_counted(caplog):
    refusals = Refusals()
    for number in range(1000):
        refusals.note("unknown_key", "frontend", f"h:{number}", "h", "", "why")
    assert refusals.counts["unknown_key"] == 1000
    assert len(caplog.records) == 10
    assert caplog.messages[0] == "refused h:0 at the port for services: why"
    assert caplog.messages[-1] == "refused h:511 at the port for services: why (512 times by now)"
    caplog.clear()
    refusals.note("unknown_key", "frontend", "other:1", "other", "", "why")
    assert len(caplog.records) == 1, "another peer is said at once"
    refusals.note("role", "frontend", "h:1", "h", "billing", "key 'billing' may not fetch files")
    refusals.note("role", "frontend", "h:1", "h", "billing", "key 'billing' may not record requests")
    assert len(caplog.records) == 3, "each thing that the owner of a key may not do"
    caplog.clear()
    for number in range(3 * MOST):
        refusals.note("silent", "backend", f"host{number}:1", f"host{number}", "", "why")
    assert len(caplog.records) < MOST + 20
