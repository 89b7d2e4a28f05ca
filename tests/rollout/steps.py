"""The steps of the test; each asserts what it shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout.certificate import make_certificate
from rollout.commands import Failed, run
from rollout.hosts import Hosts
from rollout.inventory import CLUSTER, Workspace, store_url
from rollout.recap import Recap, read_recap
from rollout.traffic import BAD, Traffic

PIPELINE = Path(__file__).with_name("pipeline.yaml")
ASK = """
import laxity, sys
try:
    print("answered:", laxity.Client(sys.argv[1]).infer("rollout", b"request"))
except (ValueError, laxity.LaxityError) as error:
    print("refused:", error)
"""
RATE = 25.0
"""Requests per second while something is done to the hosts, which share the runner's cores with it."""


class Rollout:
    """The test. Steps are taken in order, and each builds upon those before it."""

    def __init__(self, hosts: Hosts, workspace: Workspace, versions: tuple[str, str]) -> None:
        self.hosts = hosts
        self.workspace = workspace
        self.first, self.second = versions
        self.took: list[tuple[str, float]] = []

    def take(self, steps: Sequence[str]) -> None:
        """Take them; raises Failed at the first thing that is not as it should be."""
        self.workspace.logs.mkdir(parents=True, exist_ok=True)
        for name in steps:
            step = STEPS[name]
            say(f"\n=== {name}: {(step.__doc__ or '').strip().splitlines()[0]}")
            begun = time.monotonic()
            step(self)
            self.took.append((name, time.monotonic() - begun))
            say(f"=== {name} took {self.took[-1][1]:.0f} s")
        say("\nstep            seconds")
        for name, seconds in self.took:
            say(f"{name:<15} {seconds:7.0f}")
        say(f"{'all':<15} {sum(seconds for _, seconds in self.took):7.0f}")

    def check_mode(self) -> None:
        """Ansible's check mode on hosts that have nothing yet: it goes through, and changes nothing."""
        self._playbook("site", "--check", log="check-fresh")
        for name in self.hosts.hosts:
            if found := self.hosts.ssh(
                name, "ls -d /opt/laxity /etc/laxity /var/lib/laxity 2>/dev/null || true"
            ).strip():
                raise Failed(f"check mode has made {found} on {name}")

    def site(self) -> None:
        """Roll out to fresh hosts."""
        self._playbook("site")
        make_certificate(self.workspace)
        self._await("every service to be there", self._all_there, 120)

    def serve(self) -> None:
        """Requests through the SDK with a client's key, and from `laxity load` with an operator's."""
        for role in ("client", "operator"):
            file = self._key(role)
            if file.exists():
                continue
            self.laxity("keys", "new", f"rollout-{role}", "--role", role, "--output", str(file))
        say(self.laxity("keys", "list"))
        say(self.laxity("pipeline", "apply", str(PIPELINE), "--timeout", "60s", key="operator"))
        for key, wanted in (("client", "answered"), (None, "refused")):
            ask = [sys.executable, "-c", ASK, self._frontends()]
            told = run(ask, env=self._environment(key), cwd=self.workspace.package).strip()
            say(f"through the SDK, {key or 'without a'} key: {told}")
            if not told.startswith(wanted):
                raise Failed(f"that should have been {wanted}")
        say(
            self.laxity(
                *("load", "rollout", "--request-rate-range", str(RATE), "--duration", "5s"),
                *("--fail-under", "99"),
                key="client",
            )
        )
        say(self.laxity("status"))

    def again(self) -> None:
        """Roll out once more: nothing changes."""
        recap = self._playbook("site", log="site-again")
        if recap.total("changed"):
            raise Failed(f"it changed something; see {self.workspace.logs / 'site-again.log'}")

    def upgrade(self) -> None:
        """Upgrade to another version under load: no request fails."""
        self._under_load("upgrade", lambda: self._playbook("upgrade", "-e", f"laxity_version={self.second}"))
        releases = self._releases()
        say(f"releases: {releases}")
        if set(releases.values()) != {self.second}:
            raise Failed(f"not everything runs {self.second}")

    def kill(self) -> None:
        """Two hosts lose their power under load, a node and one that has a shard; and come back."""
        self._under_load("kill", self._kill)

    def rotate(self) -> None:
        """Replace all keys under load: no request fails."""
        before = self._publics()
        self._under_load("rotate", lambda: self._playbook("rotate_keys"))
        after = self._publics()
        kept = [
            name for name, public in before.items() if after.get(name) == public and not name.startswith("rollout-")
        ]
        if kept:
            raise Failed(f"these keys are the same as before: {', '.join(kept)}")
        self.laxity(
            "load", "rollout", "--request-rate-range", "20", "--duration", "3s", "--fail-under", "99", key="client"
        )

    def remove(self) -> None:
        """Take everything off the hosts again."""
        self._playbook("remove", "-e", "laxity_remove_data=true")
        for name in self.hosts.hosts:
            listed = "ls -d /opt/laxity /etc/laxity /var/lib/laxity /etc/systemd/system/laxity* 2>/dev/null || true"
            running = "systemctl list-units --all --no-legend 'laxity*'; pgrep -u laxity -a || true"
            if left := self.hosts.ssh(name, f"{listed}; {running}").strip():
                raise Failed(f"{name} still has:\n{left}")

    # ---- what they are made of -----------------------------------------------------------------

    def laxity(self, *arguments: str, key: str | None = None, timeout: float = 120) -> str:
        """What a command of `laxity` prints, run here against the hosts."""
        command = [sys.executable, "-m", "cli.main", *arguments]
        return run(command, env=self._environment(key), cwd=self.workspace.package, timeout=timeout)

    def _environment(self, key: str | None) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("LAXITY_")}
        env |= {"LAXITY_STORE": store_url(self.workspace, self.hosts), "LAXITY_CLUSTER": CLUSTER, "COLUMNS": "140"}
        return env | ({"LAXITY_KEY": str(self._key(key))} if key else {})

    def _key(self, role: str) -> Path:
        return self.workspace.secrets / f"rollout-{role}.key"

    def _playbook(self, name: str, *options: str, log: str | None = None) -> Recap:
        """Run a playbook of the collection; its recap. Raises Failed if a task failed or a host was not reached."""
        path = self.workspace.logs / f"{log or name}.log"
        command = [self.workspace.ansible, f"laxity.laxity.{name}", *options]
        env = {**os.environ, "ANSIBLE_CONFIG": str(self.workspace.configuration), "LC_ALL": "C.UTF-8"}
        begun = time.monotonic()
        output, status = _logged(command, env, path)
        recap = read_recap(output)
        say(f"{' '.join(['ansible-playbook', *command[1:]])}: {time.monotonic() - begun:.0f} s")
        say("PLAY RECAP" + output.rpartition("PLAY RECAP")[2].rstrip())
        if status or recap.total("failed") or recap.total("unreachable"):
            raise Failed(f"{name} failed ({status}); {path} ends:\n" + "\n".join(output.splitlines()[-60:]))
        return recap

    def _under_load(self, name: str, act: Callable[[], object]) -> None:
        log = self.workspace.logs / f"{name}-load.log"
        traffic = Traffic("rollout", RATE, self._environment("client"), self.workspace.package, log)
        with traffic:
            self._await("the load to be on both shards", lambda: self._serving() == 2, 120)
            act()
            if not traffic.running():
                raise Failed(f"the load ended by itself:\n{log.read_text()[-2000:]}")
        say(f"outcomes during {name}:")
        for outcome, count in traffic.outcomes.items():
            say(f"  {outcome:<12} {count:7}")
        for line in traffic.said:
            say(f"  {line}")
        latency = traffic.latency_ms
        say(
            "  latency ms: "
            + ", ".join(f"{name} {latency[name]:.0f}" for name in ("p50", "p99", "max") if name in latency)
        )
        bad = {outcome: count for outcome, count in traffic.outcomes.items() if outcome in BAD and count}
        if bad or traffic.outcomes["ok"] == 0:
            raise Failed(f"requests ended as they must not: {traffic.outcomes}")

    def _kill(self) -> None:
        for name in ("gpu-2", "control-2"):
            self.hosts.kill(name)
            say(f"{name} is without power")
        self._await("gpu-2 to be lost", lambda: self._status_of_node("gpu-2") == "lost", 120)
        say(self.laxity("status"))
        self.hosts.boot(["gpu-2", "control-2"])
        say("both have booted again")
        self._await("every service to be there again", self._all_there, 120)

    def _status(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.laxity("status", "--json"))
        return told

    def _status_of_node(self, name: str) -> str:
        return next((node["state"] for node in self._status()["nodes"] if node["node"] == name), "")

    def _all_there(self) -> bool:
        seen = self._status()
        nodes = {node["node"]: node["state"] for node in seen["nodes"]}
        wanted = {name for name in self.hosts.hosts if name.startswith("gpu")}
        there = {name for name, state in nodes.items() if state in ("active", "standby")}
        return len(seen["coordinators"]) == 2 and len(seen["shards"]) == 2 and there == wanted

    def _serving(self) -> int:
        """The shards that serve the pipeline."""
        return sum(len(pipeline["shards"]) for pipeline in self._status()["pipelines"])

    def _releases(self) -> dict[str, str]:
        seen = self._status()
        kinds = (("coordinators", "coordinator"), ("shards", "shard"), ("nodes", "node"))
        return {f"{kind} {found[name]}": found["release"] for kind, name in kinds for found in seen[kind]}

    def _publics(self) -> dict[str, Any]:
        return {key["name"]: key["keys"][0]["public"] for key in json.loads(self.laxity("keys", "list", "--json"))}

    def _frontends(self) -> str:
        return ",".join(shard["frontend"] for shard in self._status()["shards"])

    def _await(self, what: str, reached: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if reached():
                    return
                why = ""
            except Failed as error:
                why = str(error)
            if time.monotonic() > deadline:
                raise Failed(f"waited {seconds:g} s for {what}: {why}\n{self.laxity('status')}")
            time.sleep(0.5)


def _logged(command: Sequence[str], env: Mapping[str, str], path: Path) -> tuple[str, int]:
    """What a command prints and its exit status; ``path`` gets it with the seconds at which each line came."""
    begun = time.monotonic()
    lines = []
    with (
        open(path, "w") as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, text=True
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line)
                log.write(f"{time.monotonic() - begun:6.1f} {line}")
                log.flush()
        except BaseException:
            process.terminate()
            raise
    return "".join(lines), process.returncode


STEPS: Mapping[str, Callable[[Rollout], None]] = {
    "check_mode": Rollout.check_mode,
    "site": Rollout.site,
    "serve": Rollout.serve,
    "again": Rollout.again,
    "upgrade": Rollout.upgrade,
    "kill": Rollout.kill,
    "rotate": Rollout.rotate,
    "remove": Rollout.remove,
}


def say(text: str) -> None:
    print(text, flush=True)
