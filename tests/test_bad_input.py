"""What services, agents and strangers send that is wrong: it is refused with a reason, and nobody else notices."""

from __future__ import annotations

import random
import socket

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strangers import Stranger, request, submit

from broker.errors import AddressInUse
from broker.shell import Shard, ShardConfig
from laxity import Client, LaxityError, Rejected, protocol
from laxity.payload import ArrayNode, BytesNode, ListNode, TextNode
from laxity.protocol import Done, Goodbye, Heartbeat, Hello, Pull, Ready, Result, Submit, Welcome
from nodes.agent import VersionRefused
from pipelines.load import parse_spec

MAPPED = """
name: mapped
slo: 30s
stages:
  each: {executor: emulated, profile: {alpha_ms: 0, beta_ms: 0}, map: true, max_items: 5, max_batch: 1}
output: each
"""


@pytest.fixture
def service(cluster):
    """Makes strangers at the shard's port for services, greeted already unless told otherwise."""
    made = []

    def make(greet=True, name="stranger", **options):
        stranger = Stranger(cluster.shard.frontend, protocol.decode_to_client, **options)
        made.append(stranger)
        if greet:
            stranger.send(Hello(protocol.VERSION, name))
            stranger.receive(Welcome)
        return stranger

    yield make
    for stranger in made:
        stranger.close()


@pytest.fixture
def node(cluster):
    """Makes strangers at the shard's port for agents."""
    made = []

    def make():
        made.append(Stranger(cluster.shard.backend, protocol.decode_to_agent))
        return made[-1]

    yield make
    for stranger in made:
        stranger.close()


@pytest.fixture
def hand_driven_backend(make_peer):
    """A shard's port for agents, where the test is the shard."""
    return make_peer("tcp://127.0.0.1:*", protocol.decode_from_agent)


@pytest.fixture
def bystander(cluster, echo):
    """Proves in the end that a service and an agent, there from the beginning, were not disturbed."""
    cluster.serve(echo)
    client = cluster.client()
    assert client.infer("echo", "before") == "before"
    yield client
    assert client.infer("echo", "after") == "after"
    status = cluster.settle()
    assert status.ended["ok"] >= 2
    assert cluster.agents[0].error is None


# ---- requests ---------------------------------------------------------------------------------


def test_what_the_client_refuses_never_reaches_the_shard(cluster, bystander):
    client = cluster.client()
    assert client.infer("echo", 1) == 1
    for payload in (object(), {1: 2}, [set()], 2**70):
        with pytest.raises(Rejected):
            client.infer("echo", payload)
    for slo in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(Rejected, match="SLO"):
            client.infer("echo", 1, slo=slo)
    with pytest.raises(Rejected, match="67108864 at most"):
        client.infer("echo", bytes(64 * 1024**2 + 1))
    cluster.settle(ok=2)


def test_what_the_shard_rejects(cluster, bystander, service):
    stranger = service()
    cases = {
        1: (request(1, pipeline="nowhere"), "unknown pipeline 'nowhere'; served here: echo"),
        2: (request(2, budget_us=0), "SLO above 0"),
        3: (request(3, budget_us=-5), "SLO above 0"),
        4: (request(4, budget_us=30_100_000), "longer than the pipeline's 30 s"),
        5: (request(5, budget_us=2**63 - 1), "longer than the pipeline's 30 s"),
        6: (request(6, priority=2**40), "priority out of range"),
        -7: (request(-7), "id or priority out of range"),
    }
    stranger.send(submit(*(case for case, _ in cases.values()), request(8, "good")))
    answers = stranger.answers(len(cases) + 1)
    for number, (_, says) in cases.items():
        assert answers[number].outcome == "rejected"
        assert says in answers[number].detail
    assert answers[8].outcome == "ok"
    assert cluster.settle().in_flight == 0


def test_a_long_name_is_not_repeated(cluster, bystander, service):
    stranger = service()
    stranger.send(submit(*(request(n, pipeline="\0" * 1_000_000) for n in range(3))))
    for answer in stranger.answers(3).values():
        assert answer.outcome == "rejected"
        assert len(answer.detail) < 1000


@pytest.mark.parametrize(
    ("node", "frames"),
    [
        (BytesNode(5), []),
        (BytesNode(5), [b"1234"]),
        (BytesNode(-1), []),
        (BytesNode(2**62), [b"12"]),
        (ListNode([BytesNode(3), BytesNode(3)]), [b"12345"]),
        (ArrayNode("|O", (1,), 8), [bytes(8)]),
        (ArrayNode("<f4", (2,), 4), [bytes(4)]),
        (ArrayNode("<f4", (-1, -1), 4), [bytes(4)]),
        (ArrayNode("<V8", (1,), 8), [bytes(8)]),
        (ArrayNode("<f4", (2**40, 2**40, 0), 0), []),
        (ArrayNode("<f4", (1,) * 100, 4), [bytes(4)]),
        (TextNode(-3), []),
    ],
    ids=repr,
)
def test_payloads_that_are_none(cluster, bystander, service, node, frames):
    stranger = service()
    stranger.send(submit(request(1, "good"), request(2, node), request(3, "behind")), *frames)
    answers = stranger.answers(3)
    assert answers[1].outcome == "ok"
    assert answers[2].outcome == answers[3].outcome == "rejected"
    assert "malformed payload" in answers[2].detail
    stranger.send(submit(request(4, "next")))
    assert stranger.answers(1)[4].outcome == "ok"


@pytest.mark.parametrize("depth", [31, 33, 200, 450, 5000, 100_000])
@pytest.mark.parametrize("open_close", [(b"\x92\x02\x91", b""), (b"\x92\x03\x81\xa1k", b"")], ids=["list", "dict"])
def test_nodes_that_nest_deeply(cluster, bystander, service, depth, open_close):
    stranger = service()
    header = protocol.encode(Submit(0, [request(1)]))
    assert header.count(b"\xc0") == 2
    at = header.rindex(b"\xc0")
    stranger.socket.send(header[:at] + open_close[0] * depth + b"\xc0" + header[at + 1 :])
    if depth > 1000:
        assert "malformed" in stranger.receive(Goodbye).reason
    elif depth > 32:
        assert stranger.receive((Result, Goodbye)) is not None
    else:
        assert stranger.answers(1)[1].outcome == "ok"


def test_more_frames_than_the_header_speaks_of(cluster, bystander, service):
    stranger = service()
    stranger.send(submit(request(1, BytesNode(2))), b"12", b"345")
    assert stranger.answers(1)[1].outcome == "ok"
    assert cluster.status().malformed == 1


def test_empty_rows_without_end_for_a_map_stage(cluster, bystander, service):
    spec = parse_spec(MAPPED, file="mapped.yaml", root="")
    cluster.serve(spec)
    stranger = service()
    rows = ArrayNode("<f4", (2**33, 0), 0)
    stranger.send(submit(request(1, rows, "mapped"), request(2, ListNode([1] * 6), "mapped")))
    stranger.send(submit(request(3, ListNode([1] * 5), "mapped"), request(4, "no list", "mapped")))
    answers = stranger.answers(4)
    assert {number: str(answer.outcome) for number, answer in answers.items()} == {
        1: "rejected",
        2: "rejected",
        3: "ok",
        4: "rejected",
    }
    assert "8589934592 items" in answers[1].detail
    assert "at most 5" in answers[2].detail


def test_a_payload_above_the_limit_on_the_wire(cluster, echo, service):
    cluster.start(max_payload=100_000)
    cluster.serve(echo)
    client = cluster.client()
    assert client.infer("echo", "before") == "before"
    stranger = service()
    for size, outcome in ((100_000, "ok"), (100_001, "rejected"), (4_000_000, "rejected")):
        stranger.send(submit(request(size, BytesNode(size))), bytes(size))
        assert stranger.answers(1)[size].outcome == outcome
    # libzmq breaks the connection over a frame that nothing allowed could fill, and makes another one.
    stranger.send(submit(request(1, BytesNode(8_000_000))), bytes(8_000_000))

    def answered():
        stranger.send(Heartbeat())  # lost while the connection breaks
        return stranger.socket.poll(100)

    cluster.eventually(answered, "it is connected again")
    assert stranger.receive(Goodbye).retry
    assert client.infer("echo", "after") == "after"
    cluster.settle(ok=3, rejected=2)


def test_too_many_requests_in_one_submit(cluster, bystander, service):
    stranger = service(RCVHWM=0)
    stranger.send(submit(*(request(n, n) for n in range(4096))))
    answers = stranger.answers(4096)
    assert [answers[n].outcome for n in range(256)] == ["ok"] * 256
    assert {str(answers[n].outcome) for n in range(256, 4096)} == {"rejected"}
    assert "more than 256" in answers[256].detail


def test_so_many_requests_in_one_submit_that_they_are_not_looked_at_one_by_one(cluster, bystander, service):
    stranger = service()
    stranger.send(submit(*(request(n, n) for n in range(10_000))))
    goodbye = stranger.receive(Goodbye)
    assert "10000 requests" in goodbye.reason
    assert not goodbye.retry


def test_a_repeat_gets_one_answer(cluster, service):
    cluster.start()
    cluster.shard.apply(parse_spec(MAPPED, file="mapped.yaml", root=""))
    stranger = service()
    stranger.send(submit(request(1, ListNode([1]), "mapped"), request(1, ListNode([2]), "mapped")))
    stranger.send(submit(request(1, ListNode([3]), "mapped")))
    stranger.send(protocol.Cancel([1, 1, 5, 2**63]))
    assert stranger.answers(1)[1].outcome == "cancelled"
    cluster.settle(cancelled=1)


# ---- answers that are large in structure ----------------------------------------------------------


def test_answers_together_too_large_for_a_header(cluster, echo, node):
    stage = msgspec.structs.replace(echo.stages["echo"], max_batch=2)
    pair = msgspec.structs.replace(echo, stages={"echo": stage})
    cluster.start()
    cluster.shard.apply(pair)
    stranger = greeted_node(node, pair)
    client = cluster.client()
    futures = [client.submit("echo", number) for number in range(2)]
    cluster.wait_for(lambda status: status.in_flight == 2, "both are there")
    stranger.send(Pull(0, 1, 1, 0))
    grant = stranger.receive(protocol.Grant)
    assert len(grant.tasks) == 2
    done = Done(0, grant.batch, "ok", results=["x" * 2_000_000, ""])
    rest = "y" * (protocol.MAX_HEADER - len(protocol.encode(done)) - 4)
    # What fits into a DONE to the last byte is more than a RESULT can say, for that says more of each.
    stranger.send(msgspec.structs.replace(done, results=["x" * 2_000_000, rest]))
    assert futures[0].result(30) == "x" * 2_000_000
    assert futures[1].result(30) == rest
    cluster.settle(ok=2)


# ---- messages that are none -----------------------------------------------------------------------


GREETED = [Hello(1, "stranger"), submit(request(1, ListNode([1, "two"]))), protocol.Cancel([1]), Goodbye("reason")]
FROM_NODE = [
    Ready(1, "odd", [protocol.DeviceReport(0, "cpu", [protocol.ModelReport("m", "", 100, [(1, 0.1)])])]),
    Pull(0, 1, 2, 3),
    Done(0, 1, "ok", 1, 2, [1], [protocol.Failure(0, "why")], "detail"),
]


def test_truncated_headers(cluster, bystander, service, node):
    malformed = 0
    for make, messages in ((lambda: service(greet=False), GREETED), (node, FROM_NODE)):
        stranger = make()
        for message in messages:
            header = protocol.encode(message)
            for end in range(len(header)):
                stranger.socket.send(header[:end])
                assert not stranger.receive(Goodbye).retry
                malformed += 1
    assert cluster.status().malformed == malformed


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"", b""],
        [b"GET / HTTP/1.1\r\n\r\n"],
        [b"\xc1"],
        [b"\x90"],
        [b"\x91\x63"],
        [b"\x92\x01\xc0"],
        [b"\xdd\xff\xff\xff\xff\x01"],
        [b"\x93\x01\x01\xdb\xff\xff\xff\xff"],
        [b"\x93\x01\x01\xa2\xff\xfe"],
        [b"\xa5hello", b"x" * 1000, b"", b"y"],
        [bytes(5 * 1024**2)],
        [protocol.encode(Hello(1, "x" * 5_000_000))],
    ],
    ids=lambda frames: repr(frames[0][:12]),
)
def test_headers_that_are_none(cluster, bystander, service, node, frames):
    for stranger in (service(greet=False), service(), node()):
        stranger.socket.send_multipart(frames)
        goodbye = stranger.receive(Goodbye)
        assert not goodbye.retry
        assert "malformed" in goodbye.reason
    assert cluster.status().malformed == 3


def test_random_frames(cluster, bystander, service, node):
    strangers = [service(), service(greet=False), node()]
    frames = st.lists(st.binary(max_size=64), min_size=1, max_size=4)

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(frames, st.sampled_from(strangers))
    def send(frames, stranger):
        stranger.socket.send_multipart(frames)

    send()
    cluster.status()


def test_messages_with_bytes_changed(cluster, bystander, service, node):
    """Most of these are valid in form and say odd things."""
    chance = random.Random(7)
    for make, messages in ((lambda: service(greet=False), GREETED), (node, FROM_NODE)):
        stranger = make()
        stranger.send(messages[0])
        stranger.receive(Welcome)
        for message in messages:
            header = protocol.encode(message)
            for _ in range(300):
                changed = bytearray(header)
                for _ in range(chance.randint(1, 3)):
                    changed[chance.randrange(len(changed))] = chance.randrange(256)
                stranger.socket.send_multipart([bytes(changed), b"frame"][: chance.randint(1, 2)])
        # Everything before has been looked at once this is answered.
        stranger.send(Hello(1, "again") if messages is GREETED else Ready(1, "again", []))
        stranger.receive(Welcome)
    cluster.status()


@pytest.mark.parametrize("port", ["frontend", "backend"])
def test_what_speaks_no_zeromq(cluster, bystander, port):
    host, number = getattr(cluster.shard, port).removeprefix("tcp://").split(":")
    greeting = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0NULL" + bytes(48)
    for said in (b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"\xff" * 1000, greeting):
        with socket.create_connection((host, int(number))) as connection:
            connection.sendall(said)


def test_before_any_greeting(cluster, bystander, service, node):
    stranger = service(greet=False)
    for message in (submit(request(1)), Heartbeat(), protocol.Cancel([1])):
        stranger.send(message)
        assert stranger.receive(Goodbye).retry
    agent = node()
    for message in (Pull(0, 1, 2, 3), Done(0, 1, "ok"), Heartbeat()):
        agent.send(message)
        assert agent.receive(Goodbye).retry


# ---- versions and names -------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 2, -1, 2**40])
def test_a_wrong_protocol_version(cluster, bystander, service, node, version):
    for stranger, greeting in (
        (service(greet=False), Hello(version, "stranger")),
        (node(), Ready(version, "stranger", [])),
    ):
        stranger.send(greeting)
        goodbye = stranger.receive(Goodbye)
        assert not goodbye.retry
        assert f"protocol version {version} is not spoken here" in goodbye.reason
        assert "version 1" in goodbye.reason
    status = cluster.status()
    assert (status.clients, status.agents) == (1, 1)


@pytest.mark.parametrize("name", ["", "x" * 201])
def test_a_name_that_is_none(cluster, bystander, service, node, name):
    for stranger, greeting in ((service(greet=False), Hello(1, name)), (node(), Ready(1, name, []))):
        stranger.send(greeting)
        assert "1 to 200 characters" in stranger.receive(Goodbye).reason


def test_an_agent_refused_by_its_shard_ends_with_the_reason(cluster, hand_driven_backend):
    agent = cluster.lone_agent()
    agent.hold()
    agent.connect(hand_driven_backend.url)
    sender, ready, _ = hand_driven_backend.receive(Ready)
    assert ready.version == protocol.VERSION
    hand_driven_backend.send(sender, Goodbye("protocol version 1 is not spoken here", retry=False))
    agent.join()
    assert isinstance(agent.error, VersionRefused)
    assert "protocol version 1 is not spoken here" in str(agent.error)


def test_an_agent_leaves_a_shard_of_another_version(cluster, hand_driven_backend):
    agent = cluster.lone_agent()
    agent.hold()
    agent.connect(hand_driven_backend.url)
    sender, _, _ = hand_driven_backend.receive(Ready)
    hand_driven_backend.send(sender, Welcome(2, "newer", 1_000_000))
    agent.join()
    assert isinstance(agent.error, VersionRefused)
    assert "version 2" in str(agent.error)


def test_an_agent_lives_through_garbage(cluster, echo, hand_driven_backend):
    agent = cluster.lone_agent()
    agent.hold(echo)
    agent.connect(hand_driven_backend.url)
    shard = hand_driven_backend
    sender, _, _ = shard.receive(Ready)
    shard.send(sender, Welcome(1, "by hand", 10_000_000))
    _, pull, _ = shard.receive(Pull)
    for frames in ([b""], [b"garbage", b"more"], [protocol.encode(Hello(1, "x"))], [bytes(5_000_000)]):
        shard.send_raw(sender, *frames)
    model = echo.model_key("echo")

    def grant(batch, device=0, model=model, tasks=None, **fields):
        fields = {"seq": pull.seq, "closes_us": 20_000_000, **fields}
        return protocol.Grant(
            device=device,
            batch=batch,
            pulled_us=pull.sent_us,
            dwell_us=0,
            model=model,
            variant="",
            opens_us=0,
            expected_us=0,
            tasks=tasks if tasks is not None else [["value"]],
            **fields,
        )

    shard.send(sender, grant(1, device=7))
    shard.send(sender, grant(2, device=-1))
    shard.send(sender, grant(3, model="unknown"))
    shard.send(sender, grant(4, closes_us=-1_000_000))
    shard.send(sender, grant(5))
    codes = {}
    while len(codes) < 5:
        done = shard.receive(Done, Ready, Pull)[1]
        if isinstance(done, Done):
            codes[done.batch] = done.code
    assert codes == {1: "cancelled", 2: "cancelled", 3: "unknown_model", 4: "too_late", 5: "ok"}


# ---- agents that say odd things -------------------------------------------------------------------


def greeted_node(node, echo, name="odd", profile=((1, 0.0),)):
    stranger = node()
    model = protocol.ModelReport(echo.model_key("echo"), "", 100, list(profile))
    stranger.send(Ready(1, name, [protocol.DeviceReport(0, "odd", [model])]))
    stranger.receive(Welcome)
    return stranger


def test_profiles_that_cannot_be(cluster, bystander, node, echo):
    profile = [(0, 1.0), (-5, 1.0), (1, -1.0), (1, float("nan")), (1, float("inf")), (10**15, 1.0)]
    stranger = node()
    for key in (echo.model_key("echo"), "unknown"):
        model = protocol.ModelReport(key, "", 100, profile)
        stranger.send(Ready(1, "odd", [protocol.DeviceReport(-3, "odd", [model, model])]))
        stranger.receive(Welcome)
    assert cluster.status().devices == 2


@pytest.mark.parametrize(
    ("done", "frames", "outcome"),
    [
        (Done(0, 0, "ok", results=[1, 2]), [], "failed"),
        (Done(0, 0, "ok"), [], "failed"),
        (Done(0, 0, "ok", results=[BytesNode(10)]), [b"123"], "failed"),
        (Done(0, 0, "ok", results=[ArrayNode("|O", (1,), 8)]), [bytes(8)], "failed"),
        (Done(0, 0, "ok", results=[1]), [b"more"], "failed"),
        (Done(0, 0, "what?", results=[1]), [], "failed"),
        (Done(0, 0, "ok", execution_us=-(2**60), results=[1], failures=[protocol.Failure(99, "?")]), [], "ok"),
        (Done(0, 0, "ok", execution_us=-5, results=[1], failures=[protocol.Failure(0, "why")]), [], "failed"),
    ],
    ids=lambda value: repr(value)[:60] if isinstance(value, Done) else "",
)
def test_batches_that_end_oddly(cluster, echo, node, done, frames, outcome):
    cluster.start()
    cluster.shard.apply(echo)
    stranger = greeted_node(node, echo)
    client = cluster.client()
    future = client.submit("echo", 1)
    stranger.send(Pull(0, 1, 1, 0))
    grant = stranger.receive(protocol.Grant)
    stranger.send(Done(0, grant.batch + 1, "ok", results=[1]))
    for _ in range(2):
        stranger.send(msgspec.structs.replace(done, batch=grant.batch), *frames)
    assert future.reply(30).outcome == outcome
    cluster.settle(**{outcome: 1})
    assert cluster.status().agents == 1


def test_an_agent_cannot_end_another_one_s_batch(cluster, echo, node):
    cluster.start()
    cluster.shard.apply(echo)
    first, second = greeted_node(node, echo, "first"), greeted_node(node, echo, "second")
    future = cluster.client().submit("echo", 1)
    first.send(Pull(0, 1, 1, 0))
    grant = first.receive(protocol.Grant)
    second.send(Done(0, grant.batch, "ok", results=["forged"]))
    second.send(Heartbeat())
    second.receive(Heartbeat)
    assert not future.done()
    first.send(Done(0, grant.batch, "ok", results=["true"]))
    assert future.result(30) == "true"


# ---- services that vanish or do not read ------------------------------------------------------------


def test_a_service_that_vanishes_is_forgotten_with_its_requests(cluster, echo, service):
    waiting = msgspec.structs.replace(echo, name="waiting")
    cluster.start(heartbeat=0.05)
    cluster.shard.apply(waiting)
    cluster.serve(echo)
    client = cluster.client()
    assert client.infer("echo", "before") == "before"
    stranger = service()
    stranger.send(submit(*(request(n, BytesNode(1000), "waiting") for n in range(5))), bytes(5000))
    cluster.wait_for(lambda status: status.in_flight == 5, "its requests are there")
    stranger.close()
    status = cluster.wait_for(lambda status: status.clients == 1, "it is forgotten")
    assert (status.in_flight, status.undeliverable) == (0, 5)
    assert client.infer("echo", "after") == "after"
    cluster.settle(ok=2, cancelled=5)


def test_a_service_that_falls_silent_and_comes_back_is_greeted_anew(cluster, echo, service):
    cluster.start(heartbeat=0.05)
    cluster.serve(echo)
    stranger = service()
    cluster.wait_for(lambda status: status.clients == 0, "it is forgotten")
    stranger.send(submit(request(1, "value")))
    assert stranger.receive(Goodbye).retry
    stranger.send(Hello(1, "stranger"))
    stranger.receive(Welcome)
    stranger.send(submit(request(1, "value")))
    assert stranger.answers(1)[1].outcome == "ok"
    cluster.settle(ok=1)


def test_a_service_that_never_reads(cluster, bystander, service):
    stranger = service(RCVHWM=1, RCVBUF=4096)
    refused = protocol.encode(submit(*(request(n, BytesNode(-1)) for n in range(250))))

    def full():
        # Each is answered at once, in a message of its own, until sockets and outbox hold no more.
        for _ in range(20):
            stranger.socket.send(refused)
        return cluster.status().undeliverable > 0

    cluster.eventually(full, "answers are given up")
    assert bystander.infer("echo", "meanwhile") == "meanwhile"
    stranger.close()


def test_a_service_that_never_reads_large_answers(cluster, bystander, service):
    """What is held for it is bounded in bytes too, not in messages alone."""
    stranger = service(RCVHWM=1, RCVBUF=4096)
    part = bytes(4_000_000)

    def full():
        stranger.socket.send_multipart([protocol.encode(submit(request(next(numbers), BytesNode(len(part))))), part])
        return cluster.status().undeliverable > 0

    numbers = iter(range(1_000_000))
    cluster.eventually(full, "answers are given up")
    # libzmq and the shard hold 256 MiB each of its answers, and the sockets' buffers some.
    status = cluster.status()
    held = status.ended["ok"] - status.undeliverable
    assert held < 2 * 256 * 1024**2 / len(part) + 10
    assert bystander.infer("echo", "meanwhile") == "meanwhile"
    stranger.close()


# ---- ports --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", ["frontend", "backend"])
def test_a_port_in_use(cluster, bystander, port):
    address = cluster.shard.frontend
    with pytest.raises(
        AddressInUse, match="is in use by another process; end that one, or choose another port"
    ) as error:
        Shard(ShardConfig(name="second", **{port: address}))
    assert address in str(error.value)


@pytest.mark.parametrize("address", ["tcp://192.0.2.1:5555", "tcp://127.0.0.1:99999", "nonsense", "udp://1.2.3.4:5"])
def test_an_address_that_cannot_be_bound(address):
    with pytest.raises(OSError, match=r"cannot bind .* as in tcp://"):
        Shard(ShardConfig(name="s", frontend=address))


def test_a_client_at_the_port_for_agents(cluster, bystander):
    with Client(cluster.shard.backend) as client, pytest.raises(LaxityError, match=r"malformed|services"):
        client.infer("echo", 1, slo=5)
