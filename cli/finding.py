"""What ``laxity doctor`` finds."""

from __future__ import annotations

from typing import Literal

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """``ok`` is good, ``note`` needs nothing, ``warning`` may matter, ``error`` keeps Laxity from working."""

    check: str
    state: Literal["ok", "note", "warning", "error"]
    found: str
    advice: str = ""
