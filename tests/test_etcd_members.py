"""An etcd of one's own."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cluster.store import open_store
from cluster.store.base import StoreError
from cluster.store.etcd_address import parse_address
from cluster.store.etcd_members import EtcdMembers


@pytest.fixture
def etcd_installed(etcd: Any) -> None:
    """Skips where there is none."""


@pytest.mark.parametrize("count", [1, 3])
def test_its_members_serve_and_can_be_started_again_on_their_data(make_etcd: Callable[[int], Any], count: int) -> None:
    etcd = make_etcd(count)
    with closing(open_store(etcd.url)) as store:
        store.put("/stays", b"1")
        etcd.kill(*etcd.names)
    etcd.start()
    with closing(open_store(etcd.url)) as store:
        assert [entry.key for entry in store.list("/").entries] == ["/stays"]


@pytest.mark.usefixtures("etcd_installed")
def test_the_same_directory_is_the_same_etcd(tmp_path: Path) -> None:
    with closing(EtcdMembers(tmp_path / "e", 2)) as members:
        url, commands = members.url, members.commands()
    with closing(EtcdMembers(tmp_path / "e", 2)) as again:
        assert again.url == url
        assert again.commands() == commands
    with pytest.raises(StoreError, match="has 2 members, not 3"):
        EtcdMembers(tmp_path / "e", 3)
    port = int(parse_address(url).endpoints[0].rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)), pytest.raises(StoreError, match=f"port {port}.*is in use"):
        EtcdMembers(tmp_path / "e", 2)
    (tmp_path / "e" / "ports.json").write_text("[1]")
    with pytest.raises(StoreError, match=r"ports.json cannot be read"):
        EtcdMembers(tmp_path / "e", 2)


@pytest.mark.usefixtures("etcd_installed")
def test_its_ports_are_nobody_elses(tmp_path: Path) -> None:
    with closing(EtcdMembers(tmp_path / "a", 3)) as one, closing(EtcdMembers(tmp_path / "b", 3)) as other:
        ports = [*parse_address(one.url).endpoints, *parse_address(other.url).endpoints]
        assert len(set(ports)) == 6
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", int(ports[0].rpartition(":")[2])))


@pytest.mark.usefixtures("etcd_installed")
def test_members_that_do_not_run_are_not_healthy(tmp_path: Path) -> None:
    expected = pytest.raises(StoreError, match=r"etcd0 did not become healthy .* nothing listens there")
    with closing(EtcdMembers(tmp_path, 3)) as members, expected:
        members.wait_healthy(0.1)


@pytest.mark.usefixtures("etcd_installed")
def test_it_has_a_member(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="at least 1 member, not 0"):
        EtcdMembers(tmp_path, 0)


def test_without_etcd_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StoreError, match="apt-get install etcd-server"):
        EtcdMembers(tmp_path / "e", 1)
