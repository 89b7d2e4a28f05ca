"""Options of services from a file, the environment and the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner

from broker.shell import ShardConfig
from cli.configuration import ConfigurationError, read_configuration
from cli.main import main
from cli.services import SERVICES
from cluster.coordinator.leader import CoordinatorConfig
from cluster.planner.settings import Settings
from laxity.gateway.server import GatewayConfig
from nodes.agent import AgentConfig

FILE = """
store: sqlite:///var/lib/laxity/store.db
cluster: trial
broker:
  shard: from-file
  frontend: tcp://0.0.0.0:7100
  heartbeat: 0.5
  max_payload: 1MiB
node: {agent: a1, devices: "emulated:4"}
coordinator:
  name: c1
  rest: false
  patience: 1m
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "laxity.yaml"
    made.write_text(FILE)
    return made


def parsed(service: str, *arguments: str) -> dict[str, Any]:
    """What a service would be run with."""
    context = main.make_context("laxity", [service, "run", *arguments])
    group = main.get_command(context, service)
    assert isinstance(group, click.Group)
    with group.make_context(service, ["run", *arguments], parent=context) as within:
        return SERVICES[service].make_context("run", list(arguments), parent=within).params


def test_a_file_gives_what_flags_do_not(file: Path) -> None:
    found = parsed("broker", "--config", str(file))
    assert found == {
        "store": "sqlite:///var/lib/laxity/store.db",
        "cluster": "trial",
        "shard": "from-file",
        "frontend": "tcp://0.0.0.0:7100",
        "backend": "tcp://127.0.0.1:*",
        "advertise": "",
        "key": "",
        "plain": False,
        "heartbeat": 0.5,
        "max_payload": 1024**2,
        "max_bytes": 4 * 1024**3,
        "max_requests": 200_000,
        "max_client_requests": 100_000,
        "max_connections": 10_000,
        "io_threads": 0,
        "drain_timeout": 10.0,
        "log_format": "text",
        "log_level": "info",
        "cache": "",
        "cache_bytes": 100 * 1024**3,
        "telemetry": "",
        "telemetry_bytes": 512 * 1024**2,
        "http": "127.0.0.1:*",
        "http_token_file": "",
        "http_open": ("metrics", "health"),
        "otlp": "",
        "traces": 20_000,
        "metrics": True,
        "trace_sample": 0.01,
    }
    assert parsed("node", "--config", str(file))["devices"] == "emulated:4"
    leader = parsed("coordinator", "--config", str(file))
    assert (leader["name"], leader["rest"], leader["patience"], leader["ttl"]) == ("c1", False, 60.0, 5.0)


def test_flags_go_before_the_environment_before_the_file_before_defaults(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ("--config", str(file))
    bare = ("--store", "sqlite:///s.db", "--shard", "s")
    assert parsed("broker", *bare)["heartbeat"] == 1.0
    assert parsed("broker", *config)["heartbeat"] == 0.5
    monkeypatch.setenv("LAXITY_BROKER_HEARTBEAT", "2s")
    monkeypatch.setenv("LAXITY_STORE", "sqlite:///from/environment.db")
    monkeypatch.setenv("LAXITY_CLUSTER", "elsewhere")
    found = parsed("broker", *config)
    assert (found["heartbeat"], found["store"]) == (2.0, "sqlite:///from/environment.db")
    assert (found["cluster"], found["shard"]) == ("elsewhere", "from-file")
    found = parsed("broker", *config, "--heartbeat", "300ms", "--store", "sqlite:///flag.db", "--shard", "flag")
    assert (found["heartbeat"], found["store"], found["shard"]) == (0.3, "sqlite:///flag.db", "flag")
    # The file itself may be named by the environment, and a switch be turned there.
    monkeypatch.setenv("LAXITY_CONFIG", str(file))
    assert parsed("node")["agent"] == "a1"
    monkeypatch.setenv("LAXITY_COORDINATOR_REST", "true")
    assert parsed("coordinator")["rest"] is True
    assert parsed("coordinator", "--no-rest")["rest"] is False


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("broker: {hearbeat: 1s}", ":1: broker.hearbeat: unknown key; did you mean 'heartbeat'?"),
        ("\nbrokers: {}", ":2: brokers: unknown key; did you mean 'broker'?"),
        ("broker: {colour: red}", "broker.colour: unknown key; known are: shard, frontend, "),
        ("height: 3", "height: unknown key; known are: store, cluster, broker, node, coordinator"),
        ("broker: {cluster: x}", "broker.cluster: this key is for all sections; write it at the top of the file"),
        ("broker: {config: x}", "broker.config: unknown key"),
        ("broker: {heartbeat: soon}", "broker.heartbeat: 'soon' is no duration above zero; write one such as 400ms"),
        ("broker: {max_requests: 1.5}", "broker.max_requests: '1.5' is not a valid integer"),
        ("broker: {max_requests: [1]}", "broker.max_requests: a single value is needed here; see `laxity broker run"),
        ("broker: {max_requests:}", "broker.max_requests: a single value is needed here"),
        ("broker: {max_payload: 5 parsecs}", "'5 parsecs' is no size above zero; write one such as 4096, 512KiB"),
        ("broker: {frontend: 7100}", "broker.frontend: '7100' is no address; write tcp://HOST:PORT"),
        ("broker: {shard: yes}", "a number or a text (in quotes) is needed here, not true"),
        ("coordinator: {rest: 1}", "coordinator.rest: true or false is needed here, not 1"),
        ("coordinator: {headroom: 2}", "coordinator.headroom: 2.0 is not in the range 0.0<=x<=1.0"),
        ("broker: fast", "broker: a mapping is needed here"),
        ("- broker", "a mapping is needed here"),
        ("store: banana", "store: unknown store 'banana'"),
        ("cluster: a/b", "cluster: 'a/b' cannot name a cluster"),
        ("broker: {shard: a}\nbroker: {shard: b}", ":2: broker: written twice, first on line 1"),
        ("broker: [", "not YAML"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "laxity.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as raised:
        read_configuration(file, SERVICES)
    assert says in str(raised.value)
    assert str(raised.value).startswith(f"{file}:")
    # Another section's mistakes are told as well, as wrong use.
    with pytest.raises(click.UsageError, match=re.escape(str(file))):
        parsed("node", "--config", str(file))


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "laxity.yaml"
    file.write_text("broker: {heartbeat: 0, shards: 3}\nnode: {device: cpu}\n")
    with pytest.raises(ConfigurationError) as raised:
        read_configuration(file, SERVICES)
    assert len(str(raised.value).splitlines()) == 3


@pytest.mark.parametrize(("content", "why"), [(None, "No such file"), (b"\xff\xfe", "no UTF-8 text")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, why: str) -> None:
    file = tmp_path / "laxity.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(click.UsageError, match=f"{re.escape(str(file))} cannot be read: .*{why}"):
        parsed("broker", "--config", str(file))


@pytest.mark.parametrize("page", ["README.md", "docs/operations.md"])
def test_the_files_in_the_documentation_can_be_used(tmp_path: Path, page: str) -> None:
    text = (Path(__file__).parent.parent / page).read_text()
    (written,) = re.findall(r"```yaml\n(store:.*?)```", text, re.DOTALL)
    file = tmp_path / "laxity.yaml"
    file.write_text(written)
    found = read_configuration(file, SERVICES)
    assert found["node"]["devices"] == "cuda"
    assert parsed("coordinator", "--config", str(file), "--name", "c1")["cluster"] == "production"


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "laxity.yaml"
    for text in ("", "broker:\n", "# nothing\n"):
        file.write_text(text)
        assert parsed("broker", "--config", str(file), "--store", "sqlite:///s.db", "--shard", "s")["shard"] == "s"


@pytest.mark.parametrize(
    ("service", "kind", "apart"),
    [
        ("broker", ShardConfig, {"name"}),
        ("node", AgentConfig, {"name", "devices"}),
        ("coordinator", CoordinatorConfig, {"settings"}),
        ("coordinator", Settings, set()),
        ("gateway", GatewayConfig, set()),
    ],
)
def test_every_setting_has_an_option_with_its_default_a_variable_and_a_help(
    service: str, kind: type[msgspec.Struct], apart: set[str]
) -> None:
    name = {"broker": "--shard", "node": "--agent"}.get(service, "--name")
    found = parsed(service, "--store", "sqlite:///s.db", name, "x")
    options = {option.name: option for option in SERVICES[service].params if isinstance(option, click.Option)}
    told = CliRunner().invoke(main, [service, "run", "--help"]).output
    for field in msgspec.structs.fields(kind):
        if field.name in apart:
            continue
        if field.default is not msgspec.NODEFAULT:
            assert found[field.name] == field.default, field.name
        assert options[field.name].help, field.name
        assert f"LAXITY_{service.upper()}_{field.name.upper()}" in told
