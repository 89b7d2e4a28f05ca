"""A polling thread beside a control loop, as shards and agents run it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("laxity.cluster")


@contextmanager
def serving(
    name: str,
    run: Callable[[], None],
    end: Callable[[], None],
    ended: threading.Event,
    explained: type[BaseException] | tuple[()] = (),
) -> Iterator[None]:
    """Run ``run`` in a thread while the block runs; ``end`` asks it to come back, after the block.

    When it comes back by itself ``ended`` is set, so that the block can end; when it raised, so does this, as
    RuntimeError, and the log has where, but for what is ``explained`` by its text.
    """
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            run()
        except BaseException as error:
            if not isinstance(error, explained):
                log.error("the %s's thread failed", name, exc_info=True)
            failures.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=serve, name=name)
    thread.start()
    try:
        yield
    finally:
        end()
        thread.join()
    if failures:
        raise RuntimeError(f"the {name} ended: {failures[0]}") from failures[0]
