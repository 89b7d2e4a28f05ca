"""The scheduling policies by name: what a spec's ``policy`` and ``--policy`` may say.

``NAME`` or ``NAME:parameter=value,...``. What each is made of is the scheduling engine's business
(``broker/engine/policy.py``).
"""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import Final

DEFAULT: Final = "laxity"

POLICIES: Final[dict[str, str]] = {
    "laxity": "proactive drop and adaptive order with deferred windows on one central queue (the default)",
    "naive": "arrival order, starts at once, never drops",
    "clipper++": "arrival order, starts at once, drops what has used up its stage's share of the SLO",
    "nexus": "deadline order, starts at once, early drop against the whole SLO",
    "nexus-split": "nexus with the SLO split over the stages",
    "symphony": "deferred windows with the SLO split over the stages",
    "shepherd": "largest feasible batch first; pre-emption in simulation only",
    "clockwork": "latest start first, batches of 1, 2, 4, 8 and 16, admission control",
    "pard": "proactive drop and adaptive order, batches collected while the GPU is busy",
    "pard-back": "pard looking at what is past and at hand only (L_sub = 0)",
    "pard-sf": "pard with downstream execution times only (L_sub = Σd)",
    "pard-oc": "pard's order with DAGOR-like overload control in place of the proactive drop",
    "pard-split": "pard with the SLO split over the stages",
    "pard-wcl": "pard with the SLO split by the stages' worst-case latencies at run time",
    "pard-lower": "pard with no downstream batch wait (w = 0)",
    "pard-upper": "pard with the longest downstream batch wait (w = Σd)",
    "pard-fcfs": "pard in arrival order",
    "pard-hbf": "pard with the highest budget first, always",
    "pard-lbf": "pard with the lowest budget first, always",
    "pard-instant": "pard changing its order without delayed transition",
}

PARAMETERS: Final[dict[str, tuple[float, float, float, str]]] = {
    "lambda": (0.1, 0.0, 1.0, "quantile of the downstream batch wait (pard)"),
    "history": (5.0, 0.5, 60.0, "seconds over which queueing delays are averaged (pard, laxity)"),
}
"""By name: (default, least, most, what for)."""


def parameters_of(policy: str) -> list[str]:
    """The names of a policy's parameters."""
    if policy.startswith("pard"):
        return list(PARAMETERS)
    return ["history"] if policy == "laxity" else []


class PolicyError(ValueError):
    """A policy that does not exist, or a parameter of it; the text says what there is."""


def parse_policy(text: str) -> tuple[str, dict[str, float]]:
    """('pard', {'lambda': 0.15}) of 'pard:lambda=0.15': those that are not given are tuned while it runs. Raises
    :class:`PolicyError`."""
    name, _, rest = text.partition(":")
    if name not in POLICIES:
        near = get_close_matches(name, POLICIES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(POLICIES)}"
        raise PolicyError(f"unknown policy {name!r}{hint}")
    values: dict[str, float] = {}
    has = parameters_of(name)
    for part in rest.split(",") if rest else []:
        key, _, value = part.partition("=")
        if key not in has:
            raise PolicyError(f"policy {name!r} has no parameter {key!r}; it has {', '.join(has) or 'none'}")
        _, least, most, _ = PARAMETERS[key]
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise PolicyError(f"{key} of policy {name!r} must be a number from {least:g} to {most:g}, not {value!r}")
        values[key] = number
    return name, values
