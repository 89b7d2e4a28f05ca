"""Recording what comes to shards, the file that it makes, and sending it again."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.taps import MOST_TAPS
from cli.main import main
from cli.recording import Recorded, RecordingError, Writer, requests, scan
from cli.taps import Lost, Seen, TapClient, TapError
from laxity import protocol
from laxity.outcomes import Outcome
from laxity.payload import decode, encode
from laxity.protocol import Goodbye, Tap, Tapped

COMMAND = [sys.executable, "-P", "-m", "cli.main"]
PAYLOADS: list[Any] = [
    b"bytes",
    b"",
    "a text",
    "long " * 1000,
    None,
    7,
    {"picture": b"\x89PNG" * 30_000, "labels": ["a", "b"], "size": np.arange(6, dtype="<f4").reshape(2, 3)},
    [True, 1.5, [b"x"]],
]


def same(one: Any, other: Any) -> bool:
    """Whether two payloads are equal, arrays in them as well."""
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def recorded(value: Any, offset: float = 0.0, contents: bool = True, **fields: Any) -> Recorded:
    payload = encode(value)
    parts = [bytes(part) for part in payload.parts] if contents else None
    told = {"pipeline": "echo", "budget": None, "priority": 0, **fields}
    return Recorded(offset, told["pipeline"], told["budget"], told["priority"], payload.node, parts)


def write(file: Path, entries: list[Recorded], max_bytes: int = 10**8) -> None:
    with Writer(file, {"payloads": True}, max_bytes) as writer:
        for entry in entries:
            assert writer.add(entry)
        writer.end(9.0)


def collect(taps: TapClient, count: int) -> list[Seen | Lost]:
    """What comes until so many requests were told of, or lost."""
    found: list[Seen | Lost] = []
    while sum(one.requests if isinstance(one, Lost) else 1 for one in found) < count:
        found += taps.poll(1.0)
    return found


def tapped(taps: TapClient) -> None:
    while not taps.heard():
        taps.poll(1.0)


# ---- the taps of a shard -----------------------------------------------------------------


def test_what_comes_is_told(cluster: Any, echo: Any) -> None:
    cluster.serve(echo)
    client = cluster.client()
    client.infer("echo", b"before")
    with TapClient({"s0": cluster.shard.frontend}, [], True) as taps:
        tapped(taps)
        for value in PAYLOADS:
            client.infer("echo", value, slo=20.0, priority=1)
        with pytest.raises(Exception, match="nope"):
            client.infer("nope", b"of no pipeline")
        found = [one for one in collect(taps, len(PAYLOADS) + 1) if isinstance(one, Seen)]
    told = [decode(one.request.content()) for one in found]
    assert all(map(same, told, [*PAYLOADS, b"of no pipeline"]))
    assert [one.request.pipeline for one in found] == ["echo"] * len(PAYLOADS) + ["nope"]
    assert {one.request.priority for one in found[:-1]} == {1}
    assert all(19.0 < (one.request.budget or 0.0) <= 20.0 for one in found[:-1])
    assert [one.at for one in found] == sorted(one.at for one in found)


def test_only_some_pipelines_without_contents(cluster: Any, echo: Any) -> None:
    cluster.serve(echo)
    client = cluster.client()
    with TapClient({"s0": cluster.shard.frontend}, ["echo"], False) as taps:
        tapped(taps)
        with pytest.raises(Exception, match="nope"):
            client.infer("nope", b"of no interest")
        for value in PAYLOADS:
            client.infer("echo", value)
        found = [one.request for one in collect(taps, len(PAYLOADS)) if isinstance(one, Seen)]
    assert {request.pipeline for request in found} == {"echo"}
    assert all(request.parts is None and request.budget is None for request in found)
    made_up = [decode(request.content()) for request in found]
    assert made_up[:6] == [bytes(5), b"", "xxxxxx", "x" * 5000, None, 0]
    assert made_up[7] == [False, 0.0, [bytes(1)]]
    picture = made_up[6]
    assert (picture["picture"], picture["labels"]) == (bytes(120_000), ["x", "x"])
    assert (picture["size"].shape, picture["size"].dtype.str, picture["size"].any()) == ((2, 3), "<f4", False)


class Taker:
    """Taps a shard by hand."""

    def __init__(self, address: str, most: int = 1000) -> None:
        """``most`` messages are taken without being asked for."""
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.RCVHWM, most)
        self._socket.set(zmq.LINGER, 1000)
        self._socket.connect(address)

    def ask(self, message: Any) -> Any:
        """The answer to a message."""
        self.send(message)
        return self.next()[0]

    def send(self, message: Any) -> None:
        self._socket.send(protocol.encode(message))

    def next(self) -> tuple[Any, int]:
        """The next message and its size."""
        assert self._socket.poll(20_000)
        header, *frames = self._socket.recv_multipart()
        return protocol.decode_to_client(header), len(header) + sum(map(len, frames))

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@pytest.fixture
def takers(cluster: Any, echo: Any) -> Iterator[Any]:
    """Makes takers of a shard that serves."""
    cluster.serve(echo)
    made: list[Taker] = []

    def make(most: int = 1000) -> Taker:
        made.append(Taker(cluster.shard.frontend, most))
        return made[-1]

    yield make
    for taker in made:
        taker.close()


def test_a_slow_taker_loses_requests_and_holds_up_nobody(
    cluster: Any, takers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "TAP_WINDOW", 70_000)
    taker = takers()
    began = taker.ask(Tap([], True, 0))
    assert (began.lost, began.requests) == (0, [])
    client = cluster.client()
    for number in range(10):
        assert client.infer("echo", bytes([number]) * 20_000) == bytes([number]) * 20_000
    cluster.settle(ok=10)
    taken = 0
    for _ in range(3):
        told, size = taker.next()
        assert (len(told.requests), told.lost) == (1, 0)
        taken += size
    assert taken < protocol.TAP_WINDOW
    after = taker.ask(Tap([], True, taken))
    assert (after.began_us, after.lost, after.requests) == (began.began_us, 7, [])
    client.infer("echo", b"told again")
    told, _ = taker.next()
    assert (told.lost, len(told.requests)) == (7, 1)


def test_a_taker_that_only_says_that_it_takes_is_sent_no_more(
    cluster: Any, takers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "TAP_WINDOW", 2_000_000)
    taker = takers(1)
    taker.ask(Tap([], True, 0))
    taker.send(Tap([], True, 2**60))
    client = cluster.client()
    for number in range(30):  # more than the sockets' buffers hold
        client.infer("echo", bytes([number]) * 1_000_000)
    told = 0
    while not (message := taker.ask(Tap([], False, 2**60))).lost:
        told += len(message.requests)
    assert 0 < told < 30
    assert told + message.lost == 30


def test_few_take_at_a_time_and_those_that_leave_make_room(
    cluster: Any, takers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = [takers() for _ in range(MOST_TAPS)]
    for taker in (first, *others):
        assert isinstance(taker.ask(Tap()), Tapped)
    late = takers()
    refused = late.ask(Tap())
    assert isinstance(refused, Goodbye)
    assert "record here already" in refused.reason
    with TapClient({"s0": cluster.shard.frontend}, [], True) as taps, pytest.raises(TapError, match=r"s0: .* already"):
        tapped(taps)
    first.send(Goodbye())
    cluster.eventually(lambda: isinstance(late.ask(Tap()), Tapped), "one that left makes room")
    # All but one are silent from now on.
    monkeypatch.setattr("broker.taps.SILENCE", 0.0)
    newest = takers()
    cluster.eventually(lambda: isinstance(newest.ask(Tap()), Tapped), "those that are silent make room")


def test_repeats_are_told_once(cluster: Any, takers: Any) -> None:
    taker, service = takers(), takers()
    taker.ask(Tap())
    service.ask(protocol.Hello(1, "c" * 32))
    # The first has not ended when the second, in the same message, is looked at.
    request = protocol.Request(1, "echo", None, encode(b"").node)
    service.send(protocol.Submit(0, [request, request]))
    told, _ = taker.next()
    assert len(told.requests) == 1


# ---- files -------------------------------------------------------------------------------


def test_a_file_says_what_was_written(tmp_path: Path) -> None:
    file = tmp_path / "a.rec"
    entries = [recorded(value, float(number), budget=0.5, priority=1) for number, value in enumerate(PAYLOADS)]
    entries.append(recorded(b"secret", 8.0, contents=False, pipeline="other"))
    with Writer(file, {"payloads": True}, 10**8) as writer:
        for entry in entries:
            assert writer.add(entry)
        writer.add_lost(8.5, "s0", 3)
        writer.end(9.0)
        assert (writer.requests, writer.lost, writer.size) == (9, 3, file.stat().st_size)
    found = scan(file)
    assert found.offsets.tolist() == [float(number) for number in range(9)]
    assert (found.names, found.which.tolist()) == (["echo", "other"], [0] * 8 + [1])
    assert (found.seconds, found.lost, found.ended, found.payloads) == (9.0, 3, True, False)
    again = list(requests(file))
    assert again == entries
    assert all(same(decode(one.content()), value) for one, value in zip(again, PAYLOADS, strict=False))
    # As docs/recording.md says.
    with file.open("rb") as stream:
        head, *rest = msgpack.Unpacker(stream)
    assert head == {"laxity_recording": 1, "payloads": True}
    assert rest[0] == [0.0, "echo", 0.5, 1, [0, 5], [b"bytes"]]
    assert rest[-2:] == [{"lost": 3, "shard": "s0", "offset": 8.5}, {"end": 9.0, "requests": 9, "lost": 3}]


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.rec"
    file.write_text("dear")
    with pytest.raises(RecordingError, match="is there already: choose another name"):
        Writer(file, {}, 10**6)
    with pytest.raises(RecordingError, match="cannot be made: No such file or directory"):
        Writer(tmp_path / "no" / "b.rec", {}, 10**6)
    assert file.read_text() == "dear"


def test_a_file_grows_no_larger_than_it_may(tmp_path: Path) -> None:
    file = tmp_path / "a.rec"
    with Writer(file, {}, 10_000) as writer:
        while writer.add(recorded(b"x" * 100)):
            pass
        writer.end(1.0)
    assert 9_000 < file.stat().st_size <= 10_000
    assert scan(file).ended


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can be written beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_a_readable_file(tmp_path: Path) -> None:
    file = tmp_path / "a.rec"
    with Writer(file, {}, 10**8) as writer:
        for number in range(30):
            writer.add(recorded(b"x" * 1000, float(number)))
        writer.flush()
        for number in range(30, 80):
            writer.add(recorded(b"x" * 1000, float(number)))
        with full_disk(50_000), pytest.raises(RecordingError, match="can be replayed"):
            writer.end(80.0)
    found = scan(file)
    assert not found.ended
    assert 45 < len(found.offsets) < 50
    assert found.seconds == found.offsets[-1] == len(found.offsets) - 1


def test_a_file_that_ends_anywhere(tmp_path: Path) -> None:
    """Between two entries it is one that was not ended; within one it is damaged, and can be cut back to be read."""
    file = tmp_path / "a.rec"
    write(file, [recorded(value, float(number)) for number, value in enumerate([b"one", {"two": "2"}, None])])
    content = file.read_bytes()
    whole = 0
    for size in range(len(content)):
        file.write_bytes(content[:size])
        try:
            found = scan(file)
        except RecordingError as error:
            text = str(error)
            assert str(file) in text
            if "is no recording" in text:
                assert whole == 0
                continue
            assert "it ends in the middle of an entry" in text
            cut = int(text.split("truncate -s ")[1].split()[0])
            file.write_bytes(content[:cut])
            assert f"The {len(scan(file).offsets):,} requests before that" in text
        else:
            whole += 1
            assert not found.ended
    assert whole == 4  # the head, and each request


@settings(deadline=None, max_examples=150)
@given(place=st.floats(0, 1), byte=st.integers(0, 255))
def test_a_damaged_file_is_refused_or_read(tmp_path_factory: pytest.TempPathFactory, place: float, byte: int) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.rec"
    file.unlink(missing_ok=True)
    write(file, [recorded(value, float(number)) for number, value in enumerate([b"one", {"two": "2"}, None, "x"])])
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] = byte
    file.write_bytes(content)
    with suppress(RecordingError):
        assert len(scan(file).offsets) == sum(1 for _ in requests(file))


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ([0.0, "echo", None, 0, [0, 5], [b"four"]], "not of the sizes told"),
        ([0.0, "echo", None, 0, [9, 5], []], "what follows is no request"),
        ([-1.0, "echo", None, 0, None, []], "its times cannot be"),
        ([0.0, "echo", 0.0, 0, None, []], "its times cannot be"),
        (["0", "echo", None, 0, None, []], "what follows is no request"),
        (7, "what follows is no request"),
    ],
)
def test_entries_that_are_none(tmp_path: Path, entry: Any, why: str) -> None:
    file = tmp_path / "a.rec"
    good = [0.5, "echo", None, 0, None, []]
    file.write_bytes(b"".join(map(msgpack.packb, [{"laxity_recording": 1}, good, entry])))
    with pytest.raises(RecordingError, match=why) as caught:
        scan(file)
    assert "The 1 requests before that, 0.5 s, can be read" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is no recording"),
        (b"plain text", "is no recording"),
        (msgpack.packb({"x": 1}), "is no recording"),
        (msgpack.packb({"laxity_recording": 2}), "of version 2, and only 1 is known"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes, why: str) -> None:
    file = tmp_path / "a.rec"
    file.write_bytes(content)
    with pytest.raises(RecordingError, match=why):
        scan(file)


# ---- the commands ------------------------------------------------------------------------


class Recorder:
    """`laxity record`, as a process; it has begun once this is made."""

    def __init__(self, file: Path, shard: str, *arguments: str) -> None:
        command = [*COMMAND, "record", str(file), "--shard", shard, "--json", *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        assert self._process.stderr.readline() == "recording; Ctrl-C ends it\n"

    def end(self) -> dict[str, Any]:
        """Press Ctrl-C; what it tells."""
        self._process.send_signal(signal.SIGINT)
        output, errors = self._process.communicate(timeout=30)
        assert self._process.returncode == 0, errors
        found: dict[str, Any] = json.loads(output)
        return found


def test_what_was_recorded_is_sent_again(cluster: Any, echo: Any, tmp_path: Path) -> None:
    cluster.serve(echo)
    shard = cluster.shard.frontend
    client = cluster.client()
    first = Recorder(tmp_path / "first.rec", shard)
    for number, value in enumerate(PAYLOADS):
        client.infer("echo", value, slo=10.0 + number, priority=number % 2)
    told = first.end()
    assert told["pipelines"] == {"echo": len(PAYLOADS)}
    assert (told["requests"], told["lost"], told["ended_by"]) == (len(PAYLOADS), 0, "Ctrl-C")
    assert told["bytes"] == (tmp_path / "first.rec").stat().st_size

    second = Recorder(tmp_path / "second.rec", shard, "--max-bytes", "1MiB")
    replay = ("load", "--replay", str(tmp_path / "first.rec"), "--shard", shard, "--json")
    result = CliRunner().invoke(main, [*replay, "--speed", "4"])
    assert result.exit_code == 0, result.stderr
    (step,) = json.loads(result.stdout)["steps"]
    assert step["outcomes"]["ok"] == step["offered"] == len(PAYLOADS)
    assert step["seconds"] == pytest.approx(told["seconds"] / 4, rel=0.01)
    second.end()
    before, after = list(requests(tmp_path / "first.rec")), list(requests(tmp_path / "second.rec"))
    assert len(after) == len(before) == len(PAYLOADS)
    for one, other, value in zip(before, after, PAYLOADS, strict=True):
        assert same(decode(other.content()), value)
        assert (other.pipeline, other.priority) == (one.pipeline, one.priority)
        assert other.budget is not None
        assert one.budget is not None
        assert one.budget - 1.0 < other.budget <= one.budget

    unknown = CliRunner().invoke(main, ["load", "lv", *replay[1:]])
    assert unknown.exit_code == 2
    assert "there is no request for 'lv' in" in unknown.stderr
    late = CliRunner().invoke(main, [*replay, "--window", "900:901"])
    assert late.exit_code == 2
    assert "--window begins at 900 s, behind the" in " ".join(late.stderr.split())
    content = (tmp_path / "first.rec").read_bytes()
    (tmp_path / "cut.rec").write_bytes(content[:-60])
    cut = CliRunner().invoke(main, ["load", "--replay", str(tmp_path / "cut.rec"), "--shard", shard])
    assert cut.exit_code == 1
    assert "can be read: `truncate -s" in cut.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (["a.rec", "--max-bytes", "10"], 2, "--max-bytes 10 is too little"),
        (["a.rec", "--duration", "x"], 2, "no duration above zero"),
        (["a.rec", "--shard", "nowhere"], 2, "is no shard's address"),
        (["a.rec"], 1, "no cluster 'local' is running here"),
        (["there.rec", "--shard", "tcp://127.0.0.1:1"], 1, "there.rec is there already"),
    ],
)
def test_wrong_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, why: str) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.rec").touch()
    result = CliRunner().invoke(main, ["record", *arguments])
    assert result.exit_code == code, result.output
    assert why in result.stderr
    assert os.listdir(tmp_path) == ["there.rec"]


def test_nobody_to_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.record.PATIENCE", 0.2)
    file = tmp_path / "a.rec"
    result = CliRunner().invoke(main, ["record", str(file), "--shard", "tcp://127.0.0.1:1"])
    assert result.exit_code == 1
    assert "no shard has answered within 0.2 s" in result.stderr
    assert not file.exists()


def test_a_shard_that_refuses_to_be_recorded(make_peer: Any, tmp_path: Path) -> None:
    peer = make_peer()
    with TapClient({"old": peer.url}, [], True) as taps:
        taps.poll(0.0)
        sender, tap, _ = peer.receive(Tap)
        assert tap == Tap([], True, 0)
        peer.send(sender, Goodbye("malformed message: 24", False))
        with pytest.raises(TapError, match="shard old: malformed message: 24"):
            tapped(taps)


def test_a_shard_that_is_started_again(make_peer: Any) -> None:
    """Its clock has another zero, and what it lost counts anew."""
    peer = make_peer()
    with TapClient({"s0": peer.url}, [], True) as taps:
        taps.poll(0.0)
        sender, _, _ = peer.receive(Tap)
        request = protocol.TappedRequest(900, "echo", None, 0, None)
        peer.send(sender, Tapped(0, 1000, 5, True, [request]))
        peer.send(sender, Tapped(10**12, 10**12 + 1000, 2, True, [protocol.TappedRequest(10**12, "echo", 5, 0, None)]))
        first, seen, second, again = collect(taps, 9)
    assert (first, second) == (Lost("s0", 5), Lost("s0", 2))
    assert isinstance(seen, Seen)
    assert isinstance(again, Seen)
    assert again.at == pytest.approx(seen.at, abs=5.0)
    assert again.request.budget == pytest.approx(5e-6)


def test_outcome_names_are_those_of_the_page() -> None:
    from cli.load.page import _COLOURS, _OUTCOMES

    assert set(_COLOURS) == set(_OUTCOMES) >= {str(outcome) for outcome in Outcome}
