"""Decline: the numbers that tell overfitting, taken from readings and a baseline; what they mean is not decided here.

The last readings tell how far LAR and the training loss lie below the baseline's, as running medians. The past of the
whole run tells by what factor k has grown since it was lowest.
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
    """How far the last readings lie below the baseline, in one form: `baseline - run`.

    Attributes:
        now: Running median over the last `smoothing` readings.
        low: Lowest of the last `hold` running medians.
        high: Highest of them.
        between: Standard deviation of one run's curve about the baseline's there; None where unknown.
        scatter: Standard error of the running median, from the scatter of readings.
    """

    now: float
    low: float
    high: float
    between: float | None
    scatter: float


@dataclass(frozen=True, kw_only=True)
class Span:
    """A smoothed number: its last value, and the lowest and the highest of the last `hold`."""

    now: float
    low: float
    high: float


def smoothed_lar(series: Series, form: str) -> float | None:
    """The median of the last five readings; None where one is undefined, or among the first, in which LAR rises."""
    values = series.recent(form, SPREAD_SMOOTHING)
    if series.taken < SPREAD_SKIPPED + SPREAD_SMOOTHING or not np.isfinite(values).all():
        return None
    return median(values)


def spread(series: Series, form: str, *, hold: int, highest: float = -math.inf) -> float | None:
    """By what factor k has grown since it was lowest, `n^(2 (highest LAR - LAR now))`: the least of the last `hold`.

    LAR is a running median of five readings; the first of all readings, in which it rises from its initial value, are
    left out. `highest` is what it has reached before, which the history of a long run no longer resolves. None where n
    is not recorded, there are too few readings, or no float can hold it.
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
    """The last readings' steps or tokens."""
    return series.steps if axis == "step" else series.recent(X_COLUMN[axis])


def deviation(
    series: Series, baseline: Baseline, form: str, *, axis: Axis, warm_up: float | None, smoothing: int, hold: int
) -> Deviation | None:
    """The deviation of the last readings from the baseline.

    None where the baseline has no such curve, does not reach so far, or is too short to know its scatter; and where
    fewer than `smoothing + hold - 1` of the last readings are after the warm-up and have this form.
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
    # A sum is finite where all of its terms are.
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
    """By what share of the run's training loss the baseline's lies above it, `baseline / run - 1`.

    None where the baseline has no losses or does not reach so far, or fewer than `smoothing + hold - 1` of the last
    readings are after the warm-up and have a loss above 0.
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
    """Whether the baseline has a value at the last reading."""
    curve = baseline.curve(form, axis)
    return curve is not None and bool(np.isfinite(curve.at(x_of(series, axis)[-1:]).center).all())


def tokens_per_step(series: Series) -> float | None:
    """Tokens per step over the last readings; None where not recorded."""
    steps, tokens = series.steps, series.recent("tokens_seen")
    if steps.size < 2 or not math.isfinite(tokens[0]) or not math.isfinite(tokens[-1]):
        return None
    return float((tokens[-1] - tokens[0]) / (steps[-1] - steps[0]))
