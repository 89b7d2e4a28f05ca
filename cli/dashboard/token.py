"""The token with which people sign in to a dashboard."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

LEAST_TOKEN: Final = 16
"""Characters of a token: it can be tried as often as one likes."""


def read_token(file: str) -> str:
    """What the file says. ValueError for a token that is too short, OSError where there is no such file."""
    token = Path(file).read_text().strip()
    if len(token) < LEAST_TOKEN:
        raise ValueError(f"the token has {len(token)} characters; it needs {LEAST_TOKEN} or more")
    return token


def check_token_file(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse a file without a token in it."""
    if value:
        try:
            read_token(value)
        except (ValueError, OSError) as error:
            raise click.BadParameter(f"{value}: {getattr(error, 'strerror', None) or error}") from None
    return value
