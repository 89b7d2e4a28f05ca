"""The hook that powers machines up and down: which commands are due, and their running."""

from __future__ import annotations

import logging
import shlex
import subprocess
import threading
from collections.abc import Mapping

import msgspec

log = logging.getLogger("laxity.coordinator")

FIRST_RETRY = 60.0
LONGEST_RETRY = 1800.0
"""A machine that did not do as it was told is told again after FIRST_RETRY seconds, doubled each time."""
TIMEOUT = 120.0
"""Seconds that one command may take."""
PLACEHOLDER = "{node}"


class ProviderError(ValueError):
    """A command template that cannot be run; the text says what is wrong with it."""


def parse_command(template: str) -> list[str]:
    """The words of a command template such as ``ipmitool -H {node}-bmc power on``; [] for ''."""
    if not template:
        return []
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise ProviderError(f"the command {template!r} cannot be read: {error}") from None
    if not any(PLACEHOLDER in word for word in words):
        raise ProviderError(f"the command {template!r} names no machine: write {PLACEHOLDER} where its name belongs")
    return words


class Order(msgspec.Struct, frozen=True):
    """Have a machine powered ``up`` (or down)."""

    node: str
    up: bool


class ProviderEngine:
    """Decides whom to tell what: a machine that should be there and is not, one that should rest and is there. It is
    told once, and again with growing pauses while it does not obey."""

    def __init__(self) -> None:
        self._told: dict[Order, tuple[float, float]] = {}
        """When each standing order is due again, and the pause after that."""

    def due(self, now: float, wanted: Mapping[str, bool], present: Mapping[str, bool]) -> list[Order]:
        """``wanted``: whether a node should be up; ``present``: whether it is there."""
        standing = {Order(node, up) for node, up in wanted.items() if present.get(node, False) != up}
        self._told = {order: when for order, when in self._told.items() if order in standing}
        due: list[Order] = []
        for order in sorted(standing, key=lambda order: order.node):
            again_at, pause = self._told.get(order, (now, FIRST_RETRY))
            if now >= again_at:
                due.append(order)
                self._told[order] = (now + pause, min(2.0 * pause, LONGEST_RETRY))
        return due


class Provider:
    """Runs the commands, each in a thread of its own (a machine's controller may take its time)."""

    def __init__(self, up: str, down: str) -> None:
        """Raises :class:`ProviderError`."""
        self._commands = {True: parse_command(up), False: parse_command(down)}
        self._engine = ProviderEngine()
        self._running: dict[str, threading.Thread] = {}
        self._lock = threading.Lock()

    def step(self, now: float, wanted: Mapping[str, bool], present: Mapping[str, bool]) -> None:
        """Have done what is due."""
        for order in self._engine.due(now, wanted, present):
            words = [word.replace(PLACEHOLDER, order.node) for word in self._commands[order.up]]
            with self._lock:
                if not words or order.node in self._running:
                    continue
                thread = threading.Thread(target=self._run, args=(order, words), name="laxity-provider", daemon=True)
                self._running[order.node] = thread
            thread.start()

    def wait(self) -> None:
        """Wait for the commands that run."""
        with self._lock:
            threads = list(self._running.values())
        for thread in threads:
            thread.join()

    def _run(self, order: Order, words: list[str]) -> None:
        what = f"power {'up' if order.up else 'down'} {order.node}"
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
            if done.returncode == 0:
                log.info("%s: done", what)
            else:
                said = (done.stderr or done.stdout).strip()[-500:]
                log.error("%s: %s ended with status %d: %s", what, shlex.join(words), done.returncode, said)
        except (OSError, subprocess.TimeoutExpired) as error:
            log.error("%s: %s failed: %s", what, shlex.join(words), error)
        finally:
            with self._lock:
                self._running.pop(order.node, None)
