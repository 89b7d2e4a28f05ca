"""Which models are brought into which device's memory, and which make room: Clockwork's load choice (OSDI'20, 5.3).

A model's *demand* is the device time of what waits for it and of what is to come within a short horizon at its recent
rate; its *priority* is its demand less what the devices that hold it can give it meanwhile, and all that it missed
since it was last loaded, so that each has its turn. The model of the highest priority with a request that can still
make it, if it is loaded now, goes to the least loaded device that has it in its host's memory. One LOAD at a time is
under way for a device: the link is one, and what is asked for later is chosen better.

Room is made by models without demand (nothing waits for them, nothing runs, nothing came of late), the least recently
used first. One in demand goes only for a clearly higher priority (than what bringing it back takes, where its requests
can wait for that), and one that requests wait for only if that makes up for the load besides: two models that do not
fit together would else have each other loaded to and fro. One that runs gets no more batches then, and goes when those
that it has have ended.
"""

from typing import Final

from broker.engine.devices import Device, DeviceGroup
from broker.engine.fleet import Fleet
from broker.engine.ledger import Ledger
from broker.engine.residency import HELD, LOADING, MAX_BACK_OFF, UNLOADING, PagedModel
from broker.engine.stage import NEVER, Stage

HORIZON: Final = 0.1
"""Seconds to come that count as demand, besides those of the load itself."""
RECENT: Final = 1.0
"""Seconds after its last batch from which on a model for which nothing waits is without demand."""
CLEARLY: Final = 2.0
"""How many times the demand of those that make room a priority has to be."""
LOOK: Final = 0.005
"""Seconds between two looks for room while there was none."""
WINDOW: Final = 1.0
"""Seconds within which a device is to begin what it is told: batches that run may be in the way."""
GRACE: Final = 5.0
"""Seconds by which an answer may come later than it should before it is no longer waited for."""
LEAST_COST: Final = 1e-5
"""Seconds that an element takes at least: where nothing is known of a model, it still is in demand."""


class Page:
    """A LOAD (``load``) or an UNLOAD of a model, by its key, for a device, to be begun by ``latest``; ``expected`` is
    what a LOAD should take, in seconds."""

    def __init__(self, action: int, held: PagedModel, load: bool, latest: float) -> None:
        self.action = action
        self.held = held
        self.device = held.device
        self.model = held.key
        self.load = load
        self.latest = latest
        self.expected = held.load_seconds if load else 0.0
        self.overdue_at = latest + self.expected + GRACE


class _Order:
    """A model to be loaded once those that make room have ended what they run."""

    def __init__(self, model: PagedModel, victims: list[PagedModel]) -> None:
        self.model = model
        self.victims = victims


class _Wish:
    """A stage that a device should be found for."""

    def __init__(self, stage: Stage, priority: float) -> None:
        self.stage = stage
        self.priority = priority


class Paging:
    """Keeps what is wanted and what is under way; what devices are to be told is in ``pages`` until it is taken."""

    def __init__(self, ledger: Ledger, fleet: Fleet, first_action: int) -> None:
        self.pages: list[Page] = []
        self.under_way: dict[int, Page] = {}
        """Told, or to be told, and not answered."""
        self.next_overdue = NEVER
        """When the first of them is no longer waited for."""
        self.next_look = NEVER
        """When to look for room again if nothing happens until then."""
        self._ledger = ledger
        self._fleet = fleet
        self._number = first_action
        self._wanted: dict[str, Stage] = {}
        """The stages that wait for a device to have their model, and those that wait for another one."""
        self._orders: list[_Order] = []
        """Decided, and not told yet."""
        self._news = False

    def want(self, now: float, stage: Stage) -> None:
        """Requests wait here, and the model could be brought to a device (another device)."""
        stage = stage.whole
        if stage.key not in self._wanted:
            self._wanted[stage.key] = stage
            if not stage.groups:
                self._news = True
            elif self.next_look > now + LOOK:
                self.next_look = now + LOOK

    def miss(self, stage: Stage) -> None:
        """A request that waited here ends unserved."""
        if stage.cold():
            stage.whole.missed += _cost(stage)

    def look(self) -> None:
        """Devices came or went, or models to them."""
        self._news = True

    def forget(self, stage: Stage) -> None:
        """A stage is served no more."""
        self._wanted.pop(stage.key, None)
        if not self._wanted:
            self.next_look = NEVER

    def forget_device(self, device: Device) -> None:
        """A device is gone: it answers nothing any more."""
        self._orders = [order for order in self._orders if order.model.device is not device]
        for action in [action for action, page in self.under_way.items() if page.device is device]:
            del self.under_way[action]

    def due(self, now: float) -> bool:
        """Whether :meth:`choose` has something to do."""
        return bool(self._wanted) and (self._news or now >= self.next_look)

    # ---- what happened ---------------------------------------------------------------------

    def give_up(self, now: float) -> None:
        """Wait no longer for answers that should have come long since."""
        for page in [page for page in self.under_way.values() if page.overdue_at <= now]:
            what = "LOAD" if page.load else "UNLOAD"
            self.acted(now, page.device.agent, page.action, "too_late", 0.0, f"the {what} was not answered")
        self.next_overdue = min([page.overdue_at for page in self.under_way.values()], default=NEVER)

    def acted(self, now: float, agent: str, action: int, code: str, seconds: float, detail: str) -> bool:
        """A LOAD or UNLOAD ended; False for one that is not this agent's."""
        page = self.under_way.get(action)
        if page is None or page.device.agent != agent:
            return False
        del self.under_way[action]
        model = page.held
        memory = page.device.memory
        if memory is None:
            return True
        self._news = True
        if not any(other.device is page.device for other in self.under_way.values()):
            memory.paged_until = now
        if memory.loading is model:
            memory.loading = None
        if not _known(model):
            return True  # taken off the device meanwhile
        if not page.load:
            if code == "ok" or code == "not_loaded" or code == "unknown_model":
                memory.leave(model, HELD)
                self.touch(model)  # who came meanwhile wants it back
            elif model.state == UNLOADING:
                self._fleet.gain(now, model)
                model.failed(now)
        elif code == "ok":
            model.took(now, seconds)
            self._fleet.gain(now, model)
            if model.stage is not None:
                model.stage.missed = 0.0
                for lane in model.stage.lanes:
                    lane.trouble = ""
                    lane.note_cold()
        else:
            memory.leave(model, HELD)
            model.failed(now)
            if model.stage is not None:
                for lane in model.stage.lanes:
                    lane.trouble = detail or code
            self.touch(model)
        return True

    def touch(self, model: PagedModel) -> None:
        """Have its stage looked at again: when it can be there is another moment now."""
        if model.stage is not None:
            for lane in model.stage.lanes:
                self._ledger.touch(lane)

    # ---- the choice ------------------------------------------------------------------------

    def choose(self, now: float, way: float) -> None:
        """Decide what is loaded now. ``way`` is how long a message takes to a device and its answer back."""
        self._news = False
        self.next_look = NEVER
        free = 0
        for device in self._fleet.devices.values():
            if device.memory is not None and device.memory.loading is None:
                free += 1
        if not free:
            return  # an answer will come
        for wish in self._wishes(now, way):
            for model in self._places(now, wish.stage, way):
                victims = self._victims(now, model, wish.priority, way)
                if victims is not None:
                    self._page(now, model, victims, way)
                    free -= 1
                    break
            if not free:
                return
        if self._wanted:
            self.next_look = now + LOOK

    def _wishes(self, now: float, way: float) -> list[_Wish]:
        """What is wanted, the highest priority first."""
        wishes: list[_Wish] = []
        done: list[Stage] = []
        for stage in self._wanted.values():
            model = _fastest(stage)
            if stage.all_idle() or model is None:
                done.append(stage)
                continue
            horizon = HORIZON + model.load_seconds
            priority = _demand(stage, horizon) + stage.missed - _given(stage, horizon)
            if priority <= 0.0:
                done.append(stage)
            elif makes_it(stage, model, now + way):
                wishes.append(_Wish(stage, priority))
        for stage in done:
            del self._wanted[stage.key]
        wishes.sort(key=_by_priority)
        return wishes

    def _places(self, now: float, stage: Stage, way: float) -> list[PagedModel]:
        """Where its model could be loaded now, on the least loaded device first."""
        places: list[tuple[float, int, PagedModel]] = []
        for model in stage.paged:
            device = model.device
            memory = device.memory
            if model.state != HELD or model.retry_at > now or not device.has_pulled:
                continue
            if memory is None or memory.loading is not None or not makes_it(stage, model, now + way):
                continue
            load = _ends(now, device) - now
            if device.group is not None:
                load += device.group.demand
            places.append((load, device.index, model))
        places.sort(key=_by_load)
        return [model for _, _, model in places]

    def _victims(self, now: float, model: PagedModel, priority: float, way: float) -> list[PagedModel] | None:
        """What has to go so that there is room for a model of this priority; None where it is not worth that."""
        memory = model.device.memory
        assert memory is not None
        if model.memory_mb > memory.budget:
            model.retry_at = now + MAX_BACK_OFF
            if model.stage is not None:
                for lane in model.stage.lanes:
                    lane.trouble = f"it takes {model.memory_mb:g} of {memory.budget:g} MB"
            self.touch(model)
            return None
        missing = model.memory_mb - memory.room()
        victims: list[PagedModel] = []
        if missing <= 0.0:
            return victims
        others: list[PagedModel] = []
        for other in memory.resident.values():
            if _must_stay(now, other):
                continue
            if not _in_demand(now, other):
                victims.append(other)
                missing -= other.memory_mb
                if missing <= 0.0:
                    return victims
            else:
                others.append(other)
        horizon = HORIZON + model.load_seconds
        lost = 0.0
        load = 0.0
        wanted = model.stage
        for other in others:
            runs = _runs(other)
            if runs and (wanted is None or not makes_it(wanted, model, _ends(now, model.device) + way)):
                continue
            stage = other.stage
            value = _loss(stage, model, other, horizon) if stage is not None else 0.0
            cost = model.load_seconds if runs or (stage is not None and not stage.all_idle()) else load
            if CLEARLY * (lost + value) + cost <= priority:
                lost += value
                load = cost
                victims.append(other)
                missing -= other.memory_mb
                if missing <= 0.0:
                    return victims
        return None

    def _page(self, now: float, model: PagedModel, victims: list[PagedModel], way: float) -> None:
        memory = model.device.memory
        assert memory is not None
        begin = now
        for victim in victims:
            self._fleet.lose(victim, UNLOADING)
            if _runs(victim):
                begin = _ends(now, model.device)
        memory.load(model, begin + way + model.load_seconds)
        self._orders.append(_Order(model, victims))
        self.tell(now)
        self.touch(model)

    def tell(self, now: float) -> None:
        """Tell devices what nothing stands in the way of any more."""
        if not self._orders:
            return
        waiting: list[_Order] = []
        for order in self._orders:
            model = order.model
            if not _known(model):
                # It was taken off its device: the others stay.
                if model.device.memory is not None and model.device.memory.loading is model:
                    model.device.memory.loading = None
                for victim in order.victims:
                    if _known(victim) and victim.state == UNLOADING:
                        self._fleet.gain(now, victim)
            elif any(_runs(victim) for victim in order.victims):
                waiting.append(order)
            else:
                for victim in order.victims:
                    if _known(victim) and victim.state == UNLOADING:
                        self._tell(victim, False, now + WINDOW)
                self._tell(model, True, now + WINDOW)
        self._orders = waiting

    def _tell(self, model: PagedModel, load: bool, latest: float) -> None:
        page = Page(self._number, model, load, latest)
        self._number += 1
        self.under_way[page.action] = page
        self.next_overdue = min(self.next_overdue, page.overdue_at)
        if model.device.memory is not None:
            model.device.memory.paged_until = NEVER
        self.pages.append(page)


def makes_it(stage: Stage, model: PagedModel, now: float) -> bool:
    """Whether some request that waits could still be in time if the model were loaded at ``now``."""
    if stage.policy.runs_late:
        return True
    ready = now + model.load_seconds
    for lane in stage.lanes:
        table = model.table.lane(lane.key, lane.part)
        ends = ready + table.input(1) + table.upper(1) + lane.remaining
        for queue in (lane.queue, lane.behind):
            if len(queue) and (queue.highest().due >= ends or queue.lowest().settled()):
                return True
        for batch in lane.alone:
            for task in batch:
                if task.request.deadline >= ready:
                    return True
    return False


def _fastest(stage: Stage) -> PagedModel | None:
    """Of the devices that could load its model the one that takes least."""
    fastest: PagedModel | None = None
    for model in stage.paged:
        if model.state == HELD and (fastest is None or model.load_seconds < fastest.load_seconds):
            fastest = model
    return fastest


def _cost(stage: Stage) -> float:
    """Device seconds an element."""
    table = stage.table
    cost = table.busy(stage.target) / stage.target if table is not None else 0.0
    return cost if cost > LEAST_COST else LEAST_COST


def _demand(stage: Stage, horizon: float) -> float:
    """Device seconds of what waits and of what is to come within ``horizon``."""
    demand = 0.0
    for lane in stage.lanes:
        demand += (lane.waiting() + lane.rate * horizon) * _cost(lane)
    return demand


def _loss(stage: Stage, wanted: PagedModel, victim: PagedModel, horizon: float) -> float:
    """Device seconds that its ``stage`` loses if a victim makes room for what is wanted: its demand; or what it takes
    to bring it back, where its requests can wait for that as well."""
    demand = _demand(stage, horizon) / (len(stage.groups) or 1)
    back = victim.load_seconds
    if demand > back and wanted.load_seconds + back + victim.table.upper(1) + stage.remaining < stage.slo:
        return back
    return demand


def _given(stage: Stage, horizon: float) -> float:
    """Device seconds within ``horizon`` that the devices which have its model, or will soon, can give it: what others
    leave, at least in proportion to its part of their work."""
    given = 0.0
    own = 0.0
    for lane in stage.lanes:
        own += lane.arrived * _cost(lane) / lane.devices if lane.devices else 0.0
    for group in stage.groups:
        given += _share(group, own * len(group.members)) * horizon
    for model in stage.paged:
        if model.state == LOADING and model.device.group is not None:
            given += _share(model.device.group, own) * horizon
    return given


def _share(group: DeviceGroup, own: float) -> float:
    """Device seconds a second."""
    devices = float(len(group.members))
    spare = devices - (group.demand - own)
    part = devices * own / group.demand if group.demand > own else 0.0
    return spare if spare > part else part


def _known(model: PagedModel) -> bool:
    """Whether its device still reports it."""
    memory = model.device.memory
    return memory is not None and memory.models.get(model.key) is model


def _must_stay(now: float, model: PagedModel) -> bool:
    """Whether it cannot make room: it would not go, a moment ago, or a batch is being collected for it."""
    collects_for = model.device.collects_for
    return model.retry_at > now or (collects_for is not None and collects_for.whole is model.stage)


def _runs(model: PagedModel) -> bool:
    """Whether its device has a batch of it."""
    return any(batch.stage.model == model.key for batch in model.device.batches.values())


def _ends(now: float, device: Device) -> float:
    """When what a device has been granted should have ended."""
    return device.busy_until if device.busy_until > now else now


def _in_demand(now: float, model: PagedModel) -> bool:
    stage = model.stage
    return _runs(model) or (stage is not None and (not stage.all_idle() or model.used_at > now - RECENT))


def _by_priority(wish: _Wish) -> float:
    return -wish.priority


def _by_load(place: tuple[float, int, PagedModel]) -> tuple[float, int]:
    return place[0], place[1]
