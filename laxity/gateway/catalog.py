"""What is served, as the protocol's metadata tell it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from laxity.gateway.values import OUTPUT
from laxity.keys import ServerKey

INPUT: Final = "request"
"""The name that metadata give the only input of a pipeline; requests may call it as they like."""
ONLY_VERSION: Final = "1"
"""The version of pipelines of which the catalog says nothing."""
EXTENSIONS: Final = ["binary_tensor_data", "model_repository", "parameters", "model_configuration"]
"""What there is beside the protocol itself."""


@dataclass(frozen=True, slots=True)
class Model:
    """A pipeline. Names of ``inputs`` and ``outputs`` are those of the fields of its request and its answer; ``fixed``
    says that it answers these and no others."""

    version: str = ONLY_VERSION
    inputs: tuple[str, ...] = (INPUT,)
    outputs: tuple[str, ...] = (OUTPUT,)
    fixed: bool = False


@dataclass(frozen=True, slots=True)
class Catalog:
    """What a lookup found: the ``shards``' addresses, as :class:`laxity.Client` takes them ('': there are none), what
    is known of the pipelines, and the keys of the shards (``servers``)."""

    shards: str = ""
    models: Mapping[str, Model] = field(default_factory=dict)
    servers: tuple[ServerKey, ...] = ()


Lookup = Callable[[], Catalog]
"""Blocks; whatever it raises is logged, and what was known before holds."""
