"""A stage's ``options``, read as what its executor takes."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import msgspec

Options = TypeVar("Options", bound=msgspec.Struct)


def read_options(executor: str, given: dict[str, Any], kind: type[Options]) -> Options:
    """``given`` as a ``kind``; ValueError names the option that the executor does not have, or does not have so."""
    has = kind.__struct_fields__
    unknown = sorted(set(given) - set(has))
    if unknown:
        names = ", ".join(repr(name) for name in sorted(has))
        raise ValueError(f"the executor {executor!r} has no option {unknown[0]!r}; it has {names}")
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        wrong, _, at = str(error).partition(" - at `$.")
        name = at.rstrip("`")
        shown = f", not {given[name]!r}" if name in given else ""
        raise ValueError(f"the option {name!r} of the executor {executor!r}: {wrong}{shown}") from error


def device_threads() -> int:
    """How many threads are this device's share of the host: what the agent put into the worker's environment."""
    return int(os.environ.get("OMP_NUM_THREADS", "1"))
