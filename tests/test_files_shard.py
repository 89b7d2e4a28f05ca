"""Files over the wire: uploaded to a shard, fetched from it, copied between shards; and all that can be wrong with what
comes."""

from __future__ import annotations

import hashlib
import itertools
import random
import threading
from pathlib import Path

import pytest
import zmq

from broker.shell import Shard, ShardConfig
from cli.publish import PublishError, pipeline_record, publish_files
from cluster.filecache import FileCache
from cluster.records import FileRecord
from laxity import protocol
from laxity.files import FileClient, FileNotHere, FileNotYet, TransferError
from laxity.protocol import MAX_CHUNK, Chunk, Fetch, Goodbye, Store, Stored
from pipelines import load_spec

BIG = random.Random(1).randbytes(2 * MAX_CHUNK + 12_345)
SMALL = b"def f(): ...\n"


def record(content: bytes, path: str = "model.onnx") -> FileRecord:
    return FileRecord(path, hashlib.sha256(content).hexdigest(), len(content))


class Shards:
    """Shards in threads, each with a cache of its own."""

    def __init__(self, directory):
        self._directory = directory
        self._running = []

    def start(self, name, **options):
        shard = Shard(ShardConfig(name=name, cache=str(self._directory / name), **options))
        thread = threading.Thread(target=shard.run)
        thread.start()
        self._running.append((shard, thread))
        return shard

    def holds(self, shard, content):
        file = self._directory / shard.config.name / "files" / record(content).digest
        return file.is_file() and file.read_bytes() == content

    def begun(self, shard):
        """How many files are being written there (a shard that has just begun may have no such directory yet)."""
        return len(list((self._directory / shard.config.name).glob("new/*")))

    def stop(self, shard):
        thread = next(thread for each, thread in self._running if each is shard)
        shard.stop()
        thread.join(20)
        assert not thread.is_alive()

    def close(self):
        for shard, thread in self._running:
            if thread.is_alive():
                self.stop(shard)


@pytest.fixture
def shards(tmp_path):
    shards = Shards(tmp_path / "shards")
    yield shards
    shards.close()


@pytest.fixture
def shard(shards):
    """A shard that is to have both files."""
    shard = shards.start("s0")
    shard.keep_files([record(BIG), record(SMALL), record(b"")], [])
    return shard


class Raw:
    """A hand-driven connection."""

    def __init__(self, address):
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.connect(address)

    def send(self, *frames):
        self._socket.send_multipart(frames)

    def receive(self):
        assert self._socket.poll(20_000), "nothing came"
        header, *frames = self._socket.recv_multipart()
        return protocol.decode_to_client(header), frames

    def ask(self, message, *frames):
        self.send(protocol.encode(message), *frames)
        return self.receive()

    def close(self):
        self._context.destroy(linger=0)


@pytest.fixture
def raw(shard):
    connection = Raw(shard.frontend)
    yield connection
    connection.close()


def upload(tmp_path, address, content, told=lambda have: None):
    file = tmp_path / "uploaded"
    file.write_bytes(content)
    with FileClient(address) as client:
        client.upload(record(content).digest, len(content), file, told)


def fetch(address, content):
    with FileClient(address) as client:
        return b"".join(client.fetch(record(content).digest, len(content)))


# ---- there and back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [BIG, SMALL, b""], ids=["big", "small", "empty"])
def test_a_file_goes_to_a_shard_and_comes_from_both_its_sides(shards, shard, tmp_path, content):
    told = []
    upload(tmp_path, shard.frontend, content, told.append)
    assert told[-1] == len(content)
    assert told == sorted(told)
    assert shards.holds(shard, content)
    assert fetch(shard.frontend, content) == content
    assert fetch(shard.backend, content) == content
    upload(tmp_path, shard.frontend, content, told.append)  # it is there: nothing is sent
    assert shard.status().malformed == 0


def test_a_shard_started_again_has_its_files_and_finds_damaged_ones(shards, shard, tmp_path):
    upload(tmp_path, shard.frontend, BIG)
    upload(tmp_path, shard.frontend, SMALL)
    shards.stop(shard)
    damaged = tmp_path / "shards" / "s0" / "files" / record(SMALL).digest
    damaged.chmod(0o600)
    damaged.write_bytes(b"x" * len(SMALL))
    again = shards.start("s0")
    again.keep_files([record(BIG), record(SMALL)], [])
    assert fetch(again.frontend, BIG) == BIG
    upload(tmp_path, again.frontend, SMALL)
    while not shards.holds(again, SMALL):  # it was uploaded before it was found to be damaged
        upload(tmp_path, again.frontend, SMALL)
    assert fetch(again.frontend, SMALL) == SMALL


def test_an_upload_that_broke_off_goes_on_where_it_was(shard, raw, tmp_path):
    digest = record(BIG).digest
    assert raw.ask(Store(digest, 0, len(BIG)), b"") == (Stored(digest, 0), [])
    assert raw.ask(Store(digest, 0, len(BIG)), BIG[:MAX_CHUNK])[0].have == MAX_CHUNK
    told = []
    upload(tmp_path, shard.frontend, BIG, told.append)
    assert told[0] == MAX_CHUNK


def test_two_uploads_of_one_file_help_each_other(shards, shard, tmp_path):
    failures = []

    def work(number):
        try:
            (tmp_path / number).mkdir()
            upload(tmp_path / number, shard.frontend, BIG)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert shards.holds(shard, BIG)


# ---- what a shard refuses ------------------------------------------------------------------------------


def test_only_what_a_pipeline_names_is_taken(shards, raw, shard):
    digest = record(b"other").digest
    stored, _ = raw.ask(Store(digest, 0, 5), b"other")
    assert (stored.have, stored.retry) == (0, True)
    assert "no pipeline that is applied needs this file" in stored.detail
    assert shards.begun(shard) == 0


@pytest.mark.parametrize("total", [len(SMALL) + 1, 2**62, -1, 0])
def test_only_in_the_size_that_it_names(shards, shard, raw, total):
    stored, _ = raw.ask(Store(record(SMALL).digest, 0, total), SMALL)
    assert f"{total} bytes, where the pipeline's record says {len(SMALL)}" in stored.detail
    assert not stored.retry
    assert not shards.holds(shard, SMALL)


def test_content_with_another_digest_is_thrown_away(shards, shard, raw):
    digest = record(SMALL).digest
    stored, _ = raw.ask(Store(digest, 0, len(SMALL)), b"x" * len(SMALL))
    assert stored.have == 0
    assert "apply the pipeline again" in stored.detail
    assert shards.begun(shard) == 0
    assert not shards.holds(shard, SMALL)
    stored, _ = raw.ask(Store(digest, 0, len(SMALL)), SMALL + b"more")
    assert "more than the 13 bytes" in stored.detail
    assert raw.ask(Store(digest, 0, len(SMALL)), SMALL) == (Stored(digest, len(SMALL)), [])


def test_pieces_at_other_places_change_nothing(raw):
    digest = record(SMALL).digest
    for offset in (1, 5, 2**62):
        assert raw.ask(Store(digest, offset, len(SMALL)), b"x")[0] == Stored(digest, 0)
    assert raw.ask(Store(digest, 0, len(SMALL)), SMALL[:5])[0].have == 5
    assert raw.ask(Store(digest, 0, len(SMALL)), b"xxxxx")[0].have == 5
    assert raw.ask(Store(digest, 5, len(SMALL)), SMALL[5:])[0].have == len(SMALL)


@pytest.mark.parametrize(
    "digest", ["", "../../etc/passwd", "a" * 63, "A" * 64, "g" * 64, "a" * 100_000, "a" * 63 + "\0"]
)
def test_digests_that_are_none(shard, raw, digest):
    stored, _ = raw.ask(Store(digest, 0, 1), b"x")
    assert "no SHA-256 digest" in stored.detail
    chunk, frames = raw.ask(Fetch(digest, 0, 1))
    assert (chunk.total, frames) == (-1, [b""])
    assert len(chunk.digest) <= 64
    assert shard.status().malformed == 2


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 0), (0, -1), (0, MAX_CHUNK + 1), (2**63, 1), (0, 2**63)])
def test_places_that_are_none(raw, offset, length):
    chunk, frames = raw.ask(Fetch(record(SMALL).digest, offset, length))
    assert (chunk.total, frames) == (-1, [b""])
    assert "no such" in chunk.detail


def test_beyond_the_end_there_is_nothing(shard, raw, tmp_path):
    upload(tmp_path, shard.frontend, SMALL)
    digest = record(SMALL).digest
    assert raw.ask(Fetch(digest, 5, MAX_CHUNK)) == (Chunk(digest, 5, 13), [SMALL[5:]])
    assert raw.ask(Fetch(digest, 2**62, 10)) == (Chunk(digest, 2**62, 13), [b""])


@pytest.mark.parametrize("frames", [[], [b"a", b"b"], [b"x" * (MAX_CHUNK + 1)]])
def test_a_store_has_one_frame(raw, frames):
    stored, _ = raw.ask(Store(record(BIG).digest, 0, len(BIG)), *frames)
    assert "one frame" in stored.detail


def test_headers_that_are_none(shard, raw):
    for header in (b"", b"\xc1", protocol.encode([20, 5, 0, 1]), protocol.encode([22, "a"]), protocol.encode([20])):
        raw.send(header, b"junk")
        answer, _ = raw.receive()
        assert isinstance(answer, Goodbye)
        assert not answer.retry
    assert shard.status().malformed == 5


def test_agents_side_takes_no_files(shard):
    raw = Raw(shard.backend)
    try:
        answer, _ = raw.ask(Store(record(SMALL).digest, 0, len(SMALL)), SMALL)
        assert isinstance(answer, Goodbye)
    finally:
        raw.close()


def test_uploads_at_the_same_time_are_bounded(shards, tmp_path):
    contents = [bytes([number]) * 10 for number in range(9)]
    shard = shards.start("s0")
    shard.keep_files([record(content, str(content[0])) for content in contents], [])
    raw = Raw(shard.frontend)
    try:
        for content in contents[:8]:
            assert raw.ask(Store(record(content).digest, 0, 10), content[:5])[0].have == 5
        stored, _ = raw.ask(Store(record(contents[8]).digest, 0, 10), contents[8])
        assert stored.retry
        assert "8 other files are being uploaded" in stored.detail
        assert raw.ask(Store(record(contents[0]).digest, 5, 10), contents[0][5:])[0].have == 10
        assert raw.ask(Store(record(contents[8]).digest, 0, 10), contents[8])[0].have == 10
        shards.stop(shard)
        assert shards.begun(shard) == 0
    finally:
        raw.close()


def test_a_peer_that_asks_and_does_not_read_is_put_off(shard, raw, tmp_path):
    upload(tmp_path, shard.frontend, BIG)
    digest = record(BIG).digest
    for _ in range(300):
        raw.send(protocol.encode(Fetch(digest, 0, MAX_CHUNK)))
    answers = [raw.receive()[0].total for _ in range(300)]
    assert set(answers) == {len(BIG), -2}
    assert fetch(shard.frontend, BIG) == BIG


def test_a_shard_without_room_says_so(shards, tmp_path):
    shard = shards.start("s0", cache_bytes=MAX_CHUNK)
    shard.keep_files([record(BIG), record(SMALL)], [])
    with pytest.raises(TransferError, match=r"holds 0 of at most 1048576 bytes, all in use, and \d+ more are needed"):
        upload(tmp_path, shard.frontend, BIG)
    upload(tmp_path, shard.frontend, SMALL)
    assert shards.begun(shard) == 0


def test_a_file_that_is_missing_or_on_its_way(shard, raw):
    with pytest.raises(FileNotHere, match="no pipeline that is applied needs this file"):
        fetch(shard.frontend, b"other")
    with pytest.raises(FileNotHere, match=r"model.onnx was not uploaded \(yet\)"):
        fetch(shard.backend, BIG)
    raw.ask(Store(record(BIG).digest, 0, len(BIG)), BIG[:MAX_CHUNK])
    with pytest.raises(FileNotYet, match="being uploaded, 49 %"):
        fetch(shard.frontend, BIG)


# ---- a shard that is none ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "frames"),
    [
        (Chunk(record(SMALL).digest, 0, 2**62), [SMALL]),
        (Chunk(record(SMALL).digest, 0, len(SMALL)), [SMALL[:-1]]),
        (Chunk(record(SMALL).digest, 0, len(SMALL)), [SMALL + b"x"]),
        (Chunk(record(SMALL).digest, 0, len(SMALL)), []),
        (Chunk(record(SMALL).digest, 0, -3), [b""]),
        (Goodbye("malformed message", False), []),
    ],
)
def test_answers_that_do_not_fit_end_a_fetch(peer, answer, frames):
    def serve():
        sender, _, _ = peer.receive(Fetch)
        peer.send(sender, answer, frames)

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(TransferError):
        fetch(peer.url, SMALL)
    thread.join()


def test_answers_to_other_questions_are_passed_over(peer):
    def serve():
        sender, _, _ = peer.receive(Fetch)
        peer.send(sender, Chunk(record(BIG).digest, 0, len(BIG)), [b"x"])
        peer.send(sender, Chunk(record(SMALL).digest, 7, len(SMALL)), [b"x"])
        peer.send(sender, Stored(record(SMALL).digest, 7))
        peer.send(sender, Chunk(record(SMALL).digest, 0, len(SMALL)), [SMALL])

    thread = threading.Thread(target=serve)
    thread.start()
    assert fetch(peer.url, SMALL) == SMALL
    thread.join()


def test_what_is_no_message_ends_a_fetch(peer):
    def serve():
        sender, _, _ = peer.receive(Fetch)
        peer.send_raw(sender, b"\xc1junk")

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(TransferError, match="is that a shard"):
        fetch(peer.url, SMALL)
    thread.join()


def test_a_shard_that_dies_in_the_middle_ends_a_fetch_at_once(make_peer):
    peer = make_peer()

    def serve():
        sender, _, _ = peer.receive(Fetch)
        peer.send(sender, Chunk(record(BIG).digest, 0, len(BIG)), [BIG[:MAX_CHUNK]])
        peer.close()

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(TransferError, match="the connection broke"):
        fetch(peer.url, BIG)
    thread.join()


def test_nobody_there(unused_address):
    with pytest.raises(TransferError, match="no shard answers there"):
        fetch(unused_address, SMALL)
    with pytest.raises(TransferError, match="is no shard's address"):
        fetch("nonsense", SMALL)


@pytest.fixture
def unused_address():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        return f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"


def test_a_fetch_can_be_stopped(peer):
    stop = threading.Event()

    def serve():
        peer.receive(Fetch)
        stop.set()

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(TransferError, match="interrupted"), FileClient(peer.url, stop.is_set) as client:
        list(client.fetch(record(SMALL).digest, len(SMALL)))
    thread.join()


@pytest.mark.parametrize("have", [5, 2**40, -1])
def test_an_upload_that_goes_nowhere_is_given_up(peer, tmp_path, have):
    """``have`` 5: forth and back for ever; others: beyond the file."""
    done = threading.Event()
    answers = itertools.cycle([have, 0])

    def serve():
        while not done.is_set():
            if peer.waits(20):
                sender, _, _ = peer.receive(Store)
                peer.send(sender, Stored(record(SMALL).digest, next(answers)))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with pytest.raises(TransferError, match="does not advance"):
            upload(tmp_path, peer.url, SMALL)
    finally:
        done.set()
        thread.join()


# ---- between shards ----------------------------------------------------------------------------------------


def test_shards_get_what_they_lack_from_one_another(shards, shard, cluster, tmp_path):
    upload(tmp_path, shard.frontend, BIG)
    late = shards.start("late")
    late.keep_files([record(BIG), record(SMALL)], ["tcp://127.0.0.1:1", shard.frontend])
    cluster.eventually(lambda: shards.holds(late, BIG), "the late shard has the file")
    upload(tmp_path, shard.frontend, SMALL)  # after it was asked for in vain
    cluster.eventually(lambda: shards.holds(late, SMALL), "the late shard has the other file")


def test_a_shard_that_gives_another_content_is_passed_over(shards, shard, peer, cluster, tmp_path):
    upload(tmp_path, shard.frontend, SMALL)
    done = threading.Event()

    def serve():
        sender, _, _ = peer.receive(Fetch)
        peer.send(sender, Chunk(record(SMALL).digest, 0, len(SMALL)), [b"x" * len(SMALL)])
        done.set()

    thread = threading.Thread(target=serve)
    thread.start()
    late = shards.start("late")
    late.keep_files([record(SMALL)], [peer.url, shard.frontend])
    cluster.eventually(lambda: shards.holds(late, SMALL), "the late shard has the file")
    assert done.wait(20)
    thread.join()


def test_what_pipelines_need_stays_when_room_is_made(shards, tmp_path):
    shard = shards.start("s0", cache_bytes=25)
    shard.keep_files([record(b"a" * 10), record(b"b" * 10)], [])
    upload(tmp_path, shard.frontend, b"a" * 10)
    upload(tmp_path, shard.frontend, b"b" * 10)
    other = FileCache(tmp_path / "shards" / "s0", 25)
    try:
        with pytest.raises(Exception, match="all in use"):
            other.add(record(b"c" * 10).digest, 10, [b"c" * 10])
    finally:
        other.close()


# ---- from the command line ------------------------------------------------------------------------------------


@pytest.fixture
def spec(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "steps.py").write_text("import more\ndef model(feeds): return feeds\n")
    (root / "more.py").write_text("")
    (root / "big.bin").write_bytes(BIG)
    text = "name: p\nslo: 5s\nstages: {a: {executor: python, model: 'steps:model'}}\noutput: a\nfiles: [big.bin]\n"
    (root / "p.yaml").write_text(text)
    return load_spec(str(root / "p.yaml"))


def test_a_pipeline_is_published_to_the_first_shard_that_is_there(shards, spec, unused_address):
    shard = shards.start("s0")
    said = []
    published = pipeline_record(spec, said.append)
    assert published.version == published.spec.version != spec.version
    assert [file.path for file in published.files] == ["big.bin", "more.py", "steps.py"]
    shard.keep_files(published.files, [])
    publish_files(published, [unused_address, shard.frontend], said.append)
    assert shards.holds(shard, BIG)
    assert shards.holds(shard, b"")


def test_what_cannot_be_published_is_told(shards, spec, unused_address):
    published = pipeline_record(spec, lambda _: None)
    with pytest.raises(PublishError, match="no shard is there to take its files; start one"):
        publish_files(published, [], lambda _: None)
    with pytest.raises(PublishError, match=r"big.bin was not uploaded \(.*no shard answers there\); apply"):
        publish_files(published, [unused_address], lambda _: None)
    shard = shards.start("s0")
    shard.keep_files(published.files, [])
    (Path(spec.root) / "big.bin").write_bytes(BIG[::-1])
    with pytest.raises(PublishError, match="did the file change while it was uploaded"):
        publish_files(published, [shard.frontend], lambda _: None)
    (Path(spec.root) / "big.bin").write_bytes(b"short")
    with pytest.raises(PublishError, match="has become shorter"):
        publish_files(published, [shard.frontend], lambda _: None)
    (Path(spec.root) / "big.bin").unlink()
    with pytest.raises(PublishError, match=r"big.bin cannot be read: No such file"):
        publish_files(published, [shard.frontend], lambda _: None)
    with pytest.raises(PublishError, match=r"'big.bin' matches no file"):
        pipeline_record(spec, lambda _: None)
