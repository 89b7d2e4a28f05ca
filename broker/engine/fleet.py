"""The devices of all agents, in groups that do as well as one another, and the stages they serve."""

from broker.engine.devices import Device, DeviceGroup
from broker.engine.pending import Pending
from broker.engine.predictor import LatencyTable
from broker.engine.stage import NEVER, Stage


class HeldModel:
    """A model that a device holds, as its agent reports it."""

    def __init__(self, key: str, variant: str, share: int, profile: list[tuple[int, float]]) -> None:
        self.key = key
        self.variant = variant
        self.share = share
        self.profile = profile


class Fleet:
    """Who is there, who has pulled, and who serves which stage."""

    def __init__(self) -> None:
        self.devices: dict[tuple[str, int], Device] = {}
        self.tables: dict[tuple[str, str, int, str], LatencyTable] = {}
        """By (model, variant, share, device type)."""
        self.offered: dict[int, DeviceGroup] = {}
        """Groups with a new offer since they were last looked at, by identity."""
        self.collected: list[Device] = []
        """Devices that have pulled since, for which a batch was collected."""
        self.stale = False
        """Whether pipelines or devices changed since :meth:`regroup`."""
        self.regrouped = 0
        """How often :meth:`regroup` was called."""
        self._groups: dict[tuple[str, str], DeviceGroup] = {}
        self._next_index = 0

    def groups(self) -> list[DeviceGroup]:
        """Those that have devices."""
        return list(self._groups.values())

    def report(self, agent: str, number: int, type: str, models: list[HeldModel]) -> None:
        """A device, new or with another set of models than before."""
        device = self.devices.get((agent, number))
        if device is None:
            device = Device(self._next_index, agent, number, type)
            self._next_index += 1
            self.devices[(agent, number)] = device
        pulled = device.pulled
        if device.group is not None:
            device.group.remove(device)
        device.type = type
        names: list[str] = []
        tables: dict[str, LatencyTable] = {}
        for model in sorted(models, key=_model_key):
            names.append(f"{model.key}|{model.variant}|{model.share}")
            slot = (model.key, model.variant, model.share, type)
            table = self.tables.get(slot)
            if table is None:
                # As long as the profile; regroup() extends it to the stage's largest batch.
                largest = max([batch for batch, _ in model.profile], default=1)
                table = LatencyTable(largest, model.profile)
                self.tables[slot] = table
            tables[model.key] = table
        key = (type, ",".join(names))
        group = self._groups.get(key)
        if group is None:
            group = DeviceGroup(type, tables)
            self._groups[key] = group
        group.add(device)
        self.stale = True
        if pulled:
            self._offer(device)

    def pull(self, agent: str, number: int, free_at: float) -> bool:
        """A device would take a batch and can start it at ``free_at``; False for an unknown one."""
        device = self.devices.get((agent, number))
        if device is None:
            return False
        device.free_at = free_at
        if len(device.batches) < 2:
            if device.collects_for is not None:
                self.collected.append(device)
            self._offer(device)
        return True

    def _offer(self, device: Device) -> None:
        group = device.group
        assert group is not None
        group.offer(device)
        self.offer_again(device)

    def offer_again(self, device: Device) -> None:
        """Have the stages that wait for a device like this one looked at."""
        group = device.group
        assert group is not None
        self.offered[id(group)] = group

    def remove(self, agent: str) -> list[Device]:
        """An agent is gone; the devices that it had."""
        gone: list[Device] = []
        for slot in [slot for slot in self.devices if slot[0] == agent]:
            device = self.devices.pop(slot)
            if device.group is not None:
                device.group.remove(device)
            gone.append(device)
        self.stale = True
        return gone

    def withdraw(self, agent: str, number: int) -> None:
        """A device works here no more."""
        device = self.devices.pop((agent, number))
        if device.group is not None:
            device.group.remove(device)
        self.stale = True

    def take_collected(self) -> list[Device]:
        """Those of ``collected``, and begin anew."""
        collected = self.collected
        self.collected = []
        return collected

    def regroup(self, stages: dict[str, Stage]) -> None:
        """Bring the stages' groups in line with who is there (rare)."""
        self.stale = False
        self.regrouped += 1
        self._groups = {key: group for key, group in self._groups.items() if group.members}
        for stage in stages.values():
            stage.groups = []
            stage.devices = 0
            stage.table = None
            stage.pending = False
        used: set[int] = set()
        for group in self._groups.values():
            group.pending = Pending()
            for model, table in group.tables.items():
                used.add(id(table))
                served = stages.get(model)
                if served is not None:
                    table.extend(served.max_batch)
                    served.groups.append(group)
                    served.devices += len(group.members)
        self.tables = {slot: table for slot, table in self.tables.items() if id(table) in used or slot[0] in stages}


def best_device(stage: Stage, now: float) -> Device | None:
    """The device that a stage's batch goes to: of those free at ``now`` the lowest-numbered whose type can still meet
    the most urgent request, so that load consolidates on low numbers and the rest can be released; else the one that
    comes free first."""
    groups = stage.groups
    if len(groups) == 1:
        return groups[0].best(now)
    best: Device | None = None
    best_meets = False
    due = NEVER
    for queue in (stage.queue, stage.behind):
        if len(queue) and queue.lowest().due < due:
            due = queue.lowest().due
    for group in groups:
        device = group.best(now)
        if device is None:
            continue
        start = device.free_at if device.free_at > now else now
        meets = start + group.tables[stage.key].upper(1) + stage.remaining <= due
        if best is None or (meets and not best_meets):
            better = True
        elif meets != best_meets:
            better = False
        elif device.free_at > now or best.free_at > now:
            better = device.free_at < best.free_at
        else:
            better = device.index < best.index
        if better:
            best = device
            best_meets = meets
    return best


def _model_key(model: HeldModel) -> str:
    return model.key
