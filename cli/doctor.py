"""``laxity doctor``: is this installation in order, and this host, and the cluster?"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import msgspec
from rich.table import Table
from rich.text import Text

from cli.finding import Finding
from cli.options import cluster_option, json_option, print_json, print_table, store_option

_STYLE = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}
_ADDRESSES = ("frontend", "backend", "http", "grpc")
"""Options that are addresses to bind."""
_DIRECTORIES = ("cache", "telemetry")


@click.command()
@click.option(
    "--config",
    metavar="FILE",
    envvar="LAXITY_CONFIG",
    show_envvar=True,
    help="The services' file: it is checked, with the addresses, directories, keys and the store that it names.",
)
@cluster_option
@store_option
@json_option
def doctor(config: str | None, cluster: str, store: str | None, as_json: bool) -> None:
    """Look for what is wrong with this installation, this host and a cluster, and say what to do; exit 1 if something
    keeps them from working.

    The store is that of --store, of the file, or of the cluster that runs here.

    \b
    Examples:
      laxity doctor
      laxity doctor --config /etc/laxity.yaml
      laxity doctor --store 'etcd://e1:2379,e2:2379?ca=/etc/laxity/ca.pem' --cluster production --json
    """
    findings = list(_findings(config, cluster, store))
    if as_json:
        print_json(msgspec.to_builtins(findings))
    else:
        table = Table("check", "state", "found", "what to do")
        for finding in findings:
            state = Text(finding.state, style=_STYLE[finding.state])
            table.add_row(Text(finding.check), state, Text(finding.found), Text(finding.advice))
        print_table(table)
    if any(finding.state == "error" for finding in findings):
        sys.exit(1)


def _findings(config: str | None, cluster: str, store: str | None) -> Iterator[Finding]:
    from cli.check_gpus import check_gpus
    from cli.check_host import check_clock, check_disks, check_limits
    from cli.check_ports import check_ports
    from cli.check_processes import check_leftovers
    from cli.checks import check_installation
    from cluster.filecache import default_directory

    yield from check_installation()
    yield from check_clock()
    yield from check_limits()
    yield from check_gpus()
    directories = {"cache": default_directory()}
    key_files: dict[Path, str] = {}
    if config is not None:
        from cli.configuration import ConfigurationError, read_configuration
        from cli.services import SERVICES

        try:
            sections = read_configuration(Path(config), SERVICES)
        except ConfigurationError as error:
            yield Finding("configuration", "error", str(error), "correct the file; what runs goes on with the old one")
        else:
            yield Finding("configuration", "ok", f"{config} can be used")
            given = {f"{section}.{name}": value for section, of in sections.items() for name, value in of.items()}
            chosen = {option: str(value) for option, value in given.items() if value}
            yield from check_ports({at: value for at, value in chosen.items() if at.partition(".")[2] in _ADDRESSES})
            directories |= {at: Path(value) for at, value in chosen.items() if at.partition(".")[2] in _DIRECTORIES}
            key_files |= {Path(value): at for at, value in chosen.items() if at.endswith(".key")}
            common = next(iter(sections.values()))
            store = store or str(common.get("store", "")) or None
            if cluster == "local":
                cluster = str(common.get("cluster", cluster))
    yield from check_disks(directories)
    yield from _cluster(cluster, store, {**_key_files(cluster), **key_files})
    yield from check_leftovers()


def _key_files(cluster: str) -> dict[Path, str]:
    """The key files that are used here, with what names each."""
    from cli.rundir import RunDirectory
    from laxity.credentials import KEY_VARIABLE, default_key

    directory = RunDirectory(cluster)
    own = sorted(directory.keys.glob("*.key")) if directory.running() is not None else []
    named = {Path(default_key()): KEY_VARIABLE} if default_key() else {}
    return {**dict.fromkeys(own, ""), **named}


def _cluster(cluster: str, store: str | None, key_files: Mapping[Path, str]) -> Iterator[Finding]:
    from cli.check_keys import check_key_files, check_keys
    from cli.check_processes import check_releases
    from cli.check_store import check_store
    from cli.rundir import RunDirectory
    from cli.snapshot import look
    from cluster.keystore import look_at_keys
    from cluster.records import RecordError
    from cluster.store.base import StoreError

    if store is None:
        running = RunDirectory(cluster).running()
        if running is None or not running.store:
            yield from check_key_files(key_files, cluster, None, time.time())
            return
        store = running.store
    findings = list(check_store(store))
    yield from findings
    if not any(finding.check == "store" and finding.state in ("ok", "warning") for finding in findings):
        yield from check_key_files(key_files, cluster, None, time.time())
        return  # also where a file is not there yet: looking would make it
    try:
        seen, keys = look(store, cluster), look_at_keys(store, cluster)
    except (StoreError, RecordError) as error:
        yield Finding("cluster", "error", str(error), "see the lines about the store")
    else:
        yield from check_releases(seen)
        yield from check_key_files(key_files, cluster, keys, time.time())
        yield from check_keys(keys, store, time.time())
