"""The values of options: ranges of loads, and values with the parts of the requests that each is for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Generic, NamedTuple, TypeVar

import click

T = TypeVar("T")

MOST_STEPS: Final = 100


def parse_range(text: str) -> list[float]:
    """[100, 150, 200] of '100:200:50'; without END one value, without STEP steps of 1. ValueError says what is
    wrong."""
    parts = text.split(":")
    numbers = [_number(part) for part in parts]
    if not 1 <= len(parts) <= 3 or not all(0 < number < math.inf for number in numbers):
        raise ValueError(f"a range is START, START:END or START:END:STEP with numbers above 0, not {text!r}")
    start, end, step = [*numbers, *[numbers[0], 1.0][len(numbers) - 1 :]]
    if end < start:
        raise ValueError(f"the range {text!r} ends below its start")
    count = math.floor((end - start) / step + 1e-9) + 1
    if count > MOST_STEPS:
        raise ValueError(f"the range {text!r} has {count:,} steps, more than {MOST_STEPS}: give a larger STEP")
    return [round(start + index * step, 9) for index in range(count)]


def check_range(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[float] | None:
    """The callback of an option that takes a range."""
    if value is None:
        return None
    try:
        return parse_range(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def check_whole_range(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """The same, of whole numbers."""
    found = check_range(context, parameter, value)
    if found is not None and any(number != int(number) for number in found):
        raise click.BadParameter(f"{value!r} must be of whole numbers")
    return None if found is None else [int(number) for number in found]


class Part(NamedTuple, Generic[T]):
    """One of several values, and its weight among them."""

    value: T
    weight: float


def parse_parts(text: str, convert: Callable[[str], T]) -> list[Part[T]]:
    """[(0.1, 1), (0.3, 3)] of '100ms:1,300ms:3': weights need not add up to 1, and are 1 unless given. What ``convert``
    raises (ValueError) is raised, and ValueError for bad weights."""
    found = []
    for part in text.split(","):
        value, colon, weight = part.strip().partition(":")
        number = _number(weight) if colon else 1.0
        if not 0 < number < math.inf:
            raise ValueError(f"{part.strip()!r}: the part of the requests must be a number above 0")
        found.append(Part(convert(value), number))
    return found


def by_pipeline(values: Sequence[str], pipelines: Iterable[str], option: str) -> Mapping[str, list[str]]:
    """What an option that may be repeated says of each pipeline: 'NAME=VALUE' is for that one, others are for those
    that have none of their own."""
    own: dict[str, list[str]] = {name: [] for name in pipelines}
    general = []
    for value in values:
        name, equals, rest = value.partition("=")
        if equals and name in own:
            own[name].append(rest)
        elif equals and name.isidentifier() and option != "--input-data":
            raise click.UsageError(f"{option} {value}: there is no pipeline {name!r} among those to be loaded")
        else:
            general.append(value)
    return {name: found or general for name, found in own.items()}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
