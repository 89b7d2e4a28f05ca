"""What the gateway learns from a cluster's store: where the shards are, with their keys, and what the pipelines are
called inside."""

from __future__ import annotations

from cli.shard_access import serving_first
from cluster.decoded import Decoded
from cluster.records import BrokerRecord, KeyRecord, Paths, ServingRecord
from cluster.store import open_store
from cluster.store.base import Store
from laxity.gateway.catalog import INPUT, Catalog, Model
from laxity.gateway.values import OUTPUT
from pipelines.spec import REQUEST, PipelineSpec


class StoreLookup:
    """Looks into a store, which need not be there yet. For one thread at a time."""

    def __init__(self, url: str, cluster: str) -> None:
        self._url = url
        self._paths = Paths(cluster)
        self._store: Store | None = None
        self._decoded = Decoded()

    def __call__(self) -> Catalog:
        if self._store is None:
            self._store = open_store(self._url)
        brokers, serving, keys = self._paths.brokers, self._paths.serving, self._paths.keys
        found = [self._store.list(prefix).entries for prefix in (brokers, serving, keys)]
        self._decoded.update({entry.key: entry for entries in found for entry in entries})
        shards = self._decoded.under(BrokerRecord, brokers)
        served = self._decoded.under(ServingRecord, serving)
        return Catalog(
            ",".join(shards[name].frontend for name in sorted(shards)),
            {name: model_of(record.spec, record.version) for name, record in served.items()},
            tuple(serving_first(self._decoded.under(KeyRecord, keys), shards)),
        )

    def close(self) -> None:
        if self._store is not None:
            self._store.close()


def model_of(spec: PipelineSpec, version: str) -> Model:
    """A pipeline as the protocol's metadata tell it: its inputs are the fields that its stages take of the request."""
    fields = [field for stage in spec.stages.values() for source, field in stage.sources() if source == REQUEST]
    fields += [field for stage, field in spec.outputs().values() if stage == REQUEST]
    inputs = (INPUT,) if "" in fields or not fields else tuple(dict.fromkeys(fields))
    fixed = not isinstance(spec.output, str)
    return Model(version, inputs, tuple(spec.outputs()) if fixed else (OUTPUT,), fixed)
