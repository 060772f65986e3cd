"""Robust statistics of short, noisy series: medians, and the scatter of one reading.

Method: the scatter comes from second differences, in which a trend cancels, and from their median, so that a few
outliers do not count. Shapes: x and y are one-dimensional, of one length.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Vector = np.ndarray[Any, np.dtype[np.float64]]

MAD_TO_SIGMA = 1.4826
"""Median absolute deviation to standard deviation, of a normal distribution."""


def noise(y: ArrayLike) -> float:
    """The scatter of a single reading about its trend: a robust standard deviation.

    `1.4826 * median |y[i-1] - 2 y[i] + y[i+1]| / sqrt(6)`: a straight trend cancels in second differences, whose
    variance is six times that of a reading. NaN for fewer than three values.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> round(noise(0.01 * np.arange(2000) + 0.5 * rng.standard_normal(2000)), 2)
        0.49
    """
    values = np.asarray(y, dtype=np.float64)
    if values.size < 3:
        return math.nan
    second = values[2:] - 2 * values[1:-1] + values[:-2]
    return MAD_TO_SIGMA * median(np.abs(second)) / math.sqrt(6)


def median(values: Vector) -> float:
    """The median of at least one value; several times quicker than NumPy's on the few values that a detector has."""
    ordered, half = np.sort(values), values.size // 2
    return float(ordered[half] if values.size % 2 else (ordered[half - 1] + ordered[half]) / 2)


def running_median(y: ArrayLike, width: int) -> Vector:
    """The medians of every `width` values in a row, width odd: `len(y) - width + 1` of them, or none."""
    values = np.asarray(y, dtype=np.float64)
    if values.size < width:
        return np.empty(0)
    medians: Vector = np.sort(values[_windows(values.size, width)], axis=1)[:, width // 2]
    return medians


@lru_cache(maxsize=256)
def _windows(size: int, width: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """The indices of every `width` neighbors among `size`, a row each."""
    return np.arange(size - width + 1)[:, None] + np.arange(width)
