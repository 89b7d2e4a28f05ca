"""``laxity broker run``, ``node run``, ``coordinator run`` and ``gateway run``: one process of a cluster each, for
service managers and `up`. Their options come from the command line, the environment, or a file."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from cli.children import laxity
from cli.configuration import ConfigurationError, read_configuration
from cli.control import Reread, ServiceCommand, take_control
from cli.groups import Group
from cli.http_options import access_options
from cli.options import (
    check_duration,
    check_http,
    check_size,
    check_store,
    cluster_option,
    explain_errors,
    find_store,
    key_options,
)
from cli.planner_options import planner_options
from cli.rundir import RunDirectory
from cluster.control import Control
from cluster.logs import FORMATS, LEVELS, configure_logs
from cluster.observe.sidecar import Beginning, Sidecar
from laxity.http_access import HttpAccess
from laxity.http_tokens import HttpTokens

C = TypeVar("C")
_ADDRESS = re.compile(r"tcp://([^\s/:]+|\[[^\s/\]]+\]):(\d{1,5}|\*)|ipc://\S+")
_setting = partial(click.option, show_envvar=True)
"""An option that the environment and the file may set as well."""


def _check_address(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not _ADDRESS.fullmatch(value):
        raise click.BadParameter(
            f"{value!r} is no address; write tcp://HOST:PORT, with * as PORT for any free one and 0.0.0.0 as HOST for "
            "every interface"
        )
    return value


def _read_file(context: click.Context, _parameter: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    try:
        found = read_configuration(Path(value), SERVICES)
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from None
    context.default_map = dict(
        next(values for section, values in found.items() if SERVICES[section] is context.command)
    )


_advertise_option = _setting(
    "--advertise",
    default="",
    metavar="HOST",
    help="The name or IP address by which others reach this host, where it is not the one in the addresses.",
)


def _cache_options(function: Callable[..., None]) -> Callable[..., None]:
    """Where the files of pipelines are kept."""
    where = _setting(
        "--cache",
        default="",
        metavar="DIR",
        help="Where the files of pipelines are kept (default: laxity in $XDG_CACHE_HOME or ~/.cache).",
    )
    limit = _setting(
        "--cache-bytes",
        default="100GiB",
        show_default=True,
        callback=check_size,
        metavar="SIZE",
        help="Files kept there at most, all together.",
    )
    return where(limit(function))


def _key_options(kind: Literal["shard", "node"]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """With what a service talks to others over the network."""
    key = _setting(
        "--key",
        default="",
        metavar="FILE",
        help=f"The file of its key, as `laxity keys new NAME --role {kind}` writes it. With one every connection is "
        "encrypted, and both ends know each other.",
    )
    plain = _setting(
        "--plain/--no-plain",
        default=False,
        show_default=True,
        help="Without a key, talk to other hosts all the same: anybody in the network can read and use that.",
    )
    return lambda function: key(plain(function))


def _telemetry_options(what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Where the rows of telemetry go; ``what``: of what there is one."""
    where = _setting(
        "--telemetry",
        default="",
        metavar="DIR",
        help=f"Write a row of each {what} there, as CSV; `laxity telemetry DIR` reads them (default: nowhere).",
    )
    limit = _setting(
        "--telemetry-bytes",
        default="512MiB",
        show_default=True,
        callback=check_size,
        metavar="SIZE",
        help="Rows kept there at most; the oldest go.",
    )
    return lambda function: where(limit(function))


def _drain_option(what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return _setting(
        "--drain-timeout",
        default="10s",
        show_default=True,
        callback=check_duration,
        metavar="TIME",
        help=f"Asked to end (SIGTERM), it finishes {what}; for so long at most.",
    )


def _check_otlp(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    if value:
        from cluster.observe.otlp import OtlpError, check_otlp

        try:
            check_otlp(value)
        except OtlpError as error:
            raise click.BadParameter(str(error)) from None
    return value


def _http_options(what: str, otlp: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Where a service is observed from outside, and by whom; ``what`` needs a token, ``otlp``: it has traces."""
    http = _setting(
        "--http",
        default="127.0.0.1:*",
        show_default=True,
        callback=check_http,
        metavar="HOST:PORT",
        help="Where /metrics (Prometheus), /v2/health/live and ready, and what else there is to see are served, by "
        "another process that is started when somebody asks; '*' for a free port (`laxity status` tells it), '' for "
        "nowhere.",
    )
    traces = _setting(
        "--otlp",
        default="",
        callback=_check_otlp,
        metavar="URL",
        help="Send traces there by OTLP over HTTP, such as http://collector:4318 (default: nowhere).",
    )
    access = access_options(what, _setting)
    return lambda function: http(access(traces(function) if otlp else function))


def _sidecar(
    process: Literal["shard", "agent", "coordinator"],
    name: str,
    http: str,
    *arguments: str,
    group: Literal["traces", "dashboard"] | None = None,
    host: str = "",
    at_once: bool = False,
) -> Sidecar:
    """What tells of a service, by way of `laxity observe` with these arguments; OSError where its address cannot be
    had. ``group`` is what it has that is not open unless somebody says so."""
    source = Beginning(process, name, "the store has not answered yet")
    given = click.get_current_context().params
    tokens, opened = given["http_token_file"], given["http_open"]
    command = laxity("observe", "--process", process, "--name", name, "--log-format", given["log_format"], *arguments)
    command += ["--http-token-file", tokens, "--http-open", ",".join(opened)]
    sidecar = Sidecar(http, host, command, source, at_once=at_once)
    if group is not None and sidecar.bound is not None:
        HttpAccess(sidecar.bound, HttpTokens(tokens) if tokens else None, opened).warn(group, sidecar.address)
    return sidecar


def _service(
    group: click.Group, kind: str, named: str, needs_store: bool = True
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function ``GROUP run``, with what all services take: the store, the cluster's name, a file, and how they
    log. ``kind`` is what logs call the process, ``named`` the option that says which one it is."""
    form = _setting(
        "--log-format",
        type=click.Choice(FORMATS),
        default="text",
        show_default=True,
        envvar="LAXITY_LOG_FORMAT",
        help="How it logs to stderr: lines for people, or a JSON object a line.",
    )
    level = _setting(
        "--log-level",
        type=click.Choice(LEVELS),
        default="info",
        show_default=True,
        envvar="LAXITY_LOG_LEVEL",
        help="What it logs at least; debug has each batch with its requests.",
    )
    store = _setting(
        "--store",
        required=needs_store,
        metavar="URL",
        callback=check_store,
        envvar="LAXITY_STORE",
        help="The cluster's store, such as etcd://host-1:2379,host-2:2379 or sqlite:///path/to/store.db.",
    )
    config = _setting(
        "--config",
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=_read_file,
        envvar="LAXITY_CONFIG",
        help="A YAML file with options: `store`, `cluster` and those of logs at its top, the others under "
        f"`{group.name}:`, with _ in place of - in their names. Read again on SIGHUP.",
    )
    settings = {"auto_envvar_prefix": f"LAXITY_{str(group.name).upper()}"}

    def make(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(log_format: str, log_level: str, **values: Any) -> None:
            configure_logs(log_format, log_level, kind, values[named])
            function(**values)

        command = group.command("run", cls=ServiceCommand, context_settings=settings)
        return command(store(cluster_option(config(form(level(explain_errors(run)))))))

    return make


# ---- broker -----------------------------------------------------------------------------------


@click.group(cls=Group)
def broker() -> None:
    """Broker shards."""


@_service(broker, "shard", "shard")
@_setting("--shard", required=True, metavar="ID", help="The shard's name, unique in the cluster.")
@_setting(
    "--frontend",
    default="tcp://127.0.0.1:*",
    show_default=True,
    callback=_check_address,
    metavar="ADDRESS",
    help="Where services connect; '*' for a free port.",
)
@_setting(
    "--backend",
    default="tcp://127.0.0.1:*",
    show_default=True,
    callback=_check_address,
    metavar="ADDRESS",
    help="Where agents connect; '*' for a free port.",
)
@_advertise_option
@_key_options("shard")
@_setting(
    "--heartbeat",
    default="1s",
    show_default=True,
    callback=check_duration,
    metavar="TIME",
    help="Between two heartbeats; who is silent for four of them is gone.",
)
@_setting(
    "--max-payload",
    default="64MiB",
    show_default=True,
    callback=check_size,
    metavar="SIZE",
    help="The largest payload of one request.",
)
@_setting(
    "--max-bytes",
    default="4GiB",
    show_default=True,
    callback=check_size,
    metavar="SIZE",
    help="Payloads held at most, all together; more requests are rejected.",
)
@_setting(
    "--max-requests",
    type=click.IntRange(min=1),
    default=200_000,
    show_default=True,
    metavar="N",
    help="Requests in flight at most; more are rejected.",
)
@_setting(
    "--max-client-requests",
    type=click.IntRange(min=1),
    default=100_000,
    show_default=True,
    metavar="N",
    help="Requests in flight of one client at most (of one key, where clients have keys); more are rejected.",
)
@_setting(
    "--max-connections",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    metavar="N",
    help="Connections of services at most, and of agents; where there are more, one that has said nothing is cut.",
)
@_setting(
    "--io-threads",
    type=click.IntRange(min=0, max=64),
    default=0,
    metavar="N",
    help="Threads that read, write and encrypt for its sockets (default: 1; with a key one for every 4 processors, 4 "
    "at most).",
)
@_drain_option("what is in flight, while its services submit to other shards")
@_cache_options
@_telemetry_options("request")
@_setting(
    "--metrics/--no-metrics",
    default=True,
    show_default=True,
    help="Count what becomes of requests, by pipeline and stage.",
)
@_setting(
    "--traces",
    type=click.IntRange(min=0),
    default=20_000,
    show_default=True,
    metavar="N",
    help="Traces kept for `laxity trace`, the newest: of sampled requests, and of all that went wrong. 0: none.",
)
@_setting(
    "--trace-sample",
    type=click.FloatRange(0.0, 1.0),
    default=0.01,
    show_default=True,
    metavar="PART",
    help="The part of the requests that is sampled, of those without a traceparent (whose flag says it).",
)
@_http_options("the traces as well", otlp=True)
def broker_run(
    store: str,
    cluster: str,
    shard: str,
    http: str,
    http_token_file: str,
    http_open: tuple[str, ...],
    otlp: str,
    **settings: Any,
) -> None:
    """Run one broker shard until SIGTERM or Ctrl-C.

    It serves the pipelines that the store assigns to it and follows their changes. Services and agents on other hosts
    connect to the addresses given here: name an interface that they reach.

    A flag goes before the environment, that before the file (--config), that before the default.

    \b
    Examples:
      laxity broker run --store sqlite:///var/lib/laxity/store.db --shard s0
      laxity broker run --config /etc/laxity.yaml --shard s0 --frontend tcp://10.0.0.7:7100 --key /etc/laxity/s0.key
      LAXITY_STORE=etcd://e1:2379,e2:2379 LAXITY_BROKER_SHARD=s0 laxity broker run
    """
    from broker.errors import AddressInUse
    from broker.process import run_shard_process
    from broker.shell import LIVE, ShardConfig
    from laxity.curve import PlainRefused
    from laxity.keys import InvalidKey

    control = _control(lambda given: ShardConfig(name=shard, **given), settings, LIVE, ("shard", shard))
    try:
        config = ShardConfig(name=shard, **settings)
        if otlp and not config.traces:
            raise click.UsageError("--otlp has nothing to send with --traces 0")
        traces = ("--otlp", otlp) if otlp else ()
        observed = _sidecar("shard", shard, http, *traces, group="traces", host=config.advertise, at_once=bool(otlp))
        with observed as sidecar:
            run_shard_process(config, store, cluster, control, sidecar)
    except (AddressInUse, OSError, RuntimeError, InvalidKey, PlainRefused) as error:
        raise click.ClickException(str(error)) from error


# ---- node -------------------------------------------------------------------------------------


@click.group(cls=Group)
def node() -> None:
    """Node agents, and the nodes that they make of hosts."""


@_service(node, "agent", "agent")
@_setting("--agent", required=True, metavar="ID", help="The agent's name, unique in the cluster.")
@_setting(
    "--devices",
    default="cpu",
    show_default=True,
    metavar="WHAT",
    help="cpu[:MEMORY_MB], cuda (all GPUs, or those in CUDA_VISIBLE_DEVICES), or emulated:N[:TYPE[:MEMORY_MB]]; "
    "several are joined by '+'. Of models that need more memory than there is, those in demand are loaded.",
)
@_setting(
    "--heartbeat",
    default="1s",
    show_default=True,
    callback=check_duration,
    metavar="TIME",
    help="Between two heartbeats until a shard says how often it wants them.",
)
@_setting("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the jitter of emulated devices.")
@_drain_option("the batches that run")
@_key_options("node")
@_cache_options
@_telemetry_options("action")
@_http_options("there is nothing else")
@_advertise_option
def node_run(
    store: str,
    cluster: str,
    agent: str,
    devices: str,
    http: str,
    http_token_file: str,
    http_open: tuple[str, ...],
    advertise: str,
    **settings: Any,
) -> None:
    """Run the agent of this host until SIGTERM or Ctrl-C.

    Its devices hold the models that the placement in the store names, for the shards named there.

    A flag goes before the environment, that before the file (--config), that before the default.

    \b
    Examples:
      laxity node run --store etcd://e1:2379,e2:2379 --agent gpu-host-1 --devices cuda
      laxity node run --config /etc/laxity.yaml --agent $(hostname)
      laxity node run --store etcd://e1:2379 --agent gpu-host-1 --devices cuda --key /etc/laxity/node.key
      laxity node run --store sqlite:///var/lib/laxity/store.db --agent play --devices emulated:16
    """
    from laxity.keys import InvalidKey
    from nodes.agent import LIVE, AgentConfig
    from nodes.discovery import NoSuchDevices, parse_devices
    from nodes.process import run_agent_process

    try:
        configs = parse_devices(devices)
    except NoSuchDevices as error:
        raise click.UsageError(str(error)) from None

    def make(given: Mapping[str, Any]) -> AgentConfig:
        return AgentConfig(name=agent, devices=configs, **given)

    control = _control(make, settings, LIVE, ("agent", agent))
    try:
        config = make(settings)
        with _sidecar("agent", agent, http, host=advertise) as sidecar:
            run_agent_process(config, store, cluster, control, sidecar)
    except (InvalidKey, OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error


# ---- coordinator ------------------------------------------------------------------------------


@click.group(cls=Group)
def coordinator() -> None:
    """Coordinators."""


@_service(coordinator, "coordinator", "name")
@_setting("--name", required=True, metavar="ID", help="The coordinator's name, unique in the cluster.")
@_setting(
    "--provider-up",
    default="",
    metavar="COMMAND",
    help="Powers a machine up: a command in which {node} stands for the node's name.",
)
@_setting("--provider-down", default="", metavar="COMMAND", help="Powers a machine down, likewise.")
@_setting(
    "--ttl",
    default="5s",
    show_default=True,
    callback=check_duration,
    metavar="TIME",
    help="Of its lease: so long after the leader's death another one leads.",
)
@_setting(
    "--forget",
    default="1440m",
    show_default=True,
    callback=check_duration,
    metavar="TIME",
    help="After which a lost node that does not come back is listed no more.",
)
@planner_options
@_http_options("see the dashboard, which is served beside the metrics, at /, and have nodes drained there")
@_advertise_option
def coordinator_run(
    store: str,
    cluster: str,
    name: str,
    http: str,
    http_token_file: str,
    http_open: tuple[str, ...],
    advertise: str,
    **settings: Any,
) -> None:
    """Run a coordinator until SIGTERM or Ctrl-C.

    Any number of them may run; one leads, and another one takes over when it dies. The leader places the applied
    pipelines on the nodes' devices, scales them with the load, and tunes what shards drop. Requests are served on
    without any coordinator, by the last plan.

    A flag goes before the environment, that before the file (--config), that before the default.

    \b
    Examples:
      laxity coordinator run --store etcd://e1:2379,e2:2379,e3:2379 --name c1
      laxity coordinator run --store sqlite:///var/lib/laxity/store.db --name c1 --no-rest
      laxity coordinator run --config /etc/laxity.yaml --name $(hostname)
      laxity coordinator run --config /etc/laxity.yaml --name c1 \\
          --provider-up 'ipmitool -H {node}-bmc power on' --provider-down 'ipmitool -H {node}-bmc power soft'
    """
    from cluster.coordinator.leader import LIVE, CoordinatorConfig
    from cluster.coordinator.process import run_coordinator_process
    from cluster.coordinator.provider import ProviderError
    from cluster.planner.settings import Settings

    def make(given: Mapping[str, Any]) -> CoordinatorConfig:
        planner = {field: given[field] for field in Settings.__struct_fields__}
        others = {field: value for field, value in given.items() if field not in planner}
        return CoordinatorConfig(name=name, settings=Settings(**planner), **others)

    control = _control(make, settings, LIVE, ("coordinator", name))
    config = make(settings)
    try:
        shown = ("--dashboard", store, cluster)
        with _sidecar("coordinator", name, http, *shown, group="dashboard", host=advertise) as sidecar:
            run_coordinator_process(config, store, cluster, control, sidecar)
    except ProviderError as error:
        raise click.UsageError(str(error)) from None
    except (OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error


# ---- gateway ----------------------------------------------------------------------------------


@click.group(cls=Group)
def gateway() -> None:
    """Gateways for clients made for Triton or KServe."""


@_service(gateway, "gateway", "name", needs_store=False)
@_setting("--name", default="gateway", show_default=True, metavar="ID", help="What its logs call it.")
@_setting(
    "--connect",
    default="",
    metavar="URL,...",
    help="The addresses of one shard or several, as in tcp://127.0.0.1:7100 (default: those in the store).",
)
@_setting(
    "--http",
    default="127.0.0.1:8000",
    show_default=True,
    callback=check_http,
    metavar="HOST:PORT",
    help="Where HTTP is served, and /metrics; '*' for a free port, '' for nowhere.",
)
@_setting(
    "--grpc",
    default="127.0.0.1:8001",
    show_default=True,
    callback=check_http,
    metavar="HOST:PORT",
    help="Where gRPC is served; '*' for a free port, '' for nowhere.",
)
@access_options("inference, as well", _setting)
@_setting(
    "--max-body",
    default="64MiB",
    show_default=True,
    callback=check_size,
    metavar="SIZE",
    help="The largest request.",
)
@_setting(
    "--body-timeout",
    default="30s",
    show_default=True,
    callback=check_duration,
    metavar="TIME",
    help="How long the body of an HTTP request may take to arrive.",
)
@_setting(
    "--max-concurrency",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    metavar="N",
    help="Inference requests under way at once; more are refused.",
)
@_drain_option("the requests that are under way")
@key_options(_setting, "gateway")
def gateway_run(store: str | None, cluster: str, name: str, **settings: Any) -> None:
    """Serve the Open Inference Protocol (version 2) over HTTP and gRPC until SIGTERM or Ctrl-C.

    Clients made for Triton or KServe can be pointed at it: a pipeline is a model to them. It finds the shards in the
    store (by default, that of the cluster that runs on this machine), or is told where they are. docs/gateway.md says
    how tensors become a pipeline's request, and its answer tensors. gRPC needs pip install 'laxity[gateway]'.

    A flag goes before the environment, that before the file (--config), that before the default.

    \b
    Examples:
      laxity gateway run
      laxity gateway run --store etcd://e1:2379,e2:2379 --http 0.0.0.0:8000 --grpc 0.0.0.0:8001
      laxity gateway run --connect tcp://10.0.0.7:7100,tcp://10.0.0.8:7100 --grpc '' --key gateway.key
      laxity gateway run --config /etc/laxity.yaml
    """
    from cli.gateway import StoreLookup
    from laxity.gateway.server import Bound, CannotServe, GatewayConfig, run_gateway

    if not (settings["http"] or settings["grpc"]):
        raise click.UsageError("give --http or --grpc an address")
    if not (settings["key"] or settings["connect"]):
        settings["key"] = str(RunDirectory(cluster).found_key(store) or "")
    config = GatewayConfig(**settings)
    url = store if config.connect else find_store(cluster, store)
    lookup = None if url is None else StoreLookup(url, cluster)
    control = _control(lambda given: GatewayConfig(**given), settings, (), ("gateway", name))

    def ready(bound: Bound) -> None:
        for what, at in (("HTTP", bound.http), ("gRPC", bound.grpc)):
            if at:
                click.echo(f"Serving {what} at {at}")

    try:
        run_gateway(config, lookup, control.stop, control.at_once, ready)
    except (CannotServe, ValueError) as error:
        raise click.ClickException(str(error)) from error
    finally:
        if lookup is not None:
            lookup.close()


SERVICES = {"broker": broker_run, "node": node_run, "coordinator": coordinator_run, "gateway": gateway_run}
"""The services by their sections in the file."""


def _control(
    make: Callable[[Mapping[str, Any]], C], settings: Mapping[str, Any], live: Collection[str], process: tuple[str, str]
) -> Control[C]:
    """Take the signals; see :class:`~cli.control.Reread`."""
    return take_control(Reread(click.get_current_context(), make, settings, live, process))
