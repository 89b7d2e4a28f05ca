"""``laxity submit``: requests from the command line."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from cli.options import (
    cluster_argument,
    cluster_option,
    explain_errors,
    find_store,
    json_option,
    key_options,
    not_running,
    print_table,
    shard_option,
    slo_option,
    store_option,
)
from cli.render import TIMING_HEAD, as_text, reply_as_json, text_lines, timing_cells
from cli.shard_access import find_access
from cluster.records import BrokerRecord, Paths, decode
from cluster.store import open_store
from laxity import Client
from laxity.outcomes import Outcome, Unavailable
from laxity.reply import Reply
from laxity.traceparent import new_traceparent
from pipelines import format_duration

PATIENCE = (1.0, 4.0)
"""Seconds to wait for a shard before telling that there is none, and after that before giving up."""


_CONTENT = object()
"""Stands for the file's bytes or the text among the fields."""


def _check_fields(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """The fields of the request, one of them :data:`_CONTENT`; {} where the content is the request."""
    fields: dict[str, Any] = {}
    for value in values:
        name, equals, text = value.partition("=")
        as_json = name.endswith(":")
        name = name.removesuffix(":")
        if not equals or not name:
            raise click.BadParameter(f"{value!r} is none of NAME=TEXT, NAME:=JSON and NAME=@")
        if name in fields:
            raise click.BadParameter(f"the field {name!r} is given twice")
        if as_json:
            try:
                fields[name] = json.loads(text)
            except ValueError as error:
                raise click.BadParameter(f"the field {name!r} is no JSON: {error}") from None
        else:
            fields[name] = _CONTENT if text == "@" else text
    if fields and sum(value is _CONTENT for value in fields.values()) != 1:
        raise click.BadParameter("say which one field holds the file or the --text, as in --field picture=@")
    return fields


def _with_fields(content: Any, fields: dict[str, Any]) -> Any:
    if not fields:
        return content
    return {name: content if value is _CONTENT else value for name, value in fields.items()}


@click.command()
@click.argument("pipeline", metavar="PIPELINE")
@click.argument("files", metavar="[FILE]...", nargs=-1, type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--text", help="Send this text instead of a file.")
@click.option(
    "--field",
    "fields",
    multiple=True,
    callback=_check_fields,
    metavar="NAME=TEXT|NAME:=JSON|NAME=@",
    help="Send an object with this field: a text, JSON, or (@) the file or --text. May be repeated.",
)
@slo_option
@click.option(
    "--in-flight",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    metavar="N",
    help="How many requests may be under way at once.",
)
@click.option("--timings", is_flag=True, help="Show how long each stage took.")
@click.option(
    "--trace", is_flag=True, help="Have the requests' traces kept, and print the commands that show them to stderr."
)
@shard_option
@key_options()
@cluster_option
@store_option
@json_option
@explain_errors
def submit(
    pipeline: str,
    files: tuple[str, ...],
    text: str | None,
    fields: dict[str, Any],
    slo: float | None,
    in_flight: int,
    timings: bool,
    trace: bool,
    shard: str | None,
    key: str,
    plain: bool,
    cluster: str,
    store: str | None,
    as_json: bool,
) -> None:
    """Send files (or a text) to a pipeline, one request each, and print the answers.

    Up to --in-flight requests are under way at once: more keep many GPUs busy, but compete with one another for the
    SLO; answers come in the order of the files. '-' is standard input. A pipeline that takes more than a file gets it
    as one field of an object, beside others: see --field. With --json each answer is one line: an object with the
    outcome, the output (arrays as lists, bytes in base64), what was left of the latency budget, and the stages' times.
    The budget begins when a request is sent, not while a shard is being connected.

    Exit status: 0 if every request ended `ok`, 1 if one did not, 2 wrong use, 130 interrupted by Ctrl-C.

    \b
    Examples:
      laxity submit ocr receipt.png
      laxity submit ocr *.png --slo 2s --timings
      laxity submit ocr scans/*.jpg --in-flight 1
      laxity submit ocr receipt.png --trace
      laxity submit classify letter.png --field picture=@ --field 'labels:=["billing", "sports"]'
      laxity submit lv --text hello --json
      laxity submit lv --text hello --store etcd://e1:2379,e2:2379
      laxity submit lv --text hello --shard tcp://10.0.0.7:7100,tcp://10.0.0.8:7100 --key me.key
      cat receipt.png | laxity submit ocr -
    """
    if (text is None) == (not files):
        raise click.UsageError("give either files to send ('-' for standard input) or --text TEXT")
    sources = files or ("text",)
    url = shard if shard is not None else find_shards(cluster, store)
    contents: Iterator[Any] = iter([text]) if text is not None else (_content(file) for file in files)
    payloads = (_with_fields(content, fields) for content in contents)
    good = True
    with find_access(key, plain, cluster, store, shard).client(url) as client:
        missing = connect(client)
        if missing is None:
            traceparent = new_traceparent() if trace else ""
            replies = client.map(
                pipeline, payloads, slo, max_in_flight=in_flight, traceparent=traceparent, replies=True
            )
        else:
            replies = (_unreached(missing) for _ in sources)
        for source, reply in zip(sources, replies, strict=True):
            good &= reply.ok
            if as_json:
                click.echo(json.dumps({"file": source, "pipeline": pipeline, **reply_as_json(reply)}))
            else:
                _print(source, reply, len(sources) > 1, timings)
            if trace and reply.request_id:
                where = cluster_argument(cluster) + (f" --store {shlex.quote(store)}" if store is not None else "")
                click.echo(f"laxity trace {reply.request_id}{where}", err=True)
    if not good:
        sys.exit(1)


def connect(client: Client) -> Unavailable | None:
    """Wait for a shard; why there is none."""
    first, more = PATIENCE
    try:
        client.wait_ready(first)
    except Unavailable as error:
        click.echo(f"{error.detail}; trying for {more:g} s more", err=True)
        try:
            client.wait_ready(more)
        except Unavailable as still:
            return still
    return None


def _unreached(error: Unavailable) -> Reply:
    """The end of a request that could not even be sent."""
    return Reply(Outcome.UNAVAILABLE, None, 0.0, "", error.detail, 0.0, (), "")


def find_shards(cluster: str, store: str | None) -> str:
    """The addresses of a cluster's shards, as :class:`laxity.Client` takes them."""
    opened = open_store(find_store(cluster, store))
    try:
        entries = opened.list(Paths(cluster).brokers).entries
    finally:
        opened.close()
    if not entries:
        raise not_running(cluster, store)
    return ",".join(decode(BrokerRecord, entry.key, entry.value).frontend for entry in entries)


def _content(file: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise click.ClickException(f"{file} cannot be read: {error.strerror}") from error


def _print(source: str, reply: Reply, several: bool, timings: bool) -> None:
    if several:
        click.echo(f"== {source}")
    if reply.ok:
        if text_lines(reply.value) != []:  # a picture without text prints nothing, not an empty line
            click.echo(as_text(reply.value))
        click.echo(f"{source}: ok, {format_duration(reply.remaining)} of the budget left", err=True)
    else:
        click.echo(f"{source}: {reply.error()}", err=True)
    if timings:
        print_timings([reply])


def print_timings(replies: Sequence[Reply]) -> None:
    """A table of the stages' times."""
    table = Table(*TIMING_HEAD)
    for reply in replies:
        for timing in reply.timings:
            table.add_row(*(Text(cell) for cell in timing_cells(timing)))
    print_table(table)
