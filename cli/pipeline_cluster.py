"""``laxity pipeline apply``, ``list`` and ``delete``: the pipelines of a running cluster."""

from __future__ import annotations

from collections.abc import Sequence

import click

from cli.following import follow, timeout_option
from cli.options import (
    cluster_argument,
    cluster_option,
    explain_errors,
    find_store,
    json_option,
    key_options,
    near,
    print_json,
    print_table,
    store_option,
)
from cli.pipeline_table import describe_pipelines, pipeline_table
from cli.progress import model_lines
from cli.publish import pipeline_record, publish_files
from cli.rollout import Failures, is_served, missing_services, models_loading, waits_for
from cli.shard_access import find_access
from cli.snapshot import Snapshot, look
from cluster.records import Paths, PipelineRecord, encode
from cluster.store import open_store
from pipelines import PipelineSpec, load_spec
from pipelines.problems import SpecNotFound

no_wait_option = click.option("--no-wait", is_flag=True, help="Return at once.")


@click.command()
@click.argument("specs", metavar="SPEC...", nargs=-1, required=True)
@no_wait_option
@timeout_option
@key_options()
@cluster_option
@store_option
@explain_errors
def apply(
    specs: Sequence[str], no_wait: bool, timeout: float, key: str, plain: bool, cluster: str, store: str | None
) -> None:
    """Have a cluster serve pipelines, new ones or new versions, and wait until it does.

    A new version takes new requests once enough devices hold it; those in flight finish on the old one. Model files and
    code beside the SPEC go to the shards, from which the nodes fetch them.

    Exit status: 0 once all are served (with --no-wait: applied), 1 if one cannot be or --timeout has passed; what was
    applied stays applied.

    \b
    Examples:
      laxity pipeline apply ocr
      laxity pipeline apply ./mine.yaml lv --timeout 10m
      laxity pipeline apply ./mine.yaml --store etcd://e1:2379,e2:2379 --no-wait
    """
    loaded = _load(specs)
    url = find_store(cluster, store)
    seen = look(url, cluster)
    if seen.fixed:
        served = " ".join(dict.fromkeys([*seen.serving, *specs]))
        raise _fixed(cluster, f"`laxity up {served}`")
    records = [pipeline_record(spec, _say) for spec in loaded]
    credentials = find_access(key, plain, cluster, store).credentials()
    paths = Paths(cluster)
    opened = open_store(url)
    try:
        for record in records:
            opened.put(paths.pipeline(record.spec.name), encode(record))
            publish_files(record, [shard.frontend for shard in seen.brokers.values()], _say, credentials)
            click.echo(f"{record.spec.name}: version {record.version} is applied")
    finally:
        opened.close()
    if no_wait:
        missing = missing_services(seen)
        if missing:
            click.echo(f"It is not served yet: {missing}.", err=True)
        return
    follow(url, cluster, timeout, _Rollouts(records).waits)
    for record in records:
        click.echo(f"{record.spec.name}: version {record.version} is served")


def _say(line: str) -> None:
    click.echo(line, err=True)


@click.command("list")
@cluster_option
@store_option
@json_option
@explain_errors
def list_pipelines(cluster: str, store: str | None, as_json: bool) -> None:
    """Show a cluster's pipelines: the version that is wanted and the one that is served, by which shards, on how many
    GPUs for each stage, at what rate, and how their drop is tuned.

    \b
    Examples:
      laxity pipeline list
      laxity pipeline list --store etcd://e1:2379,e2:2379 --json
    """
    pipelines = describe_pipelines(look(find_store(cluster, store), cluster))
    if as_json:
        print_json(pipelines)
        return
    print_table(pipeline_table(pipelines))
    for one in pipelines:
        if one["waits"]:
            click.echo(f"{one['name']}: {one['waits']}", err=True)


@click.command()
@click.argument("name", metavar="NAME")
@click.option("--yes", is_flag=True, help="Do not ask.")
@no_wait_option
@timeout_option
@cluster_option
@store_option
@explain_errors
def delete(name: str, yes: bool, no_wait: bool, timeout: float, cluster: str, store: str | None) -> None:
    """Have a cluster serve a pipeline no more, and wait until it does not. Requests in flight finish.

    \b
    Examples:
      laxity pipeline delete mine
      laxity pipeline delete mine --yes --store etcd://e1:2379,e2:2379
    """
    url = find_store(cluster, store)
    seen = look(url, cluster)
    check_name(name, seen, cluster)
    if seen.fixed:
        others = " ".join(served for served in seen.serving if served != name)
        raise _fixed(cluster, f"`laxity up {others}`" if others else "leave it at that")
    if not yes:
        click.confirm(f"Have the cluster {cluster!r} serve {name} no more?", abort=True)
    opened = open_store(url)
    try:
        opened.delete(Paths(cluster).pipeline(name))
    finally:
        opened.close()
    if no_wait:
        click.echo(f"{name} is deleted")
        return
    follow(url, cluster, timeout, lambda _, seen: _still_served(seen, name))
    click.echo(f"{name} is deleted and served no more")


def check_name(name: str, seen: Snapshot, cluster: str) -> None:
    """Raise :class:`click.ClickException` where a cluster has no pipeline of that name."""
    known = seen.pipelines.keys() | seen.serving.keys()
    if name not in known:
        raise click.ClickException(f"the cluster {cluster!r} has no pipeline {name!r}; {near(name, known, 'it has')}")


def _load(names: Sequence[str]) -> list[PipelineSpec]:
    try:
        specs = [load_spec(name) for name in names]
    except SpecNotFound as error:
        raise click.UsageError(str(error)) from None
    seen: dict[str, str] = {}
    for file, spec in zip(names, specs, strict=True):
        if spec.name in seen:
            raise click.UsageError(f"{seen[spec.name]} and {file} are both named {spec.name!r}; apply one of them")
        seen[spec.name] = file
    return specs


def _fixed(cluster: str, again: str) -> click.ClickException:
    named = cluster_argument(cluster)
    return click.ClickException(
        f"the plan of the cluster {cluster!r} is fixed, as it was started without coordinators; end it with `laxity "
        f"down{named}` and {again}{named if again.startswith('`') else ''}, or start it with --coordinators 1, so that "
        "pipelines can be applied and deleted while it runs"
    )


def _still_served(seen: Snapshot, name: str) -> str:
    if name not in seen.serving:
        return ""
    return missing_services(seen) or f"{name} is still served"


class _Rollouts:
    """Several versions on their way; what is ready of them is told as it happens."""

    def __init__(self, records: Sequence[PipelineRecord]) -> None:
        self._records = records
        self._failures = Failures()
        self._told: set[str] = set()

    def waits(self, now: float, seen: Snapshot) -> str:
        """What the first one that is not served waits for. Raises :class:`click.ClickException` for a model that
        cannot be loaded, and for a version that somebody else replaced."""
        said = ""
        for record in self._records:
            spec = record.spec
            models = models_loading(seen, spec)
            for line in model_lines(models):
                if line not in self._told:
                    self._told.add(line)
                    _say(line)
            if is_served(seen, spec):
                continue
            self._check(record, seen)
            failed = self._failures.lasting(now, models)
            if failed is not None:
                old = seen.serving.get(spec.name)
                still = f"; version {old.version} is still served" if old is not None else ""
                raise click.ClickException(f"{failed.model} could not be loaded {failed.failed}{still}")
            said = said or f"{spec.name}: {waits_for(seen, spec)}"
        return said

    @staticmethod
    def _check(record: PipelineRecord, seen: Snapshot) -> None:
        name, version = record.spec.name, record.version
        wanted = seen.pipelines.get(name)
        if wanted is None or wanted.version != version:
            what = "was deleted" if wanted is None else f"was replaced by version {wanted.version}"
            raise click.ClickException(f"{name}: version {version} {what} by somebody else meanwhile")
