"""Hosts: systems under systemd-nspawn, reached by ssh."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rollout import network
from rollout.commands import Failed, run
from rollout.image import USER
from rollout.leftovers import control_groups, kill_groups, run_directory

START_TIMEOUT = 60.0
_ENTER_GROUP = (
    'for group in "$@"; do shift; [ "$group" = -- ] && break; echo $$ > "$group/cgroup.procs"; done; exec "$@"'
)


@dataclass
class Host:
    """One host; ``number`` gives it its address."""

    run: str
    name: str
    number: int
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        return network.address(self.number)

    @property
    def user_address(self) -> str:
        return f"{USER}@{self.address}"

    @property
    def machine(self) -> str:
        return f"{self.run}-{self.name}"

    @property
    def directory(self) -> Path:
        return run_directory(self.run) / "hosts" / self.name

    @property
    def root(self) -> Path:
        return self.directory / "root"


class Hosts:
    """All hosts of a run. They are made from ``image``; :func:`rollout.leftovers.remove` ends them."""

    def __init__(self, name: str, names: Sequence[str], image: Path) -> None:
        self.name = name
        self.image = image
        self.directory = run_directory(name)
        self.hosts = {host: Host(name, host, number) for number, host in enumerate(names, 1)}

    @property
    def key(self) -> Path:
        """The private key by which the hosts let in their administrator."""
        return self.directory / "ssh" / "key"

    @property
    def ssh_options(self) -> list[str]:
        """What ssh needs to be told to reach a host."""
        known = self.directory / "ssh" / "known_hosts"
        pairs = ("StrictHostKeyChecking=accept-new", f"UserKnownHostsFile={known}", "LogLevel=ERROR", "BatchMode=yes")
        return ["-i", str(self.key), *(word for pair in pairs for word in ("-o", pair))]

    def make(self) -> None:
        """Lay out the hosts' files: the image, and what is each one's own in memory above it. Raises Failed."""
        self.directory.mkdir(mode=0o700)
        run(["mount", "-t", "tmpfs", "-o", "mode=0700,size=8g", self.name, self.directory])
        # In memory, too: above a disk's file system, copies would be given attributes that memory does not have.
        base = self.directory / "base"
        run(["cp", "--archive", self.image, base])
        self.key.parent.mkdir()
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.name, "-f", self.key])
        for host in self.hosts.values():
            for part in ("upper", "work", "root"):
                (host.directory / part).mkdir(parents=True)
            layers = f"lowerdir={base},upperdir={host.directory / 'upper'},workdir={host.directory / 'work'}"
            run(["mount", "-t", "overlay", "-o", layers, host.machine, host.root])
            self._configure(host)

    def boot(self, names: Sequence[str] | None = None) -> None:
        """Boot hosts, all if none are named, and wait until they let people in. Raises Failed."""
        booting = [self.hosts[name] for name in names or self.hosts]
        for host in booting:
            self._start(host)
        deadline = time.monotonic() + START_TIMEOUT
        for host in booting:
            while not self._lets_in(host):
                if host.process is not None and host.process.poll() is not None:
                    raise Failed(f"{host.name} did not boot:\n{self._console(host)}")
                if time.monotonic() > deadline:
                    raise Failed(f"{host.name} has not let ssh in after {START_TIMEOUT:g} s:\n{self._console(host)}")
                time.sleep(0.1)

    def kill(self, name: str) -> None:
        """The power goes: no process of the host does anything more."""
        host = self.hosts[name]
        kill_groups(group / name for group in control_groups(self.name))
        if host.process is not None:
            host.process.wait()
            host.process = None

    def ssh(self, name: str, command: str, *, timeout: float = 60) -> str:
        """What a shell command prints on a host, run by its administrator. Raises Failed."""
        host = self.hosts[name]
        return run(["ssh", *self.ssh_options, host.user_address, command], timeout=timeout)

    def journal(self, name: str, *options: str) -> str:
        """What the host's services have logged; of a host that is down as well."""
        journal = self.hosts[name].root / "var/log/journal"
        return run(["journalctl", "--directory", journal, "--no-pager", "--output=short-precise", *options])

    def _configure(self, host: Host) -> None:
        etc = host.root / "etc"
        (etc / "hostname").write_text(f"{host.name}\n")
        (etc / "machine-id").write_text(f"{uuid.uuid4().hex}\n")
        lines = ["127.0.0.1 localhost", "::1 localhost"]
        lines += [f"{other.address} {other.name}" for other in self.hosts.values()]
        (etc / "hosts").write_text("\n".join(lines) + "\n")
        # Sorts before the one that systemd brings for its containers, which would ask for an address.
        (etc / "systemd/network/10-host.network").write_text(
            f"[Match]\nName=host0\n[Network]\nAddress={host.address}/{network.PREFIX}\nLinkLocalAddressing=no\n"
        )
        home = host.root / "home" / USER
        (home / ".ssh").mkdir(mode=0o700)
        (home / ".ssh/authorized_keys").write_text(self.key.with_suffix(".pub").read_text())
        owner = home.stat()
        for path in (home / ".ssh", home / ".ssh/authorized_keys"):
            os.chown(path, owner.st_uid, owner.st_gid)

    def _start(self, host: Host) -> None:
        groups = [group / host.name for group in control_groups(self.name)]
        for group in groups:
            group.mkdir(parents=True, exist_ok=True)
        container = [
            *("systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--console=pipe"),
            *("--link-journal=no", "--resolv-conf=off", "--timezone=off", f"--network-bridge={network.BRIDGE}"),
            *(f"--machine={host.machine}", f"--hostname={host.name}", f"--directory={host.root}"),
        ]
        with open(host.directory / "console", "ab") as console:
            host.process = subprocess.Popen(
                ["sh", "-c", _ENTER_GROUP, "sh", *map(str, groups), "--", *container],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the runner's
            )

    def _lets_in(self, host: Host) -> bool:
        reach = [*self.ssh_options, "-o", "ConnectTimeout=1", host.user_address]
        done = subprocess.run(["ssh", *reach, "true"], stdin=subprocess.DEVNULL, capture_output=True)
        return done.returncode == 0

    def _console(self, host: Host) -> str:
        return (host.directory / "console").read_text(errors="replace")[-4000:]
