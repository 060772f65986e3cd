"""Decline: compute the numbers that show overfitting from readings and a baseline, without judging them.

The last readings show how far LAR and the training loss lie below the baseline's, as running medians. The whole run
shows by what factor k has grown since its lowest value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from logalign.diagnosis.baseline import Axis, Baseline
from logalign.diagnosis.curves import MEDIAN_EFFICIENCY
from logalign.diagnosis.robust import Vector, median, noise, running_median
from logalign.diagnosis.series import Series

SPREAD_SKIPPED = 2
SPREAD_SMOOTHING = 5
X_COLUMN: Mapping[Axis, str] = {"tokens": "tokens_seen"}


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """The distance of the last readings below the baseline, in one form: `baseline - run`.

    Attributes:
        now: Running median over the last `smoothing` readings.
        low: Lowest of the last `hold` running medians.
        high: Highest of them.
        between: Standard deviation of one run's curve about the baseline's there, None where unknown.
        scatter: Standard error of the running median, from the scatter of readings.
    """

    now: float
    low: float
    high: float
    between: float | None
    scatter: float


@dataclass(frozen=True, kw_only=True)
class Span:
    """A smoothed number: its last value, and the extremes of the last `hold` values."""

    now: float
    low: float
    high: float


def smoothed_lar(series: Series, form: str) -> float | None:
    """The median of the last five readings, None where one is undefined or among the first, in which LAR rises."""
    values = series.recent(form, SPREAD_SMOOTHING)
    if series.taken < SPREAD_SKIPPED + SPREAD_SMOOTHING or not np.isfinite(values).all():
        return None
    return median(values)


def spread(series: Series, form: str, *, hold: int, highest: float = -math.inf) -> float | None:
    """The growth factor of k since its lowest, `n^(2 (highest LAR - LAR now))`: the least of the last `hold`.

    LAR is a running median of five readings. It excludes the run's first readings, in which LAR rises from its initial
    value. `highest` is the earlier maximum, which the history of a long run no longer resolves. The result is None
    where n is not recorded, readings are too few, or a float overflows.
    """
    _, lar = series.past(form)
    lar = lar[np.isfinite(lar)][SPREAD_SKIPPED:]
    smooth = running_median(lar, SPREAD_SMOOTHING)
    if series.n is None or smooth.size < hold:
        return None
    try:
        return math.pow(series.n, 2 * float(max(highest, smooth.max()) - smooth[-hold:].max()))
    except OverflowError:
        return None


def x_of(series: Series, axis: Axis) -> Vector:
    """Steps or tokens of the last readings."""
    return series.steps if axis == "step" else series.recent(X_COLUMN[axis])


def deviation(
    series: Series, baseline: Baseline, form: str, *, axis: Axis, warm_up: float | None, smoothing: int, hold: int
) -> Deviation | None:
    """Compute the deviation of the last readings from the baseline.

    It is None where the baseline lacks the curve, ends earlier, or is too short to know its scatter. It is also None
    where fewer than `smoothing + hold - 1` of the last readings follow the warm-up and have this form.
    """
    curve = baseline.curve(form, axis)
    if curve is None:
        return None
    steps, values, x = series.steps, series.recent(form), x_of(series, axis)
    counts = (steps > (math.inf if warm_up is None else warm_up)) & np.isfinite(values) & np.isfinite(x)
    x, values = x[counts][-(smoothing + hold - 1) :], values[counts][-(smoothing + hold - 1) :]
    if x.size < smoothing + hold - 1:
        return None
    band = curve.at(x)
    medians = running_median(band.center - values, smoothing)
    # A sum is finite only where all its terms are.
    if not math.isfinite(float((band.center - values).sum()) + band.scatter):
        return None
    span = float(x[-1] - x[-smoothing])
    baseline_readings = max(1.0, span / band.spacing) if band.spacing else 1.0
    variance = noise(values) ** 2 / smoothing + band.scatter**2 / baseline_readings
    between = float(band.between[-1])
    return Deviation(
        now=float(medians[-1]),
        low=float(medians.min()),
        high=float(medians.max()),
        between=between if math.isfinite(between) else None,
        scatter=math.sqrt(MEDIAN_EFFICIENCY * variance),
    )


def loss_below(
    series: Series, baseline: Baseline, *, axis: Axis, warm_up: float | None, smoothing: int, hold: int
) -> Span | None:
    """The distance of the run's training loss below the baseline's, as a share: `baseline / run - 1`.

    It is None where the baseline has no losses or ends earlier, or where fewer than `smoothing + hold - 1` of the last
    readings follow the warm-up and have a loss above 0.
    """
    curve = baseline.curve("loss", axis)
    if curve is None:
        return None
    steps, losses, x = series.steps, series.recent("loss"), x_of(series, axis)
    counts = (steps > (math.inf if warm_up is None else warm_up)) & (losses > 0) & np.isfinite(x)
    x, losses = x[counts][-(smoothing + hold - 1) :], losses[counts][-(smoothing + hold - 1) :]
    if x.size < smoothing + hold - 1:
        return None
    medians = running_median(curve.at(x).center / losses - 1, smoothing)
    if not np.isfinite(medians).all():
        return None
    return Span(now=float(medians[-1]), low=float(medians.min()), high=float(medians.max()))


def reaches(series: Series, baseline: Baseline, form: str, *, axis: Axis) -> bool:
    """True where the baseline has a value at the last reading."""
    curve = baseline.curve(form, axis)
    return curve is not None and bool(np.isfinite(curve.at(x_of(series, axis)[-1:]).center).all())


def tokens_per_step(series: Series) -> float | None:
    """Tokens per step over the last readings, None where not recorded."""
    steps, tokens = series.steps, series.recent("tokens_seen")
    if steps.size < 2 or not math.isfinite(tokens[0]) or not math.isfinite(tokens[-1]):
        return None
    return float((tokens[-1] - tokens[0]) / (steps[-1] - steps[0]))
