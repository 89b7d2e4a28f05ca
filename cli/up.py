"""``laxity up``: a cluster on this machine."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import click
import msgspec

from cli.children import ChildDied
from cli.local_cluster import ClusterError, Interrupted, LocalCluster
from cli.local_dashboard import LocalDashboard
from cli.local_setup import Setup
from cli.options import (
    check_http,
    check_split_option,
    check_store,
    cluster_argument,
    cluster_option,
    explain_errors,
    json_option,
    print_json,
)
from cli.progress import LoadingDisplay
from cli.rundir import AlreadyRunning, RunDirectory
from cluster.layout import Wish, equip, lay_out
from cluster.placement import PlacementError
from pipelines import PipelineSpec, load_spec, shipped_pipelines
from pipelines.policies import PolicyError, parse_policy
from pipelines.problems import SpecNotFound

ETCD_MEMBERS = 3


class Signals:
    """Whether SIGINT, SIGTERM or SIGHUP came, or came again; replaces their handlers."""

    def __init__(self) -> None:
        self._count = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._count += 1

    def came(self) -> bool:
        return self._count > 0

    def came_again(self) -> bool:
        return self._count > 1


def _check_store(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    return value if value == "etcd" else check_store(context, parameter, value)


@click.command()
@click.argument("specs", metavar="[SPEC]...", nargs=-1)
@click.option("--gpus", type=click.IntRange(1, 100_000), help="Emulated GPUs (default: one for each emulated stage).")
@click.option("--executor", type=click.Choice(["emulated"]), help="Emulate every stage from its profile.")
@click.option(
    "--split", callback=check_split_option, metavar="N,N,...", help="Emulated GPUs of each emulated stage, in order."
)
@click.option("--agents", type=click.IntRange(1, 1000), help="Agents that play the emulated GPUs (default: 16 each).")
@click.option("--policy", metavar="NAME", help="Schedule every pipeline by this policy instead of its own.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Where services connect; further shards take the ports that follow (default: any free ones).",
)
@click.option(
    "--store",
    metavar="etcd|URL",
    callback=_check_store,
    help="etcd: run one here; URL: one that is there already, such as etcd://host:2379 or sqlite:///path/to/store.db "
    "(default: a file of the cluster's own).",
)
@click.option("--etcd-members", type=click.IntRange(1, 9), help="Members that --store etcd runs (default: 3).")
@click.option(
    "--coordinators",
    type=click.IntRange(0, 16),
    metavar="N",
    help="Coordinators, which place the pipelines and scale them (default: 2 with etcd, else 0: the plan is fixed).",
)
@click.option("--shards", type=click.IntRange(1, 64), metavar="N", help="Broker shards (default: 2 with etcd, else 1).")
@click.option(
    "--rest/--no-rest",
    default=False,
    show_default=True,
    help="Whether the coordinators let GPUs rest that are not needed.",
)
@click.option(
    "--memory",
    type=click.IntRange(1, 999_999_999),
    metavar="MB",
    help="What models may take of the CPU's memory, or of each emulated GPU's; of those that need more, the ones in "
    "demand are loaded (default: as much as they need).",
)
@click.option(
    "--telemetry",
    default="",
    metavar="DIR",
    help="Write a row of each request and action there, as CSV; `laxity telemetry DIR` reads them.",
)
@click.option(
    "--dashboard",
    default="127.0.0.1:*",
    show_default=True,
    callback=check_http,
    metavar="HOST:PORT",
    help="Where the web dashboard is, once somebody opens it; '*' for a free port, '' for none.",
)
@click.option(
    "--secure",
    is_flag=True,
    help="Encrypt all connections, between owners of keys that are made for this cluster and end with it.",
)
@json_option
@click.option("-d", "--detach", is_flag=True, help="Return once it is ready and leave it running.")
@cluster_option
@explain_errors
def up(
    specs: tuple[str, ...],
    gpus: int | None,
    executor: str | None,
    split: list[int] | None,
    agents: int | None,
    policy: str | None,
    port: int,
    store: str | None,
    etcd_members: int | None,
    coordinators: int | None,
    shards: int | None,
    rest: bool,
    memory: int | None,
    telemetry: str,
    dashboard: str,
    secure: bool,
    as_json: bool,
    detach: bool,
    cluster: str,
) -> None:
    """Start a cluster on this machine and serve pipelines until Ctrl-C.

    A SPEC is the path of a YAML file or the name of a shipped pipeline (see `laxity pipeline --help`). Stages run on
    the NVIDIA GPUs of this machine, or on its CPU where there are none; stages whose executor is `emulated` run on
    emulated GPUs, which answer after the time that the stage's profile says.

    Without coordinators the plan is written once and stays. With some it is theirs: it follows the load, what dies, and
    `laxity pipeline apply`; then it may also start without any SPEC.

    \b
    Examples:
      laxity up ocr
      laxity up ./mine.yaml ocr --port 7100 --detach
      laxity up lv --gpus 64
      laxity up lv --split 40,6,5,7,6 --agents 8
      laxity up lv --gpus 16 --policy pard
      laxity up lv --gpus 16 --coordinators 1 --rest
      laxity up lv --gpus 64 --store etcd
      laxity up ocr --memory 2048
      laxity up ocr --telemetry ./telemetry
      laxity up ocr --secure
    """
    etcd = store is not None and store.startswith("etcd")
    if coordinators is None:
        coordinators = 2 if etcd else 0
    if etcd_members is not None and store != "etcd":
        raise click.UsageError("--etcd-members belongs to --store etcd, which runs them")
    if rest and not coordinators:
        raise click.UsageError("--rest is for coordinators to do, and there are none; add --coordinators 1")
    if not specs and not coordinators:
        raise click.UsageError(
            f"name at least one pipeline: a YAML file, or one of {', '.join(shipped_pipelines())}; "
            "for example `laxity up ocr` (with --coordinators 1 pipelines can be applied later)"
        )
    if split is not None and coordinators:
        raise click.UsageError(
            "with coordinators it is they who divide the GPUs over the stages; leave out --split, or have a fixed plan "
            "with --coordinators 0"
        )
    loaded = _load(specs, policy)
    wish = Wish(emulate=executor == "emulated", gpus=gpus, split=split, agents=agents, memory_mb=memory or 0)
    try:
        layouts = (equip if coordinators else lay_out)(loaded, wish, *real_devices())
    except PlacementError as error:
        raise click.UsageError(str(error)) from None
    setup = Setup(
        specs=loaded,
        layouts=layouts,
        shards=shards or (2 if etcd else 1),
        coordinators=coordinators,
        etcd_members=(etcd_members or ETCD_MEMBERS) if store == "etcd" else 0,
        port=port,
        rest=rest,
        telemetry=os.path.abspath(telemetry) if telemetry else "",
        dashboard=dashboard,
        secure=secure,
    )
    detached = Detached() if detach else None
    sys.exit(_serve(RunDirectory(cluster), None if store == "etcd" else store, setup, detached, as_json))


def _load(specs: Sequence[str], policy: str | None) -> list[PipelineSpec]:
    try:
        loaded = [load_spec(name) for name in specs]
    except SpecNotFound as error:
        raise click.UsageError(str(error)) from None
    if policy is not None:
        try:
            parse_policy(policy)
        except PolicyError as error:
            raise click.UsageError(str(error)) from None
        loaded = [msgspec.structs.replace(spec, policy=policy) for spec in loaded]
    names = [spec.name for spec in loaded]
    for name in names:
        if names.count(name) > 1:
            raise click.UsageError(f"two of the specs are named {name!r}; a cluster serves each name once")
    return loaded


def real_devices() -> tuple[str, int]:
    """What this host runs models on: ('cuda', number of GPUs) or ('cpu', 1)."""
    from nodes.discovery import cuda_devices

    gpus = len(cuda_devices())
    return ("cuda", gpus) if gpus else ("cpu", 1)


def _serve(directory: RunDirectory, store: str | None, setup: Setup, detached: Detached | None, as_json: bool) -> int:
    signals = Signals()
    try:
        with LocalCluster(directory, store, signals.came, say, signals.came_again) as cluster:
            with LoadingDisplay() as display:
                cluster.start(setup, display.show)
                addresses = cluster.wait_ready(display.show)
            if as_json:
                print_json(_described(addresses, directory, setup, cluster.dashboard))
            else:
                _tell_how(",".join(addresses), directory, setup, cluster.dashboard, detached is not None)
            if detached is not None:
                detached.ready(directory)
            cluster.serve()
            say("ending the cluster (Ctrl-C again: at once)")
    except Interrupted:
        say("interrupted while starting; everything has been ended")
        return 1
    except (AlreadyRunning, ClusterError, ChildDied) as error:
        click.echo(f"Error: {error}", err=True)
        return 1
    return 0


def say(line: str) -> None:
    """A line for people about what the cluster does."""
    click.echo(line, err=True)


def _described(
    addresses: Sequence[str], directory: RunDirectory, setup: Setup, dashboard: LocalDashboard | None
) -> dict[str, Any]:
    return {
        "cluster": directory.cluster,
        "addresses": list(addresses),
        "pipelines": [spec.name for spec in setup.specs],
        "dashboard": dashboard.url if dashboard is not None else None,
        "dashboard_token_file": str(dashboard.token_file) if dashboard is not None else None,
        "key": str(directory.operator_key) if setup.secure else None,
    }


def _tell_how(
    address: str, directory: RunDirectory, setup: Setup, dashboard: LocalDashboard | None, detached: bool
) -> None:
    named = cluster_argument(directory.cluster)
    specs = setup.specs
    if specs:
        click.echo(f"Serving {', '.join(spec.name for spec in specs)} at {address}")
    else:
        click.echo(f"Serving no pipeline yet at {address}")
        click.echo(f"  laxity pipeline apply ocr{named}")
    for spec in specs:
        what = "picture.png" if spec.name in ("ocr", "classify") else "--text hello"
        click.echo(f"  laxity submit {spec.name} {what}{named}")
    if specs:
        click.echo(f'  or in Python: laxity.Client("{address}").infer("{specs[0].name}", payload)')
    if setup.secure:
        click.echo("Only owners of keys are let in. Commands here find theirs; Python and what else connects needs:")
        click.echo(f"  export LAXITY_KEY={shlex.quote(str(directory.operator_key))}")
    if dashboard is not None:
        click.echo(f"Dashboard: {dashboard.url} (to drain nodes there, sign in with what is in {dashboard.token_file})")
    click.echo(f"End it with `laxity down{named}`." if detached else "Press Ctrl-C to end it.")


class Detached:
    """Splits the process in two: this one waits until the other says that the cluster is ready, and exits.

    The other keeps the terminal until then, so that it shows progress and errors as in the foreground.
    """

    def __init__(self) -> None:
        reading, self._writing = os.pipe()
        child = os.fork()
        if child:
            os.close(self._writing)
            os._exit(_wait_ready(reading, child))
        os.close(reading)

    def ready(self, directory: RunDirectory) -> None:
        """Let the waiting process go; from here on output goes to a log file."""
        log = directory.logs / "up.log"
        say(f"Logs: {directory.logs}")
        sys.stdout.flush()
        sys.stderr.flush()
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (descriptor, 1), (descriptor, 2)):
            os.dup2(source, target)
        os.close(descriptor)
        os.close(nothing)
        os.write(self._writing, b"+")
        os.close(self._writing)


def _wait_ready(reading: int, child: int) -> int:
    """The exit status for the process that the user waits for: 0 once the child is ready, else the child's."""
    # Ctrl-C reaches the child too, which then ends what it started.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    if os.read(reading, 1):
        return 0
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) & 0xFF
