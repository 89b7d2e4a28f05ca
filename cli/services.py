"""``laxity broker run`` and ``laxity node run``: one process of a cluster each, for service managers and `up`."""

from __future__ import annotations

import logging
import signal
import threading

import click

from cli.options import check_store, cluster_option, explain_errors

_store_option = click.option(
    "--store",
    required=True,
    metavar="URL",
    callback=check_store,
    help="The cluster's store, such as sqlite:///path/to/store.db.",
)


@click.group()
def broker() -> None:
    """Broker shards."""


@broker.command("run")
@_store_option
@cluster_option
@click.option("--shard", required=True, metavar="ID", help="The shard's name, unique in the cluster.")
@click.option(
    "--frontend",
    default="tcp://127.0.0.1:*",
    show_default=True,
    metavar="ADDRESS",
    help="Where services connect; '*' for a free port.",
)
@click.option(
    "--backend",
    default="tcp://127.0.0.1:*",
    show_default=True,
    metavar="ADDRESS",
    help="Where agents connect; '*' for a free port.",
)
@explain_errors
def broker_run(store: str, cluster: str, shard: str, frontend: str, backend: str) -> None:
    """Run one broker shard until SIGTERM or Ctrl-C.

    It serves the pipelines that the store holds and follows their changes.

    \b
    Example:
      laxity broker run --store sqlite:///var/lib/laxity/store.db --cluster local --shard s0
    """
    from broker.errors import AddressInUse
    from broker.process import run_shard_process
    from broker.shell import ShardConfig

    stop = _until_signal()
    try:
        run_shard_process(ShardConfig(name=shard, frontend=frontend, backend=backend), store, cluster, stop)
    except (AddressInUse, OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error


@click.group()
def node() -> None:
    """Node agents."""


@node.command("run")
@_store_option
@cluster_option
@click.option("--agent", required=True, metavar="ID", help="The agent's name, unique in the cluster.")
@click.option(
    "--devices",
    default="cpu",
    show_default=True,
    metavar="WHAT",
    help="cpu, cuda (all GPUs, or those in CUDA_VISIBLE_DEVICES), or emulated:N.",
)
@explain_errors
def node_run(store: str, cluster: str, agent: str, devices: str) -> None:
    """Run the agent of this host until SIGTERM or Ctrl-C.

    Its devices hold the models that the placement in the store names.

    \b
    Examples:
      laxity node run --store sqlite:///var/lib/laxity/store.db --agent gpu-host-1 --devices cuda
      laxity node run --store sqlite:///var/lib/laxity/store.db --agent play --devices emulated:16
    """
    from nodes.agent import AgentConfig
    from nodes.discovery import NoSuchDevices, parse_devices
    from nodes.process import run_agent_process

    try:
        configs = parse_devices(devices)
    except NoSuchDevices as error:
        raise click.UsageError(str(error)) from None
    stop = _until_signal()
    try:
        run_agent_process(AgentConfig(name=agent, devices=configs), store, cluster, stop)
    except (OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error


def _until_signal() -> threading.Event:
    """Log to stderr; an event that SIGTERM and SIGINT set."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop
