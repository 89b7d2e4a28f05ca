"""What signals tell a service: SIGTERM and SIGINT to end, SIGHUP to read its configuration again."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Collection, Mapping
from types import FrameType
from typing import Any, Generic, TypeVar

import click

from cluster.control import Control
from cluster.logs import configure_logs

log = logging.getLogger("laxity.cluster")

C = TypeVar("C")
LOGS = frozenset({"log_format", "log_level"})
_ARGUMENTS = "laxity.arguments"


class ServiceCommand(click.Command):
    """A command that can read its options again: flags, environment and file, in the order of precedence as ever."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        context.meta[_ARGUMENTS] = list(args)
        return super().parse_args(context, args)


def read_again(context: click.Context) -> dict[str, Any]:
    """The options' values as they are by now. Raises :class:`click.ClickException`."""
    arguments = list(context.meta[_ARGUMENTS])
    with context.command.make_context(context.info_name, arguments, parent=context.parent) as fresh:
        return dict(fresh.params)


class Reread(Generic[C]):
    """Tells what the configuration is by now. ``make`` makes it of ``settings``, of which those in ``live`` may
    change while the service runs. What else is another in the file is told, once for each time that it is read."""

    def __init__(
        self,
        context: click.Context,
        make: Callable[[Mapping[str, Any]], C],
        settings: Mapping[str, Any],
        live: Collection[str],
        process: tuple[str, str],
    ) -> None:
        self._context = context
        self._make = make
        self._settings = dict(settings)
        self._live = live
        self._process = process
        self._running = dict(context.params)

    def __call__(self) -> C | None:
        try:
            found = read_again(self._context)
        except click.ClickException as error:
            log.error("the configuration is not taken on, what runs goes on: %s", error.format_message())
            return None
        changed = sorted(name for name, value in found.items() if self._running.get(name) != value)
        taken = [name for name in changed if name in self._live or name in LOGS]
        for name in changed:
            if name not in taken:
                log.warning("%s: changed in the file; takes effect after a restart", name)
        before, self._running = self._running, {**self._running, **{name: found[name] for name in taken}}
        if LOGS & set(taken):
            configure_logs(self._running["log_format"], self._running["log_level"], *self._process)
        for name in taken:
            log.info("%s: now %s (was %s)", name, found[name], before[name])
        if not changed:
            log.info("the configuration was read again: nothing in it has changed")
        settings = {name: self._running[name] for name in self._settings}
        if settings == self._settings:
            return None
        self._settings = settings
        return self._make(settings)


def take_control(reread: Callable[[], C | None]) -> Control[C]:
    """Replaces the handlers of SIGTERM, SIGINT and SIGHUP. A second signal to end ends at once; a third one kills."""
    control = Control(reread)
    terminal = _has_terminal()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    ends = 0

    def end(number: int, _frame: FrameType | None) -> None:
        nonlocal ends
        ends += 1
        if ends > 1:
            signal.signal(number, signal.SIG_DFL)
        if ends <= 2:
            os.write(writing, b"+")

    def hang_up(number: int, frame: FrameType | None) -> None:
        if terminal and not _has_terminal():
            end(number, frame)  # it was closed: nobody is left who could end it
        else:
            control.ask_reload()

    def take() -> None:
        while os.read(reading, 1):
            control.ask_stop()

    # A handler may come while its thread holds the lock of the very event that it would set: another thread sets it.
    threading.Thread(target=take, name="signals", daemon=True).start()
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGHUP, hang_up)
    return control


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
