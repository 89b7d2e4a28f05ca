"""An etcd of one's own on this machine: its members' command lines, ports and certificates, for whoever runs them."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path

import msgspec

from cluster.certificates import Certificates, make_certificates
from cluster.store.base import StoreError
from cluster.store.etcd_address import EtcdAddress

HOST = "127.0.0.1"
KEPT_REVISIONS = 10_000
"""How many past revisions the members keep for watches."""
TRANSACTION_OPERATIONS = 10_000
TRANSACTION_BYTES = 16_000_000
"""How large one transaction may be."""
PAUSE = 0.1
"""Seconds between two attempts to reach a member that starts."""


class Ports(msgspec.Struct, frozen=True):
    """Where a member listens for clients and for its peers."""

    client: int
    peer: int


class EtcdMembers:
    """``members`` etcd servers that listen on the loopback alone and demand certificates from everybody.

    ``directory`` (made where it is absent) gets their data, certificates and ports; another object for the same
    directory is the same etcd. The ports are free ones, and nobody else gets them while this object is open. Raises
    :class:`StoreError` where they cannot be run.
    """

    def __init__(self, directory: Path, members: int) -> None:
        binary = shutil.which("etcd")
        if binary is None:
            raise StoreError(
                "etcd is not installed; on Debian its package is etcd-server (apt-get install etcd-server), "
                "elsewhere see https://etcd.io/docs/latest/install"
            )
        if members < 1:
            raise StoreError(f"an etcd has at least 1 member, not {members}; 3 outlive the loss of one")
        self._binary = binary
        self._directory = directory.absolute()
        self._held: list[socket.socket] = []
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._certificates = _certificates(self._directory / "certificates")
            self._ports = self._reserve(members)
        except OSError as error:
            self.close()
            raise StoreError(f"the directory {directory} cannot be used for an etcd: {error}") from error
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """The store's address for clients, certificates included."""
        return self._address(*self._ports).url

    def commands(self) -> list[tuple[str, list[str]]]:
        """Each member's name and command line, by which it is started and, on the same data, started again."""
        cluster = ",".join(f"{name}=https://{HOST}:{ports.peer}" for name, ports in self._named())
        return [(name, self._command(name, ports, cluster)) for name, ports in self._named()]

    def wait_healthy(self, timeout: float) -> None:
        """Return once every member serves reads; :class:`StoreError` after ``timeout`` seconds."""
        from cluster.store.etcd import EtcdStore

        deadline = time.monotonic() + timeout
        for name, ports in self._named():
            while True:
                left = deadline - time.monotonic()
                try:
                    EtcdStore(self._address(ports), timeout=max(left, PAUSE)).close()
                    break
                except StoreError as error:
                    if left <= 0:
                        raise StoreError(f"{name} did not become healthy within {timeout:g} s: {error}") from error
                    time.sleep(PAUSE)

    def close(self) -> None:
        """Let go of the ports, after the members have ended."""
        for held in self._held:
            held.close()
        self._held.clear()

    def _named(self) -> list[tuple[str, Ports]]:
        return [(f"etcd{number}", ports) for number, ports in enumerate(self._ports)]

    def _address(self, *members: Ports) -> EtcdAddress:
        return EtcdAddress(
            endpoints=tuple(f"{HOST}:{ports.client}" for ports in members),
            ca=self._certificates.ca,
            cert=self._certificates.client_cert,
            key=self._certificates.client_key,
        )

    def _command(self, name: str, ports: Ports, cluster: str) -> list[str]:
        client, peer = f"https://{HOST}:{ports.client}", f"https://{HOST}:{ports.peer}"
        files = self._certificates
        flags = {
            "name": name,
            "data-dir": self._directory / name,
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": cluster,
            "initial-cluster-state": "new",
            "initial-cluster-token": f"laxity-{self._ports[0].peer}",
            "client-cert-auth": "true",
            "trusted-ca-file": files.ca,
            "cert-file": files.server_cert,
            "key-file": files.server_key,
            "peer-client-cert-auth": "true",
            "peer-trusted-ca-file": files.ca,
            "peer-cert-file": files.server_cert,
            "peer-key-file": files.server_key,
            "auto-compaction-mode": "revision",
            "auto-compaction-retention": KEPT_REVISIONS,
            "max-txn-ops": TRANSACTION_OPERATIONS,
            "max-request-bytes": TRANSACTION_BYTES,
            "logger": "zap",
            "log-level": "warn",
            "log-outputs": "stderr",
        }
        return [self._binary, *(f"--{flag}={value}" for flag, value in flags.items())]

    def _reserve(self, members: int) -> list[Ports]:
        """The members' ports: those of an earlier time, which their data names, else free ones."""
        path = self._directory / "ports.json"
        if not path.exists():
            ports = [Ports(self._hold(0), self._hold(0)) for _ in range(members)]
            path.write_bytes(msgspec.json.encode(ports))
            return ports
        try:
            ports = msgspec.json.decode(path.read_bytes(), type=list[Ports])
        except msgspec.DecodeError as error:
            raise StoreError(f"{path} cannot be read ({error}); remove {self._directory} to start afresh") from error
        if len(ports) != members:
            raise StoreError(
                f"the etcd in {self._directory} has {len(ports)} members, not {members}; "
                "start it with as many, or remove the directory to start afresh"
            )
        for port in (port for member in ports for port in (member.client, member.peer)):
            try:
                self._hold(port)
            except OSError as error:
                raise StoreError(
                    f"port {port}, which the etcd in {self._directory} had, is in use by another process; end that "
                    "one (is this etcd still running?), or remove the directory to start afresh"
                ) from error
        return ports

    def _hold(self, port: int) -> int:
        """Bind a port (0: any free one) without listening: nobody else gets it, but a server that, as etcd does, sets
        SO_REUSEADDR can still listen on it."""
        held = socket.socket()
        self._held.append(held)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((HOST, port))
        bound: int = held.getsockname()[1]
        return bound


def _certificates(directory: Path) -> Certificates:
    try:
        return make_certificates(directory, [HOST, "localhost"])
    except ImportError as error:
        raise StoreError("an etcd of one's own needs more packages; pip install 'laxity[etcd]'") from error
