"""Options of the commands below `laxity keys`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from cli.options import check_duration
from cluster.records import Paths, RecordError
from laxity.keys import InvalidKey, check_key

F = TypeVar("F", bound=Callable[..., Any])
LONGEST_NOTE = 200
"""Characters of a note."""


def _check_pipelines(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[str] | None:
    if value is None:
        return None
    names = [name for name in (part.strip() for part in value.split(",")) if name]
    try:
        for name in names:
            Paths("local").pipeline(name)
    except RecordError as error:
        raise click.BadParameter(str(error)) from None
    return names


def _check_public(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    try:
        return None if value is None else check_key(value, "public key")
    except InvalidKey as error:
        raise click.BadParameter(str(error)) from None


def check_note(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    if len(value) > LONGEST_NOTE or not value.isprintable():
        raise click.BadParameter(f"write one line of up to {LONGEST_NOTE} characters")
    return value


def check_overlap(context: click.Context, parameter: click.Parameter, value: str) -> float:
    return 0.0 if value.strip() in ("0", "0s") else check_duration(context, parameter, value) or 0.0


def limit_options(function: F) -> F:
    """What a client is held to, in the whole cluster."""
    pipelines = click.option(
        "--pipelines",
        callback=_check_pipelines,
        metavar="NAME,...",
        help="The only pipelines that a client may use; '' for all.",
    )
    rate = click.option(
        "--rate", type=click.FloatRange(min=0), metavar="N", help="Requests a second of a client; 0 for no limit."
    )
    in_flight = click.option(
        "--in-flight", type=click.IntRange(min=0), metavar="N", help="A client's requests under way; 0 for no limit."
    )
    return pipelines(rate(in_flight(function)))


file_option = click.option(
    "-o", "--output", metavar="FILE", help="Where the key is written, for its owner alone (default: NAME.key here)."
)
public_option = click.option(
    "--public",
    callback=_check_public,
    metavar="Z85",
    help="The public key of a pair that was made elsewhere: no file is written.",
)
