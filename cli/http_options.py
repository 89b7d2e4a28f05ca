"""Options about who may ask a service for what over HTTP, and the token that a command shows to one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import click

from laxity.http_access import OPEN, OPENABLE
from laxity.http_tokens import InvalidTokens, read_tokens


def check_token_file(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """Refuse a file without tokens; '' is none."""
    if value:
        try:
            read_tokens(value)
        except InvalidTokens as error:
            raise click.BadParameter(str(error)) from None
    return value


def check_open(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[str, ...]:
    """A text such as metrics,health as the groups' names."""
    groups = tuple(filter(None, (part.strip() for part in value.split(","))))
    for group in groups:
        if group not in OPENABLE:
            raise click.BadParameter(f"{group!r} is nothing that can be open to everybody: {', '.join(OPENABLE)} are")
    return groups


def access_options(what: str, option: Callable[..., Any] = click.option) -> Callable[[Callable[..., None]], Any]:
    """``http_token_file`` and ``http_open``; ``what``: what needs a token unless somebody says otherwise."""
    tokens = option(
        "--http-token-file",
        default="",
        callback=check_token_file,
        metavar="FILE",
        help=f"Who shows a token of this file may ask for everything: {what}. A line is `token` or `name token`. Only "
        "its owner may be able to read the file, which is read again when it changes (default: none, and on addresses "
        "that other hosts reach, nobody gets what is not open).",
    )
    opened = option(
        "--http-open",
        default=",".join(OPEN),
        show_default=True,
        callback=check_open,
        metavar="WHAT,...",
        help=f"What everybody gets who reaches the address: some of {', '.join(OPENABLE)}, or '' for nothing.",
    )
    return lambda function: tokens(opened(function))


def _first_token(context: click.Context, parameter: click.Parameter, value: str) -> str:
    check_token_file(context, parameter, value)
    return read_tokens(value)[0] if value else ""


token_option = partial(
    click.option,
    "--http-token-file",
    "http_token",
    default="",
    callback=_first_token,
    metavar="FILE",
    envvar="LAXITY_HTTP_TOKEN_FILE",
    show_envvar=True,
    help="A file with a token of the services', where they want one; its first one is shown.",
)()
"""``http_token``: what a command shows to services ('': nothing)."""
