"""Finds the end of the warm-up, in which LAR moves fast whatever the network learns."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from logalign.diagnosis.robust import Vector, running_median

SMOOTHING = 5
"""Readings in the running median that shows the warm-up."""
MIN_WARM_UP_READINGS = 10
MAX_WARM_UP_READINGS = 100


def warm_up_end(x: ArrayLike, lar: ArrayLike, lr: ArrayLike | None = None) -> float | None:
    """Find the x of the last warm-up reading, or None while it lasts.

    Warm-up lasts while the recorded learning rate rises. Without a recorded rate, it lasts until the first maximum of
    LAR's running median over 5 readings, known 5 readings later: LAR peaks early, as one common direction comes and
    goes. It takes at least 10 readings in either case, and at most 100 where no learning rate is recorded.

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
    """Find the index in y of its running median's first maximum that stands for as many readings as it is wide."""
    smooth = running_median(y, SMOOTHING)
    highest = np.maximum.accumulate(smooth)
    for i in range(smooth.size - SMOOTHING):
        if smooth[i] == highest[i] and smooth[i + 1 : i + 1 + SMOOTHING].max() < smooth[i]:
            return i + SMOOTHING // 2
    return None
