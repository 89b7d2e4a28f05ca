"""The devices of all agents, in groups that do as well as one another, and the stages they serve.

A device that has some of its models in its host's memory only (residency.py) is a group of its own. It gains and loses
models one by one, without looking at all the others.
"""

from typing import Final

from broker.engine.devices import Device, DeviceGroup
from broker.engine.pending import Pending
from broker.engine.predictor import LatencyTable
from broker.engine.residency import HELD, RESIDENT, PagedModel, Residency
from broker.engine.stage import NEVER, Stage

MOST_BATCHES: Final = 3
"""What a device has at most: one that runs, one that waits, and one whose outputs are on their way back."""


class HeldModel:
    """A model that a device holds, as its agent reports it: in the device's memory (``resident``), where it takes
    ``memory_mb``, or in its host's, from where it can be loaded in ``load_seconds``."""

    def __init__(
        self,
        key: str,
        variant: str,
        share: int,
        profile: list[tuple[int, float]],
        resident: bool = True,
        memory_mb: float = 0.0,
        load_seconds: float = 0.0,
    ) -> None:
        self.key = key
        self.variant = variant
        self.share = share
        self.profile = profile
        self.resident = resident
        self.memory_mb = memory_mb
        self.load_seconds = load_seconds


class Fleet:
    """Who is there, who has pulled, and who serves which of the ``stages`` (by model key)."""

    def __init__(self, stages: dict[str, Stage]) -> None:
        self.devices: dict[tuple[str, int], Device] = {}
        self.tables: dict[tuple[str, str, int, str], LatencyTable] = {}
        """By (model, variant, share, device type)."""
        self.offered: dict[int, DeviceGroup] = {}
        """Groups with a new offer since they were last looked at, by identity."""
        self.collected: list[Device] = []
        """Devices that have pulled since, for which a batch was collected."""
        self.left_out: list[Device] = []
        """Devices that have pulled and get nothing yet, because they refused what they got."""
        self.stale = False
        """Whether pipelines or devices changed since :meth:`regroup`."""
        self.turns = 0
        """Counts how often who is served may have changed."""
        self.turned: list[Stage] = []
        """Stages that a device came to, or left, since they were last looked at."""
        self.replans = False
        """Whether a stage is served now that was not."""
        self._stages = stages
        self._groups: dict[tuple[bool, str, str], DeviceGroup] = {}
        self._next_index = 0

    def groups(self) -> list[DeviceGroup]:
        """Those that have devices."""
        return list(self._groups.values())

    def report(self, agent: str, number: int, type: str, models: list[HeldModel], memory_mb: float = 0.0) -> None:
        """A device, new or with another set of models than before. ``memory_mb`` is what they may take of its memory
        (0: there is room for all)."""
        device = self.devices.get((agent, number))
        if device is not None and device.memory is not None and memory_mb > 0.0 and device.type == type:
            self._update(device, device.memory, models, memory_mb)
            return
        if device is None:
            device = Device(self._next_index, agent, number, type)
            self._next_index += 1
            self.devices[(agent, number)] = device
        pages = memory_mb > 0.0 and not all(model.resident for model in models)
        pulled = device.pulled
        if device.group is not None:
            device.group.remove(device)
        device.type = type
        device.memory = Residency(memory_mb) if pages else None
        names: list[str] = []
        tables: dict[str, LatencyTable] = {}
        for model in sorted(models, key=_model_key):
            table = self._table(type, model)
            if device.memory is not None:
                held = self._hold(device, device.memory, model, table)
                if not model.resident:
                    continue
                device.memory.enter(0.0, held)
            elif not model.resident:
                continue  # it cannot be told to load any
            else:
                names.append(f"{model.key}|{model.variant}|{model.share}")
            tables[model.key] = table
        key = (True, f"{agent}|{number}", "") if pages else (False, type, ",".join(names))
        group = self._groups.get(key)
        if group is None or pages:
            group = DeviceGroup(type, tables)
            self._groups[key] = group
        group.add(device)
        self.stale = True
        if pulled:
            self._offer(device)

    def _table(self, type: str, model: HeldModel) -> LatencyTable:
        slot = (model.key, model.variant, model.share, type)
        table = self.tables.get(slot)
        if table is None:
            # As long as the profile; extended to the largest batch of the stage that it comes to serve.
            largest = max([batch for batch, _ in model.profile], default=1)
            table = LatencyTable(largest, model.profile)
            self.tables[slot] = table
        return table

    # ---- devices that page their models --------------------------------------------------------

    def _update(self, device: Device, memory: Residency, models: list[HeldModel], memory_mb: float) -> None:
        """What changed of a device that pages its models. What was told to load or unload is as it was until it has
        been answered."""
        memory.budget = memory_mb
        present: set[str] = set()
        for model in models:
            present.add(model.key)
            held = memory.models.get(model.key)
            if held is None:
                held = self._hold(device, memory, model, self._table(device.type, model))
                stage = self._stages.get(model.key)
                if stage is not None:
                    self._attach(stage, held)
            elif held.memory_mb != model.memory_mb:
                memory.resize(held, model.memory_mb)
            if held.state == HELD and model.resident:
                self.gain(0.0, held)
            elif held.state == RESIDENT and not model.resident:
                self.lose(held, HELD)
        for held in [held for key, held in memory.models.items() if key not in present]:
            self.lose(held, HELD)
            del memory.models[held.key]
            stage = held.stage
            if stage is not None and held in stage.paged:
                stage.paged.remove(held)
                self._count(stage)

    def _hold(self, device: Device, memory: Residency, model: HeldModel, table: LatencyTable) -> PagedModel:
        held = PagedModel(model.key, table, device, model.memory_mb, model.load_seconds)
        memory.models[model.key] = held
        return held

    def _attach(self, stage: Stage, held: PagedModel) -> None:
        held.table.extend(stage.max_batch, stage.scale)
        held.stage = stage
        stage.paged.append(held)
        for lane in stage.lanes:
            if lane.table is None:
                lane.table = held.table.lane(lane.key, lane.part)
        self._count(stage)

    def _count(self, stage: Stage) -> None:
        """Of a stage that no device has in its memory, but some in its host's, one counts: the first that it gets."""
        devices = 0
        for group in stage.groups:
            devices += len(group.members)
        if not devices and stage.paged:
            devices = 1
        if (devices > 0) != (stage.devices > 0):
            self.turns += 1
            self.replans = True
        for lane in stage.lanes:
            lane.devices = devices
            self.turned.append(lane)

    def gain(self, now: float, held: PagedModel) -> None:
        """A device has a model in its memory now."""
        device = held.device
        group = device.group
        assert group is not None
        assert device.memory is not None
        device.memory.enter(now, held)
        group.tables[held.key] = held.table
        stage = held.stage
        if stage is not None and group not in stage.groups:
            stage.groups.append(group)
            for lane in stage.lanes:
                group.tables[lane.key] = held.table.lane(lane.key, lane.part)
                if lane.pending:
                    group.pending.add(lane)
            self._count(stage)

    def lose(self, held: PagedModel, state: int) -> None:
        """A device has a model no more, or is told to unload it (``state``, as in residency.py)."""
        device = held.device
        group = device.group
        assert group is not None
        assert device.memory is not None
        device.memory.leave(held, state)
        group.tables.pop(held.key, None)
        stage = held.stage
        if stage is not None and group in stage.groups:
            for lane in stage.lanes:
                group.tables.pop(lane.key, None)
                group.pending.discard(lane)
            stage.groups.remove(group)
            self._count(stage)

    # ---- pulls -----------------------------------------------------------------------------------

    def pull(self, agent: str, number: int, free_at: float) -> bool:
        """A device would take a batch and can start it at ``free_at``; False for an unknown one."""
        device = self.devices.get((agent, number))
        if device is None:
            return False
        device.free_at = free_at
        device.has_pulled = True
        if device.out_until > 0.0:
            self._leave_out(device)
        else:
            self._take_pull(device)
        return True

    def _take_pull(self, device: Device) -> None:
        if len(device.batches) < MOST_BATCHES:
            if device.collects_for is not None:
                self.collected.append(device)
            self._offer(device)

    def refused(self, now: float, device: Device) -> None:
        """A device refused a batch; after several in a row it is left out for a while."""
        device.refuse(now)
        if device.out_until > 0.0 and device.pulled:
            device.pulled = False
            self._leave_out(device)

    def _leave_out(self, device: Device) -> None:
        if device not in self.left_out:
            self.left_out.append(device)

    def let_in(self, now: float) -> None:
        """Take the pulls of devices that were left out for long enough."""
        waiting = self.left_out
        self.left_out = []
        for device in waiting:
            if device.out_until > now:
                self.left_out.append(device)
            elif device.group is not None:
                device.out_until = 0.0
                self._take_pull(device)

    def next_let_in(self) -> float:
        """When :meth:`let_in` has something to do."""
        return min([device.out_until for device in self.left_out], default=NEVER)

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

    def take_turned(self) -> list[Stage]:
        """Those of ``turned``, and begin anew."""
        turned = self.turned
        self.turned = []
        return turned

    def regroup(self) -> None:
        """Bring the stages' groups in line with who is there (rare)."""
        stages = self._stages
        self.stale = False
        self.turns += 1
        self._groups = {key: group for key, group in self._groups.items() if group.members}
        for stage in stages.values():
            stage.groups = []
            stage.paged = []
            stage.devices = 0
            for lane in stage.lanes:
                lane.table = None
                lane.pending = False
        used: set[int] = set()
        for group in self._groups.values():
            group.pending = Pending()
            for model, table in list(group.tables.items()):
                used.add(id(table))
                served = stages.get(model)
                if served is not None:
                    table.extend(served.max_batch, served.scale)
                    served.groups.append(group)
                    served.devices += len(group.members)
                    for lane in served.lanes:
                        group.tables[lane.key] = table.lane(lane.key, lane.part)
        for device in self.devices.values():
            if device.memory is not None:
                for held in device.memory.models.values():
                    used.add(id(held.table))
                    held.stage = stages.get(held.key)
                    if held.stage is not None:
                        held.table.extend(held.stage.max_batch, held.stage.scale)
                        held.stage.paged.append(held)
                        if not held.stage.devices:
                            held.stage.devices = 1
        for stage in stages.values():
            for lane in stage.lanes:
                lane.groups = stage.groups
                lane.paged = stage.paged
                lane.devices = stage.devices
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
