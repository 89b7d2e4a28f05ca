"""`laxity up --secure`: only owners of keys are let in, from start to end, with real processes."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import eventually

from cluster.keyring import Limits, new_record
from cluster.records import Paths, encode, name_of
from cluster.store import open_store, sqlite_url
from cluster.store.base import Store
from laxity import Client
from laxity.keys import new_pair, read_key_file
from laxity.outcomes import Outcome

COMMAND = [sys.executable, "-P", "-m", "cli.main"]
PATIENCE = 1.0
"""Seconds that a request may take; one that nobody takes ends after that."""
LIMITED = ("--pipelines", "echo", "--in-flight", "5")


class Shell:
    """Runs `laxity` with a run directory of its own."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime
        self.keys = runtime / "laxity" / "local" / "keys"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LAXITY_")}
        self.environment = inherited | {"XDG_RUNTIME_DIR": str(runtime)}

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments], env=self.environment | environment, input="", capture_output=True, text=True
        )

    def good(self, *arguments: str) -> str:
        result = self(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    made("down")


def outcome(url: str, key: Path | None) -> Outcome:
    with Client(url, key=key or "") as client:
        return client.submit("echo", "hello", PATIENCE).reply().outcome


def names(store: Store) -> set[str]:
    return {name_of(entry.key) for entry in store.list(Paths("local").keys).entries}


def test_only_owners_of_keys_are_let_in(shell: Shell, tmp_path: Path) -> None:
    up = json.loads(shell.good("up", "echo", "--secure", "--shards", "2", "--coordinators", "1", "--detach", "--json"))
    url, key = ",".join(up["addresses"]), Path(up["key"])
    assert stat.S_IMODE(shell.keys.stat().st_mode) == 0o700
    assert {path.name for path in shell.keys.iterdir()} == {"agent-0.key", "operator.key", "shard-0.key", "shard-1.key"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in shell.keys.iterdir()} == {0o600}
    assert {server.address for server in read_key_file(key).servers} == set(up["addresses"])

    # Commands find the operator's key, the SDK is told of it; others stay outside.
    assert shell.good("submit", "echo", "--text", "hello") == "hello\n"
    eventually(lambda: outcome(url, key) is Outcome.OK, "the operator's key is good")
    assert outcome(url, None) is Outcome.UNAVAILABLE
    billing = tmp_path / "billing.key"
    shell.good("keys", "new", "billing", "--role", "client", "-o", str(billing), *LIMITED)
    eventually(lambda: outcome(url, billing) is Outcome.OK, "a new client is let in")
    doctor = json.loads(shell("doctor", "--json").stdout)
    assert {finding["state"] for finding in doctor if finding["check"] == "keys"} == {"ok"}

    # A shard that is started again has its key and its address.
    shards = json.loads(shell.good("status", "--json"))["shards"]
    for shard in shards:
        os.kill(shard["pid"], signal.SIGKILL)
    eventually(lambda: outcome(url, billing) is Outcome.OK, "killed shards are back")

    # An old key ends with a rotation, or with a revocation.
    old = tmp_path / "old.key"
    old.write_bytes(billing.read_bytes())
    old.chmod(0o600)
    shell.good("keys", "rotate", "billing", "-o", str(billing))
    eventually(lambda: outcome(url, billing) is Outcome.OK, "the new key is good")
    eventually(lambda: outcome(url, old) is Outcome.OK, "the old one still is")
    shell.good("keys", "rotate", "billing", "-o", str(billing), "--overlap", "0s")
    eventually(lambda: outcome(url, old) is Outcome.UNAVAILABLE, "the old key is over")
    eventually(lambda: outcome(url, billing) is Outcome.OK, "the newest key is good")
    shell.good("keys", "revoke", "billing", "--yes")
    eventually(lambda: outcome(url, billing) is Outcome.UNAVAILABLE, "a revoked key is over")
    log = "".join(file.read_text() for file in (shell.runtime / "laxity" / "local" / "logs").glob("shard-*.log"))
    assert "key 'billing' was revoked" in log

    shell.good("down")
    assert not shell.keys.exists()


def test_a_store_that_stays_keeps_peoples_keys(shell: Shell, tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "store.db")
    up = ("up", "echo", "--store", url, "--detach")
    shell.good("keys", "new", "billing", "--role", "client", "--store", url, "-o", str(tmp_path / "billing.key"))
    store = open_store(url)
    try:
        told = shell.good(*up, "--secure")
        assert f"export LAXITY_KEY={shell.keys / 'operator.key'}" in told
        assert names(store) == {"billing", "operator", "shard-0", "agent-0"}
        shell.good("down")
        assert names(store) == {"billing"}
        # A name that is somebody else's is left alone.
        theirs = encode(new_record("operator", new_pair().public, 1.0, Limits()))
        store.put(Paths("local").key("operator"), theirs)
        refused = shell(*up, "--secure")
        assert refused.returncode == 1
        assert "the store has a key 'operator'" in refused.stderr
        entry = store.get(Paths("local").key("operator"))
        assert entry is not None
        assert entry.value == theirs
        assert names(store) == {"billing", "operator"}
    finally:
        store.close()
    assert not shell.keys.exists()


def test_a_shard_whose_key_is_revoked_ends(shell: Shell, tmp_path: Path) -> None:
    url, key = sqlite_url(tmp_path / "store.db"), tmp_path / "s0.key"
    shell.good("keys", "new", "s0", "--role", "shard", "--store", url, "-o", str(key))
    command = [*COMMAND, "broker", "run", "--shard", "s0", "--store", url, "--key", str(key), "--http", ""]
    store = open_store(url)
    try:
        shard = subprocess.Popen(command, env=shell.environment, stderr=subprocess.PIPE, text=True)
        try:
            eventually(lambda: store.get(Paths("local").broker("s0")) is not None, "the shard is registered")
            shell.good("keys", "revoke", "s0", "--yes", "--store", url)
            _, told = shard.communicate(timeout=60)
        finally:
            shard.kill()
            shard.wait()
        assert shard.returncode == 1
        assert "the key of shard 's0' was revoked" in told
        eventually(lambda: store.get(Paths("local").broker("s0")) is None, "its record is gone")
        again = subprocess.run(command, env=shell.environment, capture_output=True, text=True)
        assert again.returncode == 1
        assert "the key of shard 's0' was revoked" in again.stderr
        assert store.get(Paths("local").broker("s0")) is None
    finally:
        store.close()
