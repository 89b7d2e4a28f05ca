"""Feeds of models that take arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def as_arrays(feed: Any) -> npt.NDArray[Any] | dict[str, npt.NDArray[Any]]:
    """An element's feed as one array or a dict of arrays; ValueError says what else it is."""
    if isinstance(feed, dict):
        return {name: _as_array(value, f"the feed's {name!r}") for name, value in feed.items()}
    return _as_array(feed, "the feed")


def _as_array(value: Any, what: str) -> npt.NDArray[Any]:
    if value is not None and not isinstance(value, (bytes, str, dict)):
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{what} is no array: {error}") from error
        if array.dtype.kind != "O":
            return array
    raise ValueError(f"{what} is a {type(value).__name__}; return an array, or a dict of arrays, from 'before'")
