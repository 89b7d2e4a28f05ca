"""What the planner remembers besides rates: since when something has been so. All times are monotonic seconds."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.planner.costs import Costs
from cluster.planner.settings import Settings
from cluster.planner.view import ClusterView, DeviceId

TRIAL = 30.0
"""Seconds that a model has to load when it is tried again where it failed before."""
AVOIDED_FOR = 300.0
"""Seconds for which a pipeline is not given to a shard again at which there was no device for one of its stages."""
BETTER_FOR = 30.0
"""Seconds for which another division over shards must have been better before it is taken."""


class Memory:
    """A planner that begins anew knows nothing of this and is only slower to act."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._last_served: dict[tuple[str, str], float] = {}
        self._failed: dict[tuple[DeviceId, str], float] = {}
        self._parts: dict[str, dict[str, float]] = {}
        self._better_since: dict[str, float] = {}
        self._avoided: dict[tuple[str, str], float] = {}
        self.memories: dict[tuple[str, str], float] = {}
        """Megabytes by (model key, device type)."""

    def note(self, now: float, view: ClusterView, costs: Costs) -> None:
        """Take in what the view shows."""
        serving = {
            (f"{name}@{costs.version(served.spec)}", shard)
            for name, served in view.serving.items()
            for shard, weight in served.shards.items()
            if weight > 0.0
        }
        placed = {(key.rpartition("/")[0], what.shard) for what in view.placement.values() for key in what.models}
        for pair in placed:
            self._last_served.setdefault(pair, now)
        self._last_served.update(dict.fromkeys(serving, now))
        self._last_served = {pair: at for pair, at in self._last_served.items() if pair in serving or pair in placed}
        failing = {
            ((node, number), key)
            for node, there in view.nodes.items()
            for number, device in enumerate(there.devices)
            for key in device.failed
        }
        for at in failing:
            since = self._failed.setdefault(at, now)
            if now >= since + self._settings.retry + TRIAL:
                self._failed[at] = now  # it was tried again, and failed again
        self._failed = {
            at: since
            for at, since in self._failed.items()
            if (at in failing or now < since + self._settings.retry) and not _ready(view, *at)
        }
        self._parts = {name: parts for name, parts in self._parts.items() if name in view.pipelines}
        self._better_since = {name: at for name, at in self._better_since.items() if name in view.pipelines}
        self._avoided = {pair: at for pair, at in self._avoided.items() if now < at + AVOIDED_FOR}

    def in_use(self, now: float, view: ClusterView, costs: Costs) -> set[tuple[str, str]]:
        """The (version, shard) whose models have to stay although nobody needs them: requests were sent to them a
        moment ago, or are still in flight."""
        serving = {
            (f"{name}@{costs.version(served.spec)}", shard)
            for name, served in view.serving.items()
            for shard, weight in served.shards.items()
            if weight > 0.0
        }
        return {
            pair
            for pair, at in self._last_served.items()
            if now < at + self._settings.settle or (pair not in serving and view.in_flight.get(pair, 0) > 0)
        }

    def blocked(self, now: float) -> dict[DeviceId, set[str]]:
        """The models that are not to be tried on a device."""
        found: dict[DeviceId, set[str]] = {}
        for (device, key), since in self._failed.items():
            if now < since + self._settings.retry:
                found.setdefault(device, set()).add(key)
        return found

    def avoid(self, now: float, name: str, shard: str) -> None:
        """There is no device for one of the pipeline's stages at this shard."""
        self._avoided[name, shard] = now

    def shards(self, name: str, shards: Sequence[str]) -> Sequence[str]:
        """Those of ``shards`` that a pipeline may be given to."""
        return [shard for shard in shards if (name, shard) not in self._avoided] or shards

    def parts(self, name: str) -> dict[str, float]:
        """How a pipeline is divided over shards."""
        return self._parts.get(name, {})

    def divide(self, now: float, name: str, parts: dict[str, float], urgent: bool) -> dict[str, float]:
        """Divide a pipeline like this, at once where that is ``urgent``, otherwise once it has been better for a while;
        how it is divided now."""
        present = self._parts.get(name)
        if present is None or urgent:
            self._parts[name] = parts
            self._better_since.pop(name, None)
        elif parts == present:
            self._better_since.pop(name, None)
        elif now >= self._better_since.setdefault(name, now) + BETTER_FOR:
            self._parts[name] = parts
            del self._better_since[name]
        return self._parts[name]


def _ready(view: ClusterView, device: DeviceId, key: str) -> bool:
    there = view.nodes.get(device[0])
    return there is not None and device[1] < len(there.devices) and key in there.devices[device[1]].ready
