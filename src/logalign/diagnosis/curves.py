"""Curves: a baseline's value and uncertainty at each step.

A band has two uncertainties, which smoothing treats differently. `scatter` is a reading's deviation from its run's
curve, which averages out over readings. `between` is a run's deviation from the baseline's curve, which does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from logalign.diagnosis.robust import Vector, noise

BETWEEN_WINDOW = 15
"""Window of the mean variance between runs, in readings."""
MEDIAN_EFFICIENCY = math.pi / 2
"""Variance ratio of median to mean, for normal values."""


@dataclass(frozen=True, eq=False)
class Band:
    """The baseline's value at some x, and how far a run like it may lie from there.

    Attributes:
        center: The baseline's value at each x, NaN where undefined.
        between: Standard deviation of one run's curve about the center, without the scatter of readings. It is NaN
            where unknown, as with a single run.
        scatter: Standard deviation of a single reading of the center's curve about its trend.
        spacing: Distance in x between readings of the center's curve.
    """

    center: Vector
    between: Vector
    scatter: float
    spacing: float


@dataclass(frozen=True, kw_only=True, eq=False)
class BaselineCurve:
    """The mean of one or several series, interpolated between readings, over the x range that all of them cover."""

    x: Vector
    mean: Vector
    between: Vector
    scatter: float
    spacing: float

    @classmethod
    def of(cls, series: Sequence[tuple[Vector, Vector]]) -> BaselineCurve | None:
        """The curve of these (x, y), None where one is empty or they share no x."""
        if not all(x.size for x, _ in series):
            return None
        first, last = max(x[0] for x, _ in series), min(x[-1] for x, _ in series)
        grid = np.unique(np.concatenate([x for x, _ in series]))
        grid = grid[(grid >= first) & (grid <= last)]
        if not grid.size:
            return None
        values = np.stack([np.interp(grid, x, y) for x, y in series])
        runs = len(series)
        scatters = np.array([noise(y) for _, y in series])
        scatter = float(np.sqrt(np.mean(scatters**2)))
        between = np.full(grid.shape, np.nan)
        if runs > 1 and math.isfinite(scatter):
            variance = _moving_mean(values.var(axis=0, ddof=1), BETWEEN_WINDOW)
            # Remove the scatter of readings. The factor covers how a new run differs from the runs' mean.
            between = np.sqrt(np.where(variance > scatter**2, variance - scatter**2, 0.0) * (1 + 1 / runs))
        return cls(
            x=grid,
            mean=values.mean(axis=0),
            between=between,
            scatter=scatter / math.sqrt(runs),
            spacing=float(np.median(np.diff(grid))) if grid.size > 1 else 0.0,
        )

    def at(self, x: Vector) -> Band:
        """The band at these x, NaN outside the curve."""
        center = np.interp(x, self.x, self.mean, left=np.nan, right=np.nan)
        return Band(center, np.interp(x, self.x, self.between), self.scatter, self.spacing)


def _moving_mean(values: Vector, width: int) -> Vector:
    weights = np.ones(min(width, values.size))
    means: Vector = np.convolve(values, weights, mode="same") / np.convolve(np.ones(values.size), weights, mode="same")
    return means
