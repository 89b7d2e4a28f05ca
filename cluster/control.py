"""What a person tells a process that runs: to end, to end at once, to read its configuration again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger("laxity.cluster")

C = TypeVar("C")


class Control(Generic[C]):
    """``reread`` says what the configuration is by now, as far as it may change while the process runs; None where
    nothing of that did. Everything but :meth:`changed` may be called by other threads; by signal handlers only
    :meth:`ask_reload`, which takes no lock."""

    def __init__(self, reread: Callable[[], C | None] = lambda: None) -> None:
        self.stop = threading.Event()
        """Set once the process is to end in good order."""
        self.at_once = threading.Event()
        """Set once that is not to take any longer."""
        self.reloads = 0
        """How often the configuration was to be read again; what else lies in files, too."""
        self._reread = reread
        self._reload = False

    def ask_stop(self) -> None:
        """End in good order; asked for again: at once."""
        if self.stop.is_set():
            self.at_once.set()
        self.stop.set()

    def ask_reload(self) -> None:
        """Read the configuration again."""
        self._reload = True

    def changed(self) -> C | None:
        """The configuration, if somebody had it read again and it is another one. In the process's own loop."""
        if not self._reload:
            return None
        self._reload = False
        self.reloads += 1
        return self._reread()
