"""What people see of a cluster and have it do, by the records that shards, agents and coordinators would write."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from cli.main import main
from cli.rollout import PATIENCE, Failures, ModelLoading
from cluster.records import (
    BrokerRecord,
    CoordinatorRecord,
    DevicePlacement,
    DeviceRecord,
    DrainRecord,
    LeaderRecord,
    NodeRecord,
    NodeStateRecord,
    Paths,
    PipelineRecord,
    PlacementRecord,
    ServingRecord,
    TuningRecord,
    decode,
    encode,
)
from cluster.store import open_store, sqlite_url
from cluster.store.base import Store
from cluster.tuning.report import ReportRecord, StageReport
from pipelines import PipelineSpec, load_spec

PATHS = Paths("local")
TM = load_spec("tm")
FIRST = next(iter(TM.stages))


class Fake:
    """A store that the test fills as a cluster's processes would, and the command line upon it."""

    def __init__(self, directory: Path) -> None:
        self.url = sqlite_url(directory / "store.db")
        self.store: Store = open_store(self.url)

    def __call__(self, *arguments: str, input: str | None = None) -> Result:
        return CliRunner().invoke(main, [*arguments, "--store", self.url], input=input)

    def json(self, *arguments: str) -> Any:
        result = self(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def put(self, key: str, record: msgspec.Struct) -> None:
        self.store.put(key, encode(record))

    def lead(self) -> None:
        self.put(PATHS.coordinator("c0"), CoordinatorRecord("h", 1, "9.9"))
        self.put(PATHS.coordinator("c1"), CoordinatorRecord("h", 2, "9.9"))
        self.put(PATHS.leader, LeaderRecord("c1", "h", 2))

    def shard(self, name: str = "s0") -> None:
        self.put(PATHS.broker(name), BrokerRecord("tcp://127.0.0.1:1", "tcp://127.0.0.1:2", 3, "h", {"submitted": 7}))

    def node(self, name: str, models: dict[int, dict[str, str]], state: str | None = "active") -> None:
        """An agent with devices in these states; its placement is the same models."""
        devices = [DeviceRecord(number, "T4", held) for number, held in models.items()]
        self.put(PATHS.node(name), NodeRecord(4, "host", "ready", devices, "9.9"))
        placed = {number: DevicePlacement("s0", list(held)) for number, held in models.items()}
        self.put(PATHS.placement(name), PlacementRecord(placed))
        if state is not None:
            self.put(PATHS.state(name), NodeStateRecord(state, f"{name} is {state}", [("T4", 0.0)]))  # type: ignore[arg-type]

    def serve(self, spec: PipelineSpec) -> None:
        self.put(PATHS.served(spec.name), ServingRecord(spec.version, spec, {"s0": 1.0}))

    def want(self, spec: PipelineSpec) -> None:
        self.put(PATHS.pipeline(spec.name), PipelineRecord(spec.version, spec))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    made = Fake(tmp_path)
    yield made
    made.store.close()


def ready(spec: PipelineSpec) -> dict[str, str]:
    return {spec.model_key(stage): "ready" for stage in spec.stages}


@pytest.fixture
def cluster(fake: Fake) -> Fake:
    """Two coordinators, one shard, three nodes; `tm` is served."""
    fake.lead()
    fake.shard()
    fake.node("n1", {0: ready(TM), 1: ready(TM)})
    fake.node("n2", {0: {}}, "standby")
    fake.put(PATHS.state("n3"), NodeStateRecord("lost", "its lease vanished", [("A100", 0.0), ("A100", 0.0)]))
    fake.want(TM)
    fake.serve(TM)
    return fake


# ---- looking -----------------------------------------------------------------------------


def test_status_of_a_whole_cluster(cluster: Fake) -> None:
    cluster.put(PATHS.tuned("tm"), TuningRecord(0.3, 4.0, 0.75, {}))
    stage = StageReport(TM.model_key(FIRST), 30, 30, 3, 0, 0, 2, 0.0, 0.0, [], {})
    cluster.put(PATHS.report("s0"), ReportRecord(1, 2.0, [stage], {}, []))
    seen = cluster.json("status")
    assert (seen["cluster"], seen["store"], seen["leader"], seen["fixed_plan"]) == ("local", cluster.url, "c1", False)
    assert [one["coordinator"] for one in seen["coordinators"]] == ["c0", "c1"]
    (pipeline,) = seen["pipelines"]
    assert pipeline["version"] == pipeline["served_version"] == TM.version
    assert pipeline["gpus"] == pipeline["ready"] == dict.fromkeys(TM.stages, 2)
    assert pipeline["rate_rps"] == 15.0
    assert pipeline["tuning"]["admission"] == 0.75
    assert seen["shards"][0]["requests"] == {"submitted": 7}
    assert [member["trouble"] for member in seen["store_health"]] == [""]
    people = cluster("status")
    assert people.exit_code == 0
    for text in (
        "c1",
        "leader",
        "standing by",
        "15.0/s",
        "75%",
        "4s",
        "0.30",
        "lost (not here)",
        "1 of 1 answer",
        "T4",
    ):
        assert text in people.stdout, text


def test_status_tells_of_models_that_take_another_time_than_their_profiles_say(cluster: Fake) -> None:
    def report(shard: str, ratio: float) -> None:
        stage = StageReport(TM.model_key(FIRST), 30, 30, 3, 0, 0, 2, 0.0, 0.0, [], {}, {"T4": ratio})
        cluster.put(PATHS.report(shard), ReportRecord(1, 2.0, [stage], {}, []))

    report("s0", 1.19)
    report("s1", 0.99)
    (pipeline,) = cluster.json("status")["pipelines"]
    assert pipeline["drift"] == {stage: {"T4": 1.19} if stage == FIRST else {} for stage in TM.stages}
    assert "profile" not in cluster("status").stdout
    report("s1", 0.7)
    (pipeline,) = cluster.json("status")["pipelines"]
    assert pipeline["drift"][FIRST] == {"T4": 0.7}
    people = cluster("status").stdout
    assert "0.70 times on T4" in " ".join(people.split())
    assert "profile" in people


def test_status_says_what_is_missing(fake: Fake) -> None:
    fake.shard()
    fake.put(PATHS.state("n1"), NodeStateRecord("lost", ""))
    assert "No coordinator is running; start one with `laxity coordinator run`." in fake("status").stderr
    fake.lead()
    assert "No node is registered; start one with `laxity node run`." in fake("status").stderr


def test_nodes_are_listed(cluster: Fake) -> None:
    cluster.put(PATHS.drain("n1"), DrainRecord("new memory"))
    n1, n2, n3 = cluster.json("node", "list")
    assert (n1["node"], n1["state"], n1["drained"], n1["drained_why"]) == ("n1", "active", True, "new memory")
    assert n1["devices"] == {"T4": 2}
    assert n1["models"] == {TM.model_key(stage): {"ready": 2, "devices": 2} for stage in TM.stages}
    assert (n2["state"], n2["models"], n2["registered"]) == ("standby", {}, True)
    assert (n3["state"], n3["devices"], n3["registered"], n3["host"]) == ("lost", {"A100": 2}, False, "")
    people = cluster("node", "list").stdout
    for text in ("n1 is active (new memory)", "tm 6/6", "2 A100", "its lease vanished"):
        assert text in people


def test_pipelines_are_listed_with_what_they_wait_for(cluster: Fake) -> None:
    echo = load_spec("echo")
    cluster.want(echo)
    listed = {one["name"]: one for one in cluster.json("pipeline", "list")}
    assert listed["tm"]["waits"] == ""
    assert (listed["echo"]["version"], listed["echo"]["served_version"]) == (echo.version, None)
    assert listed["echo"]["waits"].startswith("no device was given to stage echo yet")
    people = cluster("pipeline", "list")
    assert "not yet" in people.stdout
    assert "echo: no device was given to stage echo yet" in people.stderr


def test_what_a_cluster_serves_is_shown_and_a_file_without_it(cluster: Fake) -> None:
    other = msgspec.structs.replace(TM, slo=9.0)
    cluster.serve(other)
    shown = cluster.json("pipeline", "show", "tm")
    assert (shown["slo"], shown["cluster"]["served_version"]) == (9.0, other.version)
    assert "s0 100%" in cluster("pipeline", "show", "tm").stdout
    assert "has no pipeline 'tmm'; did you mean 'tm'?" in cluster("pipeline", "show", "tmm").stderr
    # The environment says which cluster is meant, not that one is.
    without = CliRunner().invoke(main, ["pipeline", "show", "tm", "--json"], env={"LAXITY_STORE": cluster.url})
    assert json.loads(without.stdout)["slo"] == TM.slo


def test_the_store_may_be_named_by_the_environment(cluster: Fake) -> None:
    result = CliRunner().invoke(main, ["node", "list", "--json"], env={"LAXITY_STORE": cluster.url})
    assert [node["node"] for node in json.loads(result.stdout)] == ["n1", "n2", "n3"]


# ---- having it do something ----------------------------------------------------------------


def in_the_background(do: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=do)
    thread.start()
    return thread


def watched(fake: Fake, key: str, then: Callable[[], object]) -> threading.Thread:
    """Do something once a key has been written."""
    watch = fake.store.watch(key, fake.store.list(key).revision + 1)

    def wait() -> None:
        assert watch.get(30)
        watch.close()
        then()

    return in_the_background(wait)


def test_draining_and_resuming(cluster: Fake) -> None:
    assert cluster("node", "drain", "n1", "n2", "--why", "new memory").exit_code == 0
    entry = cluster.store.get(PATHS.drain("n1"))
    assert entry is not None
    assert decode(DrainRecord, entry.key, entry.value) == DrainRecord("new memory")
    assert cluster.store.get(PATHS.drain("n2")) is not None
    resumed = cluster("node", "resume", "n1", "n3")
    assert "n1 may hold models again" in resumed.stdout
    assert "n3 was not drained" in resumed.stdout
    assert cluster.store.get(PATHS.drain("n1")) is None


def test_waiting_until_a_node_is_empty(cluster: Fake) -> None:
    late = cluster("node", "drain", "n1", "--wait", "--timeout", "50ms")
    assert late.exit_code == 1
    assert "not within 50ms: n1 holds 6 models" in late.stderr
    emptied = watched(cluster, PATHS.drain("n1"), lambda: cluster.node("n1", {0: {}, 1: {}}, "draining"))
    done = cluster("node", "drain", "n1", "--wait")
    emptied.join()
    assert done.exit_code == 0, done.output
    assert "n1 is empty" in done.stdout


def test_unknown_nodes_are_told_with_the_nearest(cluster: Fake) -> None:
    for command in ("drain", "resume"):
        result = cluster("node", command, "n1", "n11")
        assert result.exit_code == 1
        assert "there is no node 'n11'; did you mean 'n1'?" in result.stderr
        assert cluster.store.get(PATHS.drain("n1")) is None


def test_applying_waits_until_it_is_served(cluster: Fake) -> None:
    def serve() -> None:
        spec = cluster_record(cluster, "echo").spec
        key = spec.model_key("echo")
        cluster.node("n2", {0: {key: "loading"}})
        cluster.node("n2", {0: {key: "ready"}})
        cluster.serve(spec)

    served = watched(cluster, PATHS.pipeline("echo"), serve)
    result = cluster("pipeline", "apply", "echo")
    served.join()
    assert result.exit_code == 0, result.output
    version = cluster_record(cluster, "echo").version
    assert f"echo: version {version} is applied\necho: version {version} is served\n" in result.stdout
    assert "waiting: echo: no device was given to stage echo yet" in result.stderr


def cluster_record(fake: Fake, name: str) -> PipelineRecord:
    entry = fake.store.get(PATHS.pipeline(name))
    assert entry is not None
    return decode(PipelineRecord, entry.key, entry.value)


def test_applying_without_waiting_says_what_is_missing(fake: Fake) -> None:
    result = fake("pipeline", "apply", "echo", "lv", "--no-wait")
    assert result.exit_code == 0, result.output
    assert cluster_record(fake, "lv").version == cluster_record(fake, "lv").spec.version
    assert "It is not served yet: no shard is registered; start one with `laxity broker run`" in result.stderr
    waiting = fake("pipeline", "apply", "echo", "--timeout", "50ms")
    assert waiting.exit_code == 1
    assert "not within 50ms: echo: no shard is registered" in waiting.stderr


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda fake: fake.shard(), "no coordinator is running; start one with `laxity coordinator run`"),
        (
            lambda fake: (fake.shard(), fake.put(PATHS.coordinator("c7"), CoordinatorRecord("h", 1))),
            "no coordinator leads yet (c7 will in a moment)",
        ),
        (lambda fake: (fake.shard(), fake.lead()), "no node is registered; start one with `laxity node run`"),
        (
            lambda fake: (fake.shard(), fake.lead(), fake.node("n1", {0: {}}, "draining")),
            "no node is active (1 draining); see `laxity node list`",
        ),
        (
            lambda fake: (fake.shard(), fake.lead(), fake.node("n1", {0: {}})),
            "no device was given to stage echo yet",
        ),
    ],
)
def test_what_keeps_a_pipeline_from_being_served(fake: Fake, prepare: Callable[[Fake], Any], says: str) -> None:
    prepare(fake)
    result = fake("pipeline", "apply", "echo", "--timeout", "10ms")
    assert result.exit_code == 1
    assert f"not within 10ms: echo: {says}" in result.stderr


def test_a_model_that_fails_is_told_with_its_node(cluster: Fake) -> None:
    def fail() -> None:
        key = cluster_record(cluster, "echo").spec.model_key("echo")
        cluster.node("n2", {0: {key: "failed: out of memory"}})

    failed = watched(cluster, PATHS.pipeline("echo"), fail)
    result = cluster("pipeline", "apply", "echo", "--timeout", "1s")
    failed.join()
    assert result.exit_code == 1
    assert "/echo failed on n2, device 0: out of memory" in result.stderr


def test_a_failure_lasts_unless_another_device_becomes_ready() -> None:
    def model(ready: int, failed: str | None) -> list[ModelLoading]:
        return [ModelLoading("m", ready, 2, "", failed)]

    failures = Failures()
    assert failures.lasting(0.0, model(0, "why")) is None
    assert failures.lasting(PATIENCE - 1, model(0, None)) is None  # it is being tried on another device
    lasting = failures.lasting(PATIENCE + 1, model(0, "why"))
    assert lasting is not None
    assert lasting.failed == "why"
    assert failures.lasting(PATIENCE + 2, model(1, "why")) is None
    assert failures.lasting(PATIENCE + 3, model(0, "why")) is None
    assert failures.lasting(2 * PATIENCE + 3, model(0, "why")) is not None


def test_a_failure_lasts_where_no_other_device_is_to_try() -> None:
    failures = Failures()
    assert failures.lasting(0.0, [ModelLoading("m", 0, 1, "", "why")]) is None
    assert failures.lasting(1.0, [ModelLoading("m", 0, 0, "", None)]) is None
    lasting = failures.lasting(PATIENCE, [ModelLoading("m", 0, 0, "", None)])
    assert lasting is not None
    assert lasting.failed == "why"
    assert failures.lasting(PATIENCE + 1, [ModelLoading("other", 0, 0, "", None)]) is None


def test_somebody_elses_version_ends_the_waiting(cluster: Fake) -> None:
    other = msgspec.structs.replace(load_spec("echo"), slo=7.0)
    replaced = watched(cluster, PATHS.pipeline("echo"), lambda: cluster.want(other))
    result = cluster("pipeline", "apply", "echo")
    replaced.join()
    assert result.exit_code == 1
    assert f"was replaced by version {other.version} by somebody else meanwhile" in result.stderr


def test_deleting(cluster: Fake) -> None:
    unknown = cluster("pipeline", "delete", "tmm", "--yes")
    assert unknown.exit_code == 1
    assert "has no pipeline 'tmm'; did you mean 'tm'?" in unknown.stderr
    assert cluster("pipeline", "delete", "tm", input="n\n").exit_code == 1
    assert cluster.store.get(PATHS.pipeline("tm")) is not None
    gone = watched(cluster, PATHS.pipeline("tm"), lambda: cluster.store.delete(PATHS.served("tm")))
    result = cluster("pipeline", "delete", "tm", input="y\n")
    gone.join()
    assert result.exit_code == 0, result.output
    assert "tm is deleted and served no more" in result.stdout
    assert cluster.store.get(PATHS.pipeline("tm")) is None


def test_a_fixed_plan_is_not_to_be_changed(fake: Fake) -> None:
    fake.shard()
    fake.node("n1", {0: ready(TM)}, None)
    fake.want(TM)
    fake.serve(TM)
    assert fake.json("status")["fixed_plan"] is True
    for command, says in (
        (("pipeline", "apply", "echo"), "end it with `laxity down` and `laxity up tm echo`, or start it with --coord"),
        (("pipeline", "delete", "tm", "--yes"), "end it with `laxity down` and leave it at that"),
        (("node", "drain", "n1"), "started without coordinators, which empty nodes"),
    ):
        result = fake(*command)
        assert result.exit_code == 1
        assert says in result.stderr
    assert [entry.key for entry in fake.store.list(PATHS.pipelines).entries] == [PATHS.pipeline("tm")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["up", "lv", "--split", "1,1,1,1,1", "--coordinators", "1"], "with --coordinators 0"),
        (["up", "lv", "--rest"], "add --coordinators 1"),
        (["up", "lv", "--etcd-members", "3"], "--etcd-members belongs to --store etcd"),
        (["up", "--coordinators", "1", "--agents", "2"], "say how many with --gpus"),
        (["pipeline", "apply"], "Missing argument 'SPEC...'"),
        (["pipeline", "apply", "ecko"], "write 'echo'"),
        (["pipeline", "apply", "echo", "echo"], "both named 'echo'; apply one of them"),
        (["pipeline", "apply", "echo", "--timeout", "never"], "no duration above zero"),
        (["node", "drain"], "Missing argument 'NODE...'"),
        (["coordinator", "run", "--name", "c", "--store", "memory:"], "memory: is one process's alone"),
        (["load", "lv", "--load", "1", "--duration", "1s", "--shard", "tcp://127.0.0.1:1"], "use --request-rate-range"),
        (["load", "lv", "--request-rate-range", "9", "--shard", "nowhere"], "nowhere"),
    ],
)
def test_wrong_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert says in " ".join(result.output.split())
