"""The garbage collector of a worker, kept away from what stays."""

from __future__ import annotations

import gc


def settle(thorough: bool = False) -> None:
    """Collect, and take all that is there now for permanent: otherwise the collector walks through everything that
    torch and the models consist of now and then, for tenths of a second, and whatever is to execute waits for it.

    ``thorough``: look through what was taken for permanent before as well.
    """
    if thorough:
        gc.unfreeze()
    gc.collect()
    gc.freeze()
