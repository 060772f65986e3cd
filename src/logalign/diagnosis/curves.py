"""Curves: what a baseline knows at each step, and how sure it is.

A band has two uncertainties, which smoothing treats differently. `scatter` is that of one reading about its run's
curve: it averages out over readings. `between` is that of one run's curve about the baseline's: it does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from logalign.diagnosis.robust import Vector, noise

BETWEEN_WINDOW = 15
"""Readings over which the variance between runs is averaged."""
MEDIAN_EFFICIENCY = math.pi / 2
"""Variance of a median over that of a mean, of normal values."""


@dataclass(frozen=True, eq=False)
class Band:
    """Where the baseline is at some x, and how far a run that is like it may lie from there.

    Attributes:
        center: The baseline's value at each x; NaN where it has none.
        between: Standard deviation of one run's curve about it, scatter of readings apart; NaN where unknown, as with a
            single run.
        scatter: Standard deviation of a single reading of the center's curve about its trend.
        spacing: Distance in x between readings of the center's curve.
    """

    center: Vector
    between: Vector
    scatter: float
    spacing: float


@dataclass(frozen=True, kw_only=True, eq=False)
class BaselineCurve:
    """The mean of one or several recorded series, interpolated between readings, over the x that all of them have."""

    x: Vector
    mean: Vector
    between: Vector
    scatter: float
    spacing: float

    @classmethod
    def of(cls, series: Sequence[tuple[Vector, Vector]]) -> BaselineCurve | None:
        """The curve of these (x, y); None where one is empty or they have no x in common."""
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
            # What is left beside the scatter of readings; a run to come differs from the mean of the runs, too.
            between = np.sqrt(np.where(variance > scatter**2, variance - scatter**2, 0.0) * (1 + 1 / runs))
        return cls(
            x=grid,
            mean=values.mean(axis=0),
            between=between,
            scatter=scatter / math.sqrt(runs),
            spacing=float(np.median(np.diff(grid))) if grid.size > 1 else 0.0,
        )

    def at(self, x: Vector) -> Band:
        """The band at these x; NaN beyond the curve's own."""
        center = np.interp(x, self.x, self.mean, left=np.nan, right=np.nan)
        return Band(center, np.interp(x, self.x, self.between), self.scatter, self.spacing)


def _moving_mean(values: Vector, width: int) -> Vector:
    weights = np.ones(min(width, values.size))
    means: Vector = np.convolve(values, weights, mode="same") / np.convolve(np.ones(values.size), weights, mode="same")
    return means
