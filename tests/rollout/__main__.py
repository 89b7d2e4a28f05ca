"""``python -m rollout``, with ``tests`` on the path: the whole test, or just the hosts to try something on."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType

from rollout import leftovers, network
from rollout.commands import Failed
from rollout.hosts import Hosts
from rollout.image import base_image
from rollout.inventory import Workspace, write_workspace
from rollout.steps import STEPS, Rollout
from rollout.wheels import UPGRADE, make_wheelhouse, unpack, version

SOURCE = Path(__file__).resolve().parents[2]
HOSTS = ("control-1", "control-2", "control-3", "gpu-1", "gpu-2")
NEEDED = {
    "debootstrap": "debootstrap",
    "systemd-nspawn": "systemd-container",
    "journalctl": "systemd",
    "nsenter": "util-linux",
    "ip": "iproute2",
    "ssh": "openssh-client",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="rollout", description=__doc__)
    parser.add_argument("what", choices=["test", "up", "down"], help="test all; boot hosts and leave them; end them")
    parser.add_argument("--name", default="laxity-rollout", help="runs of different names do not touch one another")
    parser.add_argument("--steps", default=",".join(STEPS), help="those to take, in this order (default: %(default)s)")
    parser.add_argument("--ansible", default="ansible-playbook", metavar="COMMAND", help="default: %(default)s")
    parser.add_argument("--attach", action="store_true", help="take the steps on hosts that `up` has left")
    parser.add_argument("--keep", action="store_true", help="leave the hosts running at the end, to look at them")
    options = parser.parse_args()
    unknown = set(options.steps.split(",")) - set(STEPS)
    if unknown:
        parser.error(f"there is no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGHUP, _stop)
    try:
        _check()
        with open(f"/run/{options.name}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Failed(f"another run named {options.name} is under way; give this one another --name") from None
            _run(options)
            return 0
    except Failed as error:
        for one in (error.__context__, error):  # the cleaning up may have failed after something else did
            if isinstance(one, Failed):
                print(f"\nFAILED: {one}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        return 130


def _run(options: argparse.Namespace) -> None:
    workspace = Workspace(SOURCE, SOURCE / "build" / "rollout" / options.name, options.ansible)
    if network.inside(options.name):
        _run_inside(options, workspace)
        return
    if options.attach:
        network.enter(options.name, [sys.executable, "-m", "rollout", *sys.argv[1:]])
    if removed := leftovers.remove(options.name):
        print(f"removed what an earlier run had left: {', '.join(removed)}", flush=True)
    if options.what == "down":
        return
    base_image(_cache())
    shutil.rmtree(workspace.directory, ignore_errors=True)
    make_wheelhouse(SOURCE, Path(sys.executable), _cache(), workspace.wheelhouse)
    unpack(workspace.wheelhouse, version(SOURCE), workspace.package)
    try:
        network.make(options.name)
        network.enter(options.name, [sys.executable, "-m", "rollout", *sys.argv[1:]])
    except BaseException:
        leftovers.remove(options.name)
        raise


def _run_inside(options: argparse.Namespace, workspace: Workspace) -> None:
    """The second half of a run, which has entered the hosts' network."""
    hosts = Hosts(options.name, HOSTS, base_image(_cache()))
    keep = options.keep or options.attach
    try:
        _boot_and_test(options, hosts, workspace)
        keep = keep or options.what == "up"
    finally:
        _save_journals(hosts, workspace)
        if not keep:
            leftovers.remove(options.name)


def _boot_and_test(options: argparse.Namespace, hosts: Hosts, workspace: Workspace) -> None:
    versions = (version(SOURCE), version(SOURCE) + UPGRADE)
    if not options.attach:
        hosts.make()
        hosts.boot()
        write_workspace(workspace, hosts, versions[0])
    if options.what == "test":
        Rollout(hosts, workspace, versions).take(options.steps.split(","))
        return
    inside = f"nsenter --net=/run/netns/{options.name}"
    reach = f"{inside} ssh {' '.join(hosts.ssh_options)} {hosts.hosts['control-1'].user_address}"
    print(f"{len(HOSTS)} hosts run. To reach one, to roll out, and to end them all:", flush=True)
    print(f"  {reach}\n  {inside} env ANSIBLE_CONFIG={workspace.configuration} \\", flush=True)
    print(f"    {options.ansible} laxity.laxity.site", flush=True)
    print(f"  python -m rollout down --name {options.name}", flush=True)


def _save_journals(hosts: Hosts, workspace: Workspace) -> None:
    for name in hosts.hosts:
        try:
            text = hosts.journal(name)
        except Failed as error:
            text = f"{error}\n"
        workspace.logs.mkdir(parents=True, exist_ok=True)
        (workspace.logs / f"{name}.journal").write_text(text)


def _check() -> None:
    """Raises Failed where hosts cannot be booted, with what is missing."""
    if os.geteuid() != 0:
        raise Failed("only root can boot hosts; use `sudo make test-rollout`")
    missing = sorted({package for command, package in NEEDED.items() if shutil.which(command) is None})
    if missing:
        raise Failed(f"packages are missing: apt-get install {' '.join(missing)}")
    if not leftovers.hierarchies():
        raise Failed("no control groups are mounted in /sys/fs/cgroup; systemd does not boot without")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "laxity" / "rollout"


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
