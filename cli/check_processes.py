"""What ``laxity doctor`` looks at of processes: those of a cluster, and what is left of those that have died."""

from __future__ import annotations

import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from cli.finding import Finding
from cli.rundir import RunDirectory, base_directory, left_behind_clusters, running_clusters
from cli.snapshot import Snapshot
from laxity.version import __version__


def check_releases(seen: Snapshot) -> Iterator[Finding]:
    """Whether all processes of a cluster are of one release, and this host's installation too."""
    found: dict[str, list[str]] = defaultdict(list)
    for records in (seen.coordinators, seen.brokers, seen.nodes):
        for name, record in records.items():
            found[record.release or "an older one"].append(name)
    if not found:
        yield Finding("cluster", "note", "no process of it is registered", "start its services (docs/operations.md)")
    elif len(found) > 1:
        told = "; ".join(f"{release}: {', '.join(sorted(names)[:5])}" for release, names in sorted(found.items()))
        advice = "end the upgrade: coordinators, then shards, then nodes"
        yield Finding("cluster", "warning", f"processes of {len(found)} releases ({told})", advice)
    else:
        (release,) = found
        count = len(found[release])
        if release != __version__:
            advice = "install the same release here"
            yield Finding(
                "cluster", "warning", f"its {count} processes are of {release}, this is {__version__}", advice
            )
        else:
            yield Finding("cluster", "ok", f"all {count} processes are of {release}")


def check_leftovers(temporary: Path | None = None) -> Iterator[Finding]:
    """Clusters, processes and directories whose owners were ended by force."""
    running = running_clusters()
    yield Finding("clusters", "ok", f"running: {', '.join(running)}" if running else "none is running")
    for cluster in left_behind_clusters():
        directory = RunDirectory(cluster).path
        advice = f"nothing to do: the next `laxity up --cluster {cluster}` begins afresh; or remove {directory}"
        yield Finding("clusters", "note", f"{cluster!r} was ended by force and left its store behind", advice)
    commands = _own_processes()
    for pid, command in commands.items():
        why = _orphan(pid, command, running)
        if why:
            yield Finding("leftovers", "warning", f"process {pid} {why}", f"end it: `kill {pid}`")
    used = " ".join(" ".join(command) for command in commands.values())
    base = Path(tempfile.gettempdir()) if temporary is None else temporary
    left = [path for path in base.glob("laxity-worker-*") if path.name not in used and os.access(path, os.W_OK)]
    if left:
        some = ", ".join(str(path) for path in sorted(left)[:3])
        advice = f"remove them, while no agent is starting: `rm -r {base}/laxity-worker-*`"
        yield Finding("leftovers", "note", f"{len(left)} directories of workers that were killed: {some}", advice)


def _orphan(pid: int, command: list[str], running: list[str]) -> str:
    """Why a process of ours should not be there; '' where it may."""
    if "nodes.worker" in command and "--parent" in command:
        parent = command[command.index("--parent") + 1]
        if not Path("/proc", parent).exists():
            return f"is a worker whose agent (process {parent}) has ended"
    if "cli.main" in command and "run" in command and "--store" in command:
        store = command[command.index("--store") + 1]
        match = re.fullmatch(f"sqlite://{re.escape(str(base_directory()))}/([^/]+)/store.db", store)
        if match is not None and match[1] not in running:
            return f"belongs to the cluster {match[1]!r}, which does not run"
    return ""


def _own_processes() -> dict[int, list[str]]:
    """The command lines of this user's processes."""
    found = {}
    for directory in Path("/proc").iterdir():
        try:
            if directory.name.isdigit() and directory.stat().st_uid == os.getuid():
                raw = (directory / "cmdline").read_bytes()
                found[int(directory.name)] = [part.decode(errors="replace") for part in raw.split(b"\0") if part]
        except OSError:
            continue  # it has ended meanwhile
    return found
