"""Curve rules of the demos: when a curve falls, when it turns up, how two curves correlate.

The rules are fixed and the same for every run, so a demo reports what happened and not what was expected. They serve
only the demos. The detectors with sources and limits are in `logalign.diagnosis`.

Shapes: steps and values are one-dimensional, of one length.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

FALL = 0.02
FALL_READINGS = 3
RISE = 0.05
SMOOTHING = 5


def first_fall(steps: ArrayLike, values: ArrayLike, *, drop: float = FALL, readings: int = FALL_READINGS) -> int | None:
    """Return the step at which a curve is known to have fallen, or None if it never fell.

    Known means: `readings` readings in a row lie at least `drop` below the highest value before them. The rule uses
    only the past, so an observer of the run knows it at that step. It skips undefined readings.
    """
    step, value = _known(steps, values)
    low = value <= np.maximum.accumulate(value) - drop
    for end in range(readings, len(value) + 1):
        if low[end - readings : end].all():
            return int(step[end - 1])
    return None


def turning_point(steps: ArrayLike, values: ArrayLike, *, rise: float = RISE) -> int | None:
    """Return the step of the lowest value of a curve that rises afterwards, or None if it does not rise.

    A running median of 5 readings smooths the curve. The curve rises if its last smoothed value lies at least the share
    `rise` above the lowest one. The rule looks back from the end: during training the lowest value is not known yet.
    """
    step, value = _known(steps, values)
    if len(value) < SMOOTHING:
        return None
    half = SMOOTHING // 2
    smooth = np.array([np.median(value[max(0, i - half) : i + half + 1]) for i in range(len(value))])
    lowest = int(np.argmin(smooth))
    return int(step[lowest]) if smooth[-1] >= (1 + rise) * smooth[lowest] else None


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float | None:
    """Return Spearman's rank correlation over the places where both are defined, or None if it is undefined."""
    from scipy.stats import spearmanr

    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(spearmanr(x, y).statistic)


def value_at(steps: ArrayLike, values: ArrayLike, step: int) -> float:
    """Return the value at the reading nearest to `step`."""
    return float(np.asarray(values)[np.argmin(np.abs(np.asarray(steps) - step))])


def _known(steps: ArrayLike, values: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    step, value = np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float64)
    known = np.isfinite(value)
    return step[known], value[known]
