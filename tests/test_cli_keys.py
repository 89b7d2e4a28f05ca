"""`laxity keys`, and what `laxity doctor` says of keys: files that only their owner can read, and the store beside."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from cli.check_keys import check_key_files, check_keys
from cli.finding import Finding
from cli.key_output import replaced, written
from cli.main import main
from cluster.keyring import KeyRefused, Limits, new_record, revoked, rotated
from cluster.keystore import Keys, Unsettled, look_at_keys
from cluster.records import BrokerRecord, KeyRecord, NodeRecord, Paths, PipelineRecord, PublicKey, encode
from cluster.store import open_store, sqlite_url
from cluster.store.base import StoreAwayError
from laxity.keys import InvalidKey, KeyFile, new_pair, read_key_file, write_key_file
from pipelines import load_spec

PATHS = Paths("local")


class Keyed:
    """A store, a directory to write keys into, and the command line upon both."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = sqlite_url(directory / "store.db")
        self.store = open_store(self.url)

    def __call__(self, *arguments: str, input: str | None = None) -> Result:
        return CliRunner().invoke(main, ["keys", *arguments, "--store", self.url], input=input)

    def good(self, *arguments: str) -> Result:
        result = self(*arguments)
        assert result.exit_code == 0, result.output
        return result

    def refused(self, *arguments: str, status: int = 1) -> str:
        result = self(*arguments)
        assert result.exit_code == status, result.output
        return result.stderr

    def json(self, *arguments: str) -> Any:
        return json.loads(self.good(*arguments, "--json").stdout)

    def file(self, name: str) -> KeyFile:
        return read_key_file(self.directory / f"{name}.key")

    def record(self, name: str) -> KeyRecord:
        return look_at_keys(self.url, "local").records[name]

    def files(self) -> set[str]:
        return {path.name for path in self.directory.iterdir() if not path.name.startswith("store.db")}


@pytest.fixture
def keyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keyed]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("LAXITY_")]:
        monkeypatch.delenv(name)
    (tmp_path / "keys").mkdir()
    monkeypatch.chdir(tmp_path / "keys")
    made = Keyed(tmp_path / "keys")
    yield made
    made.store.close()


def test_a_key_from_its_making_to_its_end(keyed: Keyed) -> None:
    assert "no keys yet" in keyed.good("list").stdout
    keyed.good("new", "s0", "--role", "shard")
    keyed.store.put(PATHS.broker("s0"), encode(BrokerRecord("tcp://10.0.0.7:1", "tcp://10.0.0.7:2", 1, "h")))
    spec = load_spec("tm")
    keyed.store.put(PATHS.pipeline("tm"), encode(PipelineRecord(spec.version, spec)))
    limits = ("--pipelines", "tm, mt", "--rate", "50", "--in-flight", "8")
    made = keyed.good("new", "billing", "--role", "client", *limits, "--note", "Ann's")
    assert "LAXITY_KEY=billing.key" in made.stdout
    assert "there is no pipeline 'mt' yet; there are tm" in made.stderr

    first = keyed.file("billing")
    assert stat.S_IMODE((keyed.directory / "billing.key").stat().st_mode) == 0o600
    assert (first.cluster, first.name, first.role) == ("local", "billing", "client")
    assert [(server.shard, server.address) for server in first.servers] == [("s0", "tcp://10.0.0.7:1")]
    assert first.servers[0].publics == [keyed.file("s0").public]
    record = keyed.record("billing")
    assert [key.public for key in record.publics] == [first.public]
    assert (record.pipelines, record.rate, record.in_flight, record.note) == (["mt", "tm"], 50.0, 8, "Ann's")
    assert first.secret not in str(keyed.store.list("/").entries)

    keyed.good("limit", "billing", "--rate", "0", "--pipelines", "")
    assert keyed.json("show", "billing")["rate"] is None
    assert keyed.record("billing").in_flight == 8

    # Rotated in place: the file has the new one, the old one is good for a day.
    before = time.time()
    told = keyed.json("rotate", "billing")
    second = keyed.file("billing")
    assert told["keys"][0]["public"] == second.public != first.public
    assert told["keys"][1]["public"] == first.public
    assert 86_000 < told["keys"][1]["until"] - before < 86_500
    assert told["file"] == str(keyed.directory / "billing.key")
    assert told["state"] == "rotating"
    shown = keyed.good("list").stdout
    assert second.public in shown
    assert first.public in shown
    keyed.good("rotate", "billing", "--overlap", "0s", "-o", "other.key")
    third = keyed.file("other")
    assert keyed.record("billing").good(time.time()) == [third.public]

    asked = keyed("revoke", "billing", input="n\n")
    assert (asked.exit_code, keyed.record("billing").revoked) == (1, 0.0)
    assert keyed("revoke", "billing", input="y\n").exit_code == 0
    assert keyed.record("billing").good(0.0) == []
    assert "revoked already" in keyed.good("revoke", "billing").stdout
    assert keyed.json("revoke", "billing")["state"] == "revoked"
    gone = keyed("revoke", "s0", "--json", input="n\n")
    assert (gone.exit_code, gone.stdout) == (1, "")
    listed = {key["name"]: key["state"] for key in keyed.json("list")}
    assert listed == {"billing": "revoked", "s0": "good"}
    assert "was revoked" in keyed.refused("rotate", "billing")
    # Its name may be taken again.
    keyed.good("new", "billing", "--role", "operator", "-o", "again.key")
    assert keyed.record("billing").good(0.0) == [keyed.file("again").public]


def test_what_is_refused_leaves_neither_file_nor_record(keyed: Keyed) -> None:
    keyed.good("new", "taken", "--role", "client")
    public = new_pair().public
    assert "limits are for clients" in keyed.refused("new", "x", "--role", "node", "--rate", "5")
    assert "there is a key 'taken' already" in keyed.refused("new", "taken", "--role", "client", "-o", "y.key")
    assert "is there already" in keyed.refused("new", "x", "--role", "client", "-o", "taken.key")
    assert "cannot name a key" in keyed.refused("new", "a/b", "--role", "client")
    assert "not written to a terminal" in keyed.refused("new", "x", "--role", "client", "-o", "-", status=2)
    assert "is a directory" in keyed.refused("new", "x", "--role", "client", "-o", ".", status=2)
    assert "no directory" in keyed.refused("new", "x", "--role", "client", "-o", "none/x", status=2)
    assert "leave out -o" in keyed.refused("new", "x", "--role", "client", "--public", public, "-o", "x", status=2)
    assert "is no public key" in keyed.refused("new", "x", "--role", "client", "--public", "short", status=2)
    assert "cannot name a pipeline" in keyed.refused("new", "x", "--role", "client", "--pipelines", "a/b", status=2)
    assert "0 for no limit" in keyed.refused("new", "x", "--role", "client", "--rate", "nan")
    assert "one line" in keyed.refused("new", "x", "--role", "client", "--note", "a\x1b[2J", status=2)
    assert "'client', 'node', 'shard', 'operator'" in keyed.refused("new", "x", "--role", "boss", status=2)
    assert "no duration above zero" in keyed.refused("rotate", "taken", "--overlap", "never", status=2)
    assert "there is no key 'takn'; did you mean 'taken'?" in keyed.refused("revoke", "takn", "--yes")
    for command in (["show"], ["rotate"], ["limit", "--rate", "1"]):
        assert "did you mean 'taken'" in keyed.refused(command[0], "takn", *command[1:])
    assert "say what is to change" in keyed.refused("limit", "taken", status=2)
    assert keyed.files() == {"taken.key"}
    assert look_at_keys(keyed.url, "local").records.keys() == {"taken"}


def test_where_the_store_refuses_the_file_goes(keyed: Keyed) -> None:
    keyed.good("new", "x", "--role", "client")
    key = keyed.file("x")
    pair = new_pair()
    other = msgspec.structs.replace(key, public=pair.public, secret=pair.secret)
    for refusal in (KeyRefused("somebody else was faster"), StoreAwayError("nobody answers")):
        for write, name in ((written, "new.key"), (replaced, "new.key"), (replaced, "x.key")):
            with pytest.raises(type(refusal)), write(keyed.directory / name, other):
                raise refusal
            assert keyed.files() == {"x.key"}
            assert keyed.file("x") == key
    # Where the store may have it, the file is not thrown away.
    with pytest.raises(Unsettled), replaced(keyed.directory / "x.key", other):
        raise Unsettled("nobody answers any more")
    assert read_key_file(keyed.directory / "x.key.new") == other
    assert keyed.file("x") == key
    (keyed.directory / "x.key.new").unlink()
    # And no store, no file.
    gone = CliRunner().invoke(main, ["keys", "new", "z", "--role", "client", "--store", "sqlite:///proc/none/store.db"])
    assert gone.exit_code == 1
    nothing = CliRunner().invoke(main, ["keys", "new", "z", "--role", "client"])
    assert "no cluster 'local' is running here" in nothing.stderr
    assert keyed.files() == {"x.key"}


def test_where_the_file_cannot_be_written_the_store_keeps_what_it_had(keyed: Keyed) -> None:
    keyed.good("new", "x", "--role", "client")
    before = keyed.record("x")
    # Longer than a file's name can be: even root cannot write it.
    long = "n" * 255
    for command in (["new", "y", "--role", "client"], ["rotate", "x"]):
        assert "cannot be written: File name too long; no key was made" in keyed.refused(*command, "-o", long)
    assert keyed.record("x") == before
    assert look_at_keys(keyed.url, "local").records.keys() == {"x"}
    # Over nothing but the same owner's key.
    keyed.good("new", "y", "--role", "client")
    assert "is the key of 'y' in the cluster 'local'" in keyed.refused("rotate", "x", "-o", "y.key")
    (keyed.directory / "note").write_text("not a key")
    assert "no key file" in keyed.refused("rotate", "x", "-o", "note")
    os.mkfifo(keyed.directory / "pipe")
    assert "is no file" in keyed.refused("rotate", "x", "-o", "pipe")
    assert keyed.record("x") == before
    # What an interrupted rotation left is looked at first.
    (keyed.directory / "x.key.new").touch()
    assert "interrupted rotation" in keyed.refused("rotate", "x")
    (keyed.directory / "x.key.new").unlink()
    # One that others can read is replaced for that very reason; a link stays one.
    (keyed.directory / "x.key").chmod(0o644)
    (keyed.directory / "link.key").symlink_to("x.key")
    with pytest.raises(InvalidKey, match="laxity keys rotate"):
        keyed.file("x")
    keyed.good("rotate", "x", "-o", "link.key")
    assert (keyed.directory / "link.key").is_symlink()
    assert keyed.file("x").public == keyed.record("x").publics[0].public


def test_keys_made_elsewhere(keyed: Keyed) -> None:
    first, second = new_pair().public, new_pair().public
    keyed.good("new", "mobile", "--role", "client", "--public", first)
    assert "that of 'mobile' already" in keyed.refused("new", "other", "--role", "client", "--public", first)
    keyed.good("rotate", "mobile", "--public", second)
    assert keyed.record("mobile").good(time.time()) == [second, first]
    assert "that of 'mobile' already" in keyed.refused("rotate", "mobile", "--public", first)
    assert keyed.files() == set()


def test_shards_are_written_into_key_files(keyed: Keyed) -> None:
    made = keyed.good("new", "billing", "--role", "client")
    assert "laxity keys servers billing.key" in made.stderr
    assert "no shard has a key yet" in keyed.refused("servers", "billing.key")
    keyed.good("new", "s0", "--role", "shard")
    key = keyed.file("billing")
    assert keyed.good("servers", "billing.key").stdout == "billing.key: s0\n"
    assert keyed.file("billing") == msgspec.structs.replace(key, servers=keyed.file("billing").servers)
    assert keyed.file("billing").servers[0].publics == [keyed.file("s0").public]
    (told,) = keyed.json("servers", "billing.key")
    assert (told["file"], told["servers"][0]["publics"]) == ("billing.key", [keyed.file("s0").public])
    assert "finds shards in the store" in keyed.refused("servers", "s0.key")
    assert "for the cluster 'local'" in keyed.refused("servers", "billing.key", "--cluster", "other")
    assert "cannot be read" in keyed.refused("servers", "none.key")


def test_a_damaged_record_is_told(keyed: Keyed) -> None:
    keyed.good("new", "x", "--role", "client")
    keyed.store.put(PATHS.key("bad"), b"{")
    listed = keyed.good("list")
    assert "damaged" in listed.stdout
    assert "cannot be read" in listed.stderr
    assert "cannot be read" in keyed.refused("revoke", "bad", "--yes")
    assert [key["name"] for key in keyed.json("list")] == ["x"]


def test_what_others_wrote_into_the_store_is_escaped(keyed: Keyed) -> None:
    record = KeyRecord(
        role="client", publics=[PublicKey(new_pair().public, 1.0)], note="a\x1b]0;b\x07", pipelines=["c\x1b[2J"]
    )
    keyed.store.put(PATHS.key("odd"), encode(record))
    keyed.store.put(f"{PATHS.keys}b\x1b[2J", b"{")
    listed, shown = keyed.good("list"), keyed.good("show", "odd")
    for text in (listed.stdout, listed.stderr, shown.stdout):
        assert not any(code in text for code in ("\x1b]", "\x1b[2J", "\x07"))
    assert r"a\x1b]0;b\x07" in shown.stdout
    assert r"c\x1b[2J" in shown.stdout


def test_what_runs_is_shown(keyed: Keyed) -> None:
    for name, role in (("s0", "shard"), ("s1", "shard"), ("a0", "node"), ("a1", "node")):
        keyed.good("new", name, "--role", role)
    keyed.store.put(PATHS.node("a0"), encode(NodeRecord(1, "h", "ready")))
    for public, says in (
        ("", "serves in plain text"),
        (keyed.file("s0").public, "serves with it"),
        (new_pair().public, "not registered"),
    ):
        record = BrokerRecord("tcp://127.0.0.1:1", "tcp://127.0.0.1:2", 1, "h", public=public)
        keyed.store.put(PATHS.broker("s0"), encode(record))
        assert says in keyed.good("show", "s0").stdout
    assert "not running" in keyed.good("show", "s1").stdout
    assert {key["name"]: key["running"] for key in keyed.json("list")} == {
        "s0": True,
        "s1": False,
        "a0": True,
        "a1": False,
    }


# ---- laxity doctor -----------------------------------------------------------------------------


def said(findings: Iterator[Finding], state: str, *parts: str) -> None:
    found = list(findings)
    assert any(
        finding.state == state and all(part in f"{finding.found} {finding.advice}" for part in parts)
        for finding in found
    ), found
    assert all(finding.advice for finding in found if finding.state in ("warning", "error"))


def test_the_doctor_looks_at_key_files(tmp_path: Path) -> None:
    pair, other = new_pair(), new_pair()
    path = tmp_path / "x.key"
    key = KeyFile(cluster="local", name="x", role="client", public=pair.public, secret=pair.secret)
    write_key_file(path, key)
    record = new_record("client", pair.public, 100.0, Limits())
    changed = rotated(record, "x", other.public, 200.0, 50.0, pair.public)

    def judged(found: KeyRecord | None, now: float = 210.0, option: str = "", cluster: str = "local") -> Any:
        keys = Keys({} if found is None else {"x": found}, {}, {}, {})
        return check_key_files({path: option}, cluster, keys, now)

    said(judged(record), "ok", "'x' (client) is good")
    said(judged(record, option="LAXITY_KEY"), "ok", "LAXITY_KEY")
    said(judged(record, option="broker.key"), "error", "of role client, not shard")
    said(judged(record, cluster="other"), "error", "for the cluster 'local'")
    said(judged(None), "error", "unknown to the store", pair.public)
    said(judged(changed), "warning", "was replaced, and ends 1970")
    said(judged(changed, now=250.0), "error", "has ended")
    said(judged(new_record("client", other.public, 1.0, Limits())), "error", "other keys in the store")
    said(judged(revoked(record, 1.0)), "error", "was revoked")
    said(judged(new_record("operator", pair.public, 1.0, Limits())), "error", "of role operator in the store")
    said(check_key_files({path: ""}, "local", None, 0.0), "ok", "readable by its owner only")
    said(check_key_files({path: ""}, "local", Keys({}, {"x": "is damaged"}, {}, {}), 0.0), "error", "is damaged")
    path.chmod(0o640)
    said(judged(record), "error", "can be read by others", "laxity keys rotate")
    path.unlink()
    said(judged(record, option="node.key"), "error", "node.key", "cannot be read")


def test_the_doctor_looks_at_what_the_store_says_of_keys(tmp_path: Path) -> None:
    pair, other = new_pair(), new_pair()
    url = sqlite_url(tmp_path / "store.db")
    record = new_record("shard", pair.public, 100.0, Limits())

    def judged(records: dict[str, KeyRecord], public: str, address: str = "tcp://127.0.0.1:1") -> Any:
        brokers = {"s0": BrokerRecord(address, address, 1, "h", public=public)}
        keys = Keys(records, {}, brokers, {"a0": NodeRecord(1, "h", "ready")})
        return check_keys(keys, url, 210.0)

    assert not list(judged({}, ""))  # plain, and on loopback
    said(judged({}, "", "tcp://0.0.0.0:7100"), "warning", "in plain text at tcp://0.0.0.0:7100")
    said(judged({"s0": record}, pair.public), "ok", "1 owner")
    said(judged({"s0": record}, pair.public), "warning", "'a0' has no key")
    said(judged({}, pair.public), "error", "not registered")
    said(judged({"s0": record}, other.public), "error", "no good any more")
    changed = rotated(record, "s0", other.public, 200.0, 50.0, pair.public)
    said(judged({"s0": changed}, pair.public), "warning", "was replaced", "restart it")
    said(judged({"s0": record, "x": new_record("client", pair.public, 1.0, Limits())}, ""), "error", "the same public")
    said(judged({"s0": KeyRecord(role="shard", publics=[PublicKey(pair.public, 999.0)])}, ""), "warning", "clocks")
    said(check_keys(Keys({}, {"x": "it is damaged"}, {}, {}), url, 0.0), "error", "it is damaged")
    far = "etcd://e1:2379,127.0.0.1:2379"
    said(check_keys(Keys({"s0": record}, {}, {}, {}), far, 0.0), "warning", "whoever reaches e1:2379 can make keys")
    open_store(url).close()
    (tmp_path / "store.db").chmod(0o666)
    tmp_path.chmod(0o755)
    said(judged({"s0": record}, pair.public), "warning", "others can write")
