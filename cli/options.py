"""Options and errors that several commands share."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from cli.rundir import RunDirectory, Unwritable, running_clusters
from cluster.addresses import split_address
from cluster.keyring import KeyRefused
from cluster.records import RecordError
from cluster.store import sqlite_path
from cluster.store.base import StoreError
from cluster.store.etcd_address import parse_address
from laxity.keys import InvalidKey
from pipelines.duration import parse_duration
from pipelines.problems import SpecError

F = TypeVar("F", bound=Callable[..., Any])
Command = Callable[..., None]
_WIDTH_OF_PIPES = 200
"""Columns of a table that does not go to a terminal: wide enough for `grep` to find whole cells."""
_NAMED = 12
"""How many names an error lists at most."""


def _check_cluster(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    try:
        RunDirectory(value)
    except RecordError as error:
        raise click.BadParameter(str(error)) from None
    return value


def check_split_option(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[int] | None:
    """The callback of --split: GPUs of each stage, as in 40,6,5,7,6."""
    if value is None:
        return None
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of numbers such as 40,6,5,7,6") from None


cluster_option = click.option(
    "--cluster",
    default="local",
    show_default=True,
    callback=_check_cluster,
    metavar="NAME",
    envvar="LAXITY_CLUSTER",
    show_envvar=True,
    help="The cluster's name.",
)


def check_store(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse what is no store's address, and what no two processes could share."""
    if value == "memory:":
        raise click.BadParameter(
            "memory: is one process's alone, and a cluster is several; write sqlite:///path/to/store.db or "
            "etcd://host:2379"
        )
    if value is not None:
        try:
            if value.startswith("etcd://"):
                parse_address(value)
            else:
                sqlite_path(value)
        except StoreError as error:
            raise click.BadParameter(str(error)) from None
    return value


store_option = click.option(
    "--store",
    metavar="URL",
    callback=check_store,
    envvar="LAXITY_STORE",
    show_envvar=True,
    help="The store, such as etcd://host-1:2379,host-2:2379 or sqlite:///path/to/store.db (default: the one that `up` "
    "keeps for the cluster).",
)


def check_duration(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    """A text such as 800ms as seconds."""
    if value is None:
        return None
    try:
        return parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def check_http(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """Refuse what is no 'HOST:PORT'; '' is none."""
    if value:
        try:
            split_address(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return value


_SIZE = re.compile(r"(\d{1,15}) ?(KiB|MiB|GiB)?", re.ASCII)
_UNITS = {None: 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


def check_size(_context: click.Context, _parameter: click.Parameter, value: str) -> int:
    """A text such as 64MiB as bytes."""
    match = _SIZE.fullmatch(value.strip())
    size = int(match[1]) * _UNITS[match[2]] if match else 0
    if not size:
        raise click.BadParameter(f"{value!r} is no size above zero; write one such as 4096, 512KiB, 64MiB or 4GiB")
    return size


slo_option = click.option(
    "--slo", callback=check_duration, metavar="TIME", help="Latency budget, as in 800ms or 2s (default: the SLO)."
)
shard_option = click.option(
    "--shard",
    metavar="URL,...",
    help="The addresses of one shard or several, as in tcp://127.0.0.1:7100 (default: those in the cluster's store).",
)


def key_options(
    option: Callable[..., Callable[[Command], Command]] = click.option, service: str = ""
) -> Callable[[Command], Command]:
    """``--key`` and ``--plain``, as all commands have them that connect to shards; a ``service`` has variables of its
    own for them as well."""
    prefixes = [f"LAXITY_{service.upper()}_", "LAXITY_"] if service else ["LAXITY_"]
    key = option(
        "--key",
        default="",
        metavar="FILE",
        envvar=[prefix + "KEY" for prefix in prefixes],
        show_envvar=True,
        help="The key file to be let in with, as `laxity keys new` writes it (default: that of the cluster on this "
        "machine, if it was started with --secure).",
    )
    plain = option(
        "--plain",
        is_flag=True,
        envvar=[prefix + "PLAIN" for prefix in prefixes],
        show_envvar=True,
        help="Connect to shards without a key, and to those on other hosts all the same: anybody in the network can "
        "read that.",
    )
    return lambda function: key(plain(function))


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def explain_errors(command: F) -> F:
    """Let expected errors end the command with their text and exit status 1."""

    @functools.wraps(command)
    def explained(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (StoreError, RecordError, SpecError, Unwritable, KeyRefused, InvalidKey) as error:
            raise click.ClickException(str(error)) from error

    return explained  # type: ignore[return-value]


def find_store(cluster: str, store: str | None) -> str:
    """The address of a running cluster's store; a :class:`click.ClickException` where nothing runs."""
    if store is not None:
        return store
    running = RunDirectory(cluster).running()
    if running is None:
        raise not_running(cluster)
    if not running.store:
        raise click.ClickException(f"the cluster {cluster!r} is only just starting; try again in a few seconds")
    return running.store


def not_running(cluster: str, store: str | None = None, *, to_start: bool = True) -> click.ClickException:
    """The error for a cluster that is not up, with what to do (``to_start``: also how to start it); of one whose
    ``store`` was named, that it has no services."""
    if store is not None:
        where = store.partition("?")[0]
        return click.ClickException(
            f"no service of the cluster {cluster!r} is registered in the store {where}: start `laxity broker run` and "
            "the others, or correct --cluster or --store (LAXITY_CLUSTER, LAXITY_STORE)"
        )
    others = [name for name in running_clusters() if name != cluster]
    hint = f"start it with `laxity up ocr{cluster_argument(cluster)}`" if to_start else ""
    if others:
        hint = f"running are: {', '.join(others)} (choose with --cluster)"
    return click.ClickException("; ".join(filter(None, (f"no cluster {cluster!r} is running here", hint))))


def cluster_argument(cluster: str) -> str:
    """What a command line needs so as to mean this cluster: nothing for the default one."""
    return "" if cluster == "local" else f" --cluster {shlex.quote(cluster)}"


def near(name: str, known: Iterable[str], what: str) -> str:
    """What to do about a name that is not among those known: the nearest one, or all of them."""
    names = sorted(known)
    found = get_close_matches(name, names, 1)
    if found:
        return f"did you mean {found[0]!r}?"
    return f"{what} {', '.join(names[:_NAMED]) or 'none'}{', ...' if len(names) > _NAMED else ''}"


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def print_table(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH_OF_PIPES
    console.print(table)
