"""The end of a training's warm-up, in which LAR moves fast whatever the network learns."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from logalign.diagnosis.robust import Vector, running_median

SMOOTHING = 5
"""Readings of the running median in which warm-up is looked for."""
MIN_WARM_UP_READINGS = 10
MAX_WARM_UP_READINGS = 100


def warm_up_end(x: ArrayLike, lar: ArrayLike, lr: ArrayLike | None = None) -> float | None:
    """The x of the last reading of the warm-up; None while it lasts.

    While the recorded learning rate still rises, training warms up. Where it is not recorded, until the first maximum
    of LAR's running median over 5 readings, known 5 readings later: LAR peaks early, as one common direction comes and
    goes. At least the first 10 readings in either case, and at most 100 where no learning rate is recorded.

    Args:
        x: Steps, tokens or epochs.
        lar: LAR at x.
        lr: Learning rate at x, NaN where it is not known.
    """
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(lar, dtype=np.float64)
    if xs.size < MIN_WARM_UP_READINGS:
        return None
    rates = np.full(xs.shape, np.nan) if lr is None else np.asarray(lr, dtype=np.float64)
    known = np.flatnonzero(np.isfinite(rates))
    if known.size:
        falls = np.flatnonzero(np.diff(rates[known]) <= 0)
        end = known[falls[0]] if falls.size else None
    else:
        end = _first_maximum(ys)
        if end is None and xs.size >= MAX_WARM_UP_READINGS:
            end = MAX_WARM_UP_READINGS - 1
    return None if end is None else float(xs[max(int(end), MIN_WARM_UP_READINGS - 1)])


def _first_maximum(y: Vector) -> int | None:
    """The index in y of the first maximum of its running median that stands for as many readings as it is wide."""
    smooth = running_median(y, SMOOTHING)
    highest = np.maximum.accumulate(smooth)
    for i in range(smooth.size - SMOOTHING):
        if smooth[i] == highest[i] and smooth[i + 1 : i + 1 + SMOOTHING].max() < smooth[i]:
            return i + SMOOTHING // 2
    return None
