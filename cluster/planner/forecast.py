"""One rate's future: a forecast with a margin for bursts, and for how long what is there is to be kept.

The forecast is an autoregression that goes on learning (recursive least squares): it follows noise with a mean, ramps
with a trend, and a day's ups and downs with their turning points. The margin is what the forecasts of the last minutes
would have needed for so little to be missed as is asked for. Of several lengths of patience the longest is taken that
costs next to nothing against the cheapest: noise is outwaited, a smooth cycle is followed.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

from cluster.planner.settings import Settings

ORDER = 4
"""How many past seconds the autoregression looks at."""
FORGETTING = 0.99
"""What a second counts for each second that has passed since."""
REMEMBERED = 32
"""Seconds over which the mean is taken."""
STEEPEST = 2.0
"""A forecast is at most so many times the highest rate of the last :data:`ORDER` seconds."""
STARTLING = 1.5
"""A rate of so many times what was provided for is followed at once; a smaller surprise when it has lasted 2 s."""
ENOUGH = 12
"""Errors that have to be known before the margin is taken from them."""
FIRST_MARGIN = 0.3
"""The part of the forecast that is the margin until then."""
WIDEST = 2.0
"""The part of the forecast that the margin is at most."""
ONCE = 1.0
"""The largest errors, as many as one surprise makes, count for so many times of the forecast at most: what happened
once is not to be expected."""
SHORTEST = 40
"""Seconds for which something is taken to be known when less is: one surprise at the beginning is not the rule."""
WINDOWS = (1, 2, 4, 8, 16)
"""Seconds of patience that are tried, beside the longest."""


class Autoregression:
    """Forecasts by how much a rate will have changed in ``horizon`` seconds: from its last changes, and from how far it
    is from its mean. A rate that does not change is forecast as it is, whatever was learned before."""

    __slots__ = ("_covariance", "_horizon", "_rates", "_weights")

    def __init__(self, horizon: int) -> None:
        self._horizon = horizon
        self._rates: deque[float] = deque(maxlen=REMEMBERED + horizon)
        self._weights: NDArray[np.float64] = np.zeros(ORDER)
        self._covariance: NDArray[np.float64] = np.eye(ORDER)

    def forecast(self, rate: float) -> float:
        """Learn the next rate; the forecast from there on."""
        self._rates.append(rate)
        rates = np.array(self._rates)
        scale = float(rates.mean())
        if len(rates) < ORDER + self._horizon or scale <= 0.0:
            return rate
        then = rates[: -self._horizon]
        self._learn(_inputs(then) / scale, (rate - float(then[-1])) / scale)
        change = float(self._weights @ _inputs(rates[-REMEMBERED:]))
        return min(max(rate + change, 0.0), STEEPEST * float(rates[-ORDER:].max()))

    def _learn(self, inputs: NDArray[np.float64], outcome: float) -> None:
        spread = self._covariance @ inputs
        gain = spread / (FORGETTING + inputs @ spread)
        self._weights = self._weights + gain * (outcome - self._weights @ inputs)
        covariance = (self._covariance - np.outer(gain, spread)) / FORGETTING
        # Where nothing changes nothing is learned, and the covariance would grow beyond all bounds.
        self._covariance = covariance * min(1.0, 1e3 / float(np.trace(covariance)))


def _inputs(rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """The last changes, the latest first, and the way to the mean."""
    return np.append(np.diff(rates[-ORDER:])[::-1], rates.mean() - rates[-1])


class Forecast:
    """What a rate will need. ``horizon``: seconds from the end of a second until what is decided then takes effect."""

    __slots__ = (
        "_choices",
        "_errors",
        "_filled",
        "_forecasts",
        "_last",
        "_model",
        "_most",
        "_next",
        "_provided",
        "_rates",
        "_roots",
        "_seen",
        "_settings",
        "_surprise",
        "_windows",
        "kept",
        "least",
        "need",
    )

    def __init__(self, settings: Settings, horizon: int) -> None:
        self._settings = settings
        self._surprise = horizon + 1
        self._model = Autoregression(horizon)
        longest = max(1, round(settings.patience))
        self._windows = np.array([*(window for window in WINDOWS if window < longest), longest])
        self._forecasts: deque[float] = deque(maxlen=longest + 1)
        self._choices: deque[int] = deque([len(self._windows) - 1], maxlen=longest)
        memory = max(ENOUGH, round(settings.memory))
        shape = (len(self._windows), memory)
        self._errors = np.zeros(shape)
        """By window and second: by how much the rate exceeded what was kept, in roots of that."""
        self._roots = np.zeros(shape)
        self._rates = np.zeros(memory)
        self._filled = 0
        self._next = 0
        self._most: deque[NDArray[np.float64]] = deque(maxlen=horizon + 1)
        self._last: float | None = None
        self._seen = 0
        self._provided = 0.0
        self.need = 0.0
        """To be provided for now."""
        self.least = 0.0
        """To be provided for even by those who trust what was provided before: without a margin that is a guess."""
        self.kept: float | None = None
        """What is there is kept up to this; None: all of it, not enough is known yet."""

    def observe(self, rate: float) -> None:
        """Take the rate of the last second."""
        forecast = self._model.forecast(rate)
        if self._last is not None:
            forecast = max(forecast, min(rate, self._last))
            if rate > STARTLING * self._provided:
                forecast = max(forecast, rate)
        self._last = rate
        self._seen += 1
        self._forecasts.append(forecast)
        values = np.array(self._forecasts)[::-1]
        most = np.maximum.accumulate(values)[np.minimum(self._windows, len(values) - 1)]
        self._most.append(most)
        if len(self._most) == self._most.maxlen:
            self._note(rate, self._most[0])
        if self._filled < ENOUGH:
            self.need = forecast * (1.0 + FIRST_MARGIN)
            self.least = forecast
            self._provided = self.need
            return
        margins = self._margins()
        # What patience costs is judged by what it did before: a fall is not the moment to become impatient.
        self._choices.append(self._choose(margins))
        chosen = self._choices[0]
        margin = float(margins[chosen])
        self.need = self.least = _with_margin(forecast, margin)
        self._provided = _with_margin(float(most[chosen]), margin)
        self.kept = self._provided if self._seen > self._windows[chosen] else None

    def _note(self, rate: float, most: NDArray[np.float64]) -> None:
        roots = np.sqrt(np.maximum(most, 1.0))
        self._errors[:, self._next] = (rate - most) / roots
        self._roots[:, self._next] = roots
        self._rates[self._next] = rate
        self._next = (self._next + 1) % len(self._rates)
        self._filled = min(self._filled + 1, len(self._rates))

    def _margins(self) -> NDArray[np.float64]:
        """By window, the least margin (in roots of the forecast, as the noise of counts grows like that) with which no
        more than the part asked for of all that came would have been missed."""
        errors, roots = self._errors[:, : self._filled], self._roots[:, : self._filled]
        known = float(self._rates[: self._filled].sum()) * max(1.0, SHORTEST / self._filled)
        allowed = self._settings.shortfall * known
        surprise = np.argpartition(-errors, self._surprise, axis=1)[:, : self._surprise]
        errors = errors.copy()
        clipped = np.minimum(np.take_along_axis(errors, surprise, 1), ONCE * np.take_along_axis(roots, surprise, 1))
        np.put_along_axis(errors, surprise, clipped, axis=1)
        order = np.argsort(-errors, axis=1)
        errors = np.take_along_axis(errors, order, axis=1)
        roots = np.take_along_axis(roots, order, axis=1)
        weights, sums = np.cumsum(roots, axis=1), np.cumsum(roots * errors, axis=1)
        # With the margin at the next smaller error, so much would have been missed by all larger ones.
        following = np.maximum(np.concatenate([errors[:, 1:], np.zeros((len(errors), 1))], axis=1), 0.0)
        missed = sums - weights * following
        at = np.argmax(missed > allowed, axis=1)
        rows = np.arange(len(errors))
        margins = (sums[rows, at] - allowed) / weights[rows, at]
        return np.where(missed[rows, at] > allowed, np.maximum(margins, 0.0), 0.0)

    def _choose(self, margins: NDArray[np.float64]) -> int:
        """The longest window that costs no more than ``thrift`` above the cheapest."""
        roots = self._roots[:, : self._filled]
        costs = np.mean(roots * roots, axis=1) + margins * np.mean(roots, axis=1)
        good = np.flatnonzero(costs <= costs.min() * (1.0 + self._settings.thrift))
        return int(good[-1])


def _with_margin(forecast: float, margin: float) -> float:
    return forecast + min(margin * math.sqrt(forecast), WIDEST * forecast)
