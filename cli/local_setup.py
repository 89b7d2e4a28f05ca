"""What a cluster on this machine is to be, and how far it is while it starts."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cli.rollout import ModelLoading
from cluster.layout import AgentLayout
from pipelines.spec import PipelineSpec


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What is started. Without coordinators the plan is that of ``layouts``, written once; with some it is theirs, and
    ``layouts`` say only which agents there are. ``etcd_members`` is 0 for another store; ``port`` is the first shard's
    (0: any free one), the others' follow; ``rest``: whether coordinators let devices rest that are not needed;
    ``telemetry``: the directory for the rows of shards and agents ('': none); ``dashboard``: 'HOST:PORT' ('': none);
    ``secure``: whether all connections are encrypted, between owners of keys."""

    specs: Sequence[PipelineSpec]
    layouts: Sequence[AgentLayout]
    shards: int = 1
    coordinators: int = 0
    etcd_members: int = 0
    port: int = 0
    rest: bool = False
    telemetry: str = ""
    dashboard: str = ""
    secure: bool = False


class Loading(msgspec.Struct, frozen=True):
    """How far a starting cluster is: what each of its parts is doing, how far the models are, and what it waits for
    beside them, for people. ``frontends`` are the shards' addresses, once all parts have registered and a coordinator
    leads (where there are any); ``served``: whether requests get each pipeline."""

    parts: dict[str, str]
    models: list[ModelLoading] = []
    waits: str = ""
    frontends: list[str] = []
    served: bool = False

    @property
    def done(self) -> bool:
        return (
            bool(self.frontends)
            and self.served
            and not self.waits
            and all(model.ready == model.devices for model in self.models)
        )
