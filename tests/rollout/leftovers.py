"""Everything that a run makes outside its directories is found again by the run's name, and removed: at its end, and
before the next one where it was killed."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from rollout.commands import Failed, run


def run_directory(name: str) -> Path:
    """Where the hosts' files lie while they run: in memory, gone with the mount."""
    return Path("/run") / name


def hierarchies() -> list[Path]:
    """The mounted control group hierarchies in which systemd keeps account of processes."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options.split(",")):
            found.append(Path(place))
    return found


def control_groups(name: str) -> list[Path]:
    """The run's control group in each hierarchy."""
    return [hierarchy / name for hierarchy in hierarchies()]


def remove(name: str) -> list[str]:
    """Remove the hosts, their files, the bridge and its namespace; what there was, for people. Raises Failed."""
    removed = []
    processes = _end_processes(name)
    if processes:
        removed.append(f"{processes} processes")
    for group in control_groups(name):
        _remove_groups(group)
    for root in run_directory(name).glob("hosts/*/root"):
        found = root.stat()
        Path(f"/run/systemd/nspawn/locks/inode-{found.st_dev}:{found.st_ino}").unlink(missing_ok=True)
    if unmount_below(run_directory(name)):
        removed.append("the hosts' files")
    shutil.rmtree(run_directory(name), ignore_errors=True)
    for made in Path("/run/systemd/nspawn/propagate").glob(f"{name}-*"):
        shutil.rmtree(made, ignore_errors=True)
    if _namespace(name).exists():
        run(["ip", "netns", "delete", name])
        removed.append("the network namespace")
    return removed


def unmount_below(directory: Path) -> int:
    """Unmount everything at and below a directory; how much that was. Raises Failed."""
    mounts = _mounts_below(directory)
    for place in mounts:
        run(["umount", "--recursive", "--lazy", place])
    return len(mounts)


def _namespace(name: str) -> Path:
    return Path("/run/netns") / name


def kill_groups(groups: Iterable[Path]) -> int:
    """Kill all processes of control groups; how many there were. Raises Failed."""
    groups = list(groups)
    return _kill(lambda: set().union(*map(_of_group, groups)))


def _end_processes(name: str) -> int:
    """Kill the hosts' processes and all others in the namespace but the runner and its ancestors."""
    spared = _ancestors()
    groups = control_groups(name)
    return _kill(lambda: _of_namespace(name).union(*map(_of_group, groups)) - spared)


def _kill(find: Callable[[], set[int]]) -> int:
    ended: set[int] = set()
    deadline = time.monotonic() + 20
    while left := {process for process in find() if _state(process) not in "XZ"}:
        if time.monotonic() > deadline:
            raise Failed(f"these do not end though they were killed: {', '.join(map(_told, sorted(left)))}")
        for process in left:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
        ended |= left
        time.sleep(0.05)
    return len(ended)


def _state(process: int) -> str:
    """One letter; ``X`` where there is no such process any more, ``Z`` where it only waits for its parent to look."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _told(process: int) -> str:
    try:
        command = Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    except OSError:
        command = ""
    return f"{process} ({_state(process)}) {command[:200]}"


def _of_group(group: Path) -> set[int]:
    found: set[int] = set()
    for directory, _, _ in os.walk(group):
        try:
            found |= {int(line) for line in Path(directory, "cgroup.procs").read_text().split()}
        except OSError:  # it was removed meanwhile
            continue
    return found - {0}


def _of_namespace(name: str) -> set[int]:
    if not _namespace(name).exists():
        return set()
    return {int(line) for line in run(["ip", "netns", "pids", name]).split()}


def _ancestors() -> set[int]:
    found, process = set(), os.getpid()
    while process:
        found.add(process)
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def _remove_groups(group: Path) -> None:
    """What is still being taken down in them may keep them for a moment; an empty group that stays does no harm."""
    for _ in range(40):
        for directory, _, _ in os.walk(group, topdown=False):
            try:
                os.rmdir(directory)
            except OSError:
                pass
        if not group.exists():
            return
        time.sleep(0.05)


def _mounts_below(directory: Path) -> list[str]:
    """The mount at ``directory``, or the outermost below it."""
    places = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    below = sorted({place for place in places if Path(place).is_relative_to(directory)})
    return [
        place for place in below if not any(Path(place) != Path(o) and Path(place).is_relative_to(o) for o in below)
    ]
