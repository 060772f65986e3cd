"""Signals of a run, each a causal series over its readings: what a user could have known then, no held-out data.

A signal is oriented so that more means more overfitting (or, in comparisons across runs, a larger gap). Where it is not
defined it is NaN. The signals of the library stand beside every rival; `with baseline` ones take the mean of the
baseline runs of the same recipe, never of the run itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.generalization.store import Made

Series = NDArray[np.float64]

SMOOTHING = 5  # readings in the trailing mean
WARM_UP_READINGS = 10
FORMS = {
    "LAR": "lar",
    "LAR, vocabulary-centered": "lar_vocab_centered",
    "LAR, token-centered": "lar_token_centered",
    "LAR, centered": "lar_centered",
}


@dataclass(frozen=True)
class Context:
    """A run, and the baselines that it may be compared with."""

    run: Made
    baselines: Sequence[Made] = field(default=())

    def column(self, name: str) -> Series:
        """A column of the run, NaN where it was not recorded."""
        return self.run.columns.get(name, np.full(len(self.run.columns["step"]), np.nan))

    def smooth(self, name: str) -> Series:
        """The trailing mean of a column."""
        return trailing_mean(self.column(name))

    def baseline(self, name: str) -> Series:
        """The mean of the baselines' smoothed column, at the run's steps."""
        if not self.baselines or any(name not in each.columns for each in self.baselines):
            return np.full(len(self.run.columns["step"]), np.nan)
        curves = []
        for each in self.baselines:
            values = trailing_mean(each.columns[name])
            known = np.isfinite(values)
            curves.append(np.interp(self.run.columns["step"], each.columns["step"][known], values[known], right=np.nan))
        mean: Series = np.mean(curves, axis=0)
        return mean


def trailing_mean(values: Series, readings: int = SMOOTHING) -> Series:
    """The mean of the last few defined readings."""
    known = np.isfinite(values)
    sums = np.cumsum(np.where(known, values, 0.0))
    counts = np.cumsum(known).astype(float)
    before_sums = np.concatenate([np.zeros(readings), sums])[: len(sums)]
    before_counts = np.concatenate([np.zeros(readings), counts])[: len(counts)]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: Series = (sums - before_sums) / (counts - before_counts)
    return mean


def slope(context: Context, name: str, readings: int = 15) -> Series:
    """Least-squares slope of a column over the last readings, in units a 100 steps."""
    values, steps = context.column(name), context.run.columns["step"]
    found = np.full(len(steps), np.nan)
    for i in range(readings - 1, len(steps)):
        part = slice(i - readings + 1, i + 1)
        known = np.isfinite(values[part])
        if known.sum() >= readings // 2:
            found[i] = 100 * _least_squares_slope(steps[part][known], values[part][known])
    return found


def log_slope(context: Context, name: str, factor: float = 1.5) -> Series:
    """Least-squares slope of a column in log(step), over the readings of the last factor in steps (five at least)."""
    values, steps = context.column(name), context.run.columns["step"]
    found = np.full(len(steps), np.nan)
    for i in range(WARM_UP_READINGS, len(steps)):
        first = min(int(np.searchsorted(steps, steps[i] / factor)), i - 4)
        part = slice(max(first, 1), i + 1)
        known = np.isfinite(values[part])
        if known.sum() >= 5:
            found[i] = _least_squares_slope(np.log(steps[part][known]), values[part][known])
    return found


def _least_squares_slope(x: Series, y: Series) -> float:
    centered = x - x.mean()
    return float(centered @ y / (centered @ centered))


def fall_from_peak(context: Context, name: str) -> Series:
    """How far the smoothed column lies below its highest value so far, after the first readings."""
    values = context.smooth(name)
    values = np.where(np.arange(len(values)) < WARM_UP_READINGS, np.nan, values)
    peak = np.fmax.accumulate(np.where(np.isfinite(values), values, -np.inf))
    return np.where(np.isfinite(values), peak - values, np.nan)


def boundary_drops(context: Context) -> Series:
    """Sum of the drops of the training loss where one epoch ends and the next begins (3 readings on either side).

    The samples on the far side of a boundary have been seen once more than those on the near side.
    """
    loss, epoch = context.column("train_loss"), context.column("epoch")
    found, total = np.full(len(loss), 0.0), 0.0
    number = np.floor(epoch)
    pending: list[int] = []
    for i in range(1, len(loss)):
        if number[i] > number[i - 1]:
            pending.append(i)
        for start in [start for start in pending if i == start + 2]:
            before, after = loss[max(0, start - 3) : start], loss[start : start + 3]
            if before.size:
                total += max(0.0, float(before.mean() - after.mean()))
            pending.remove(start)
        found[i] = total
    return found


def below_first_epoch(context: Context) -> Series:
    """How far the training loss lies below its own extrapolation from the first epoch, linear in log(step)."""
    loss, epoch, steps = context.column("train_loss"), context.column("epoch"), context.run.columns["step"]
    first = (epoch < 1) & (np.arange(len(steps)) >= 2)
    if first.sum() < 4 or epoch[-1] < 1:
        return np.full(len(steps), np.nan)
    late = first & (steps >= steps[first].max() / 3)
    fit = np.polyfit(np.log(steps[late]), loss[late], 1)
    expected = np.polyval(fit, np.log(np.maximum(steps, 1)))
    return np.where(epoch >= 1, expected - trailing_mean(loss), np.nan)


def _deviation(name: str) -> Callable[[Context], Series]:
    return lambda context: context.baseline(name) - context.smooth(name)


WITHOUT_BASELINE: dict[str, Callable[[Context], Series]] = {
    **{name: (lambda c, column=column: -c.smooth(column)) for name, column in FORMS.items()},
    **{f"{name}, fall": (lambda c, column=column: fall_from_peak(c, column)) for name, column in FORMS.items()},
    **{f"{name}, slope": (lambda c, column=column: -slope(c, column)) for name, column in FORMS.items()},
    **{
        f"{name}, slope in log(step)": (lambda c, column=column: -log_slope(c, column))
        for name, column in FORMS.items()
    },
    "LAR of rare tokens, fall": lambda c: fall_from_peak(c, "rare_lar"),
    "LAR, common minus rare": lambda c: c.smooth("common_lar") - c.smooth("rare_lar"),
    "weight spread": lambda c: c.smooth("weight_participation"),
    "activation spread": lambda c: c.smooth("input_participation"),
    "coherence": lambda c: -c.smooth("coherence"),
    "LAR of the first layer": lambda c: -c.smooth("site_first_lar"),
    "LAR of the last block": lambda c: -c.smooth("site_last_lar"),
    "training loss": lambda c: -c.smooth("train_loss"),
    "training loss, slope": lambda c: -slope(c, "train_loss"),
    "training loss, slope in log(step)": lambda c: -log_slope(c, "train_loss"),
    "training loss, drops at epochs": boundary_drops,
    "training loss, below its first epoch": below_first_epoch,
    "step": lambda c: c.run.columns["step"],
    "epoch": lambda c: c.column("epoch"),
    "norm of the head": lambda c: np.sqrt(c.smooth("energy_weight")),
    "norm of all weights": lambda c: c.smooth("weight_norm"),
    "gradient norm": lambda c: c.smooth("gradient_norm"),
    "stable rank": lambda c: c.smooth("stable_rank"),
    "entropy effective rank": lambda c: c.smooth("entropy_rank"),
    "RankMe of the inputs": lambda c: c.smooth("rankme"),
    "WeightWatcher alpha, mean": lambda c: -_held(c.column("alpha_mean")),
    "WeightWatcher alpha, head": lambda c: -_held(c.column("alpha_head")),
    "entropy of predictions": lambda c: -c.smooth("prediction_entropy"),
    "entropy minus loss": lambda c: c.smooth("prediction_entropy") - c.smooth("train_loss"),
    "spread of losses": lambda c: c.smooth("loss_spread"),
}

WITH_BASELINE: dict[str, Callable[[Context], Series]] = {
    **{f"{name}, deviation": _deviation(column) for name, column in FORMS.items()},
    "LAR of rare tokens, deviation": _deviation("rare_lar"),
    "training loss, deviation": _deviation("train_loss"),
    "norm of the head, deviation": lambda c: np.sqrt(c.smooth("energy_weight")) - np.sqrt(c.baseline("energy_weight")),
    "norm of all weights, deviation": lambda c: -_deviation("weight_norm")(c),
    "gradient norm, deviation": lambda c: -_deviation("gradient_norm")(c),
    "RankMe of the inputs, deviation": lambda c: -_deviation("rankme")(c),
    "stable rank, deviation": lambda c: -_deviation("stable_rank")(c),
    "entropy of predictions, deviation": _deviation("prediction_entropy"),
}


def held_out_rise(context: Context) -> Series:
    """How far the smoothed held-out loss lies above its lowest value so far, after the first readings."""
    values = context.smooth("val_loss")
    values = np.where(np.arange(len(values)) < WARM_UP_READINGS, np.nan, values)
    lowest = np.fmin.accumulate(np.where(np.isfinite(values), values, np.inf))
    return np.where(np.isfinite(values), values - lowest, np.nan)


YARDSTICKS: dict[str, Callable[[Context], Series]] = {"held-out loss, its rise": held_out_rise}
"""No rival, for it is what the others must do without: how well early stopping does on the same terms."""


def gap(run: Made) -> Series:
    """The true generalization gap, held-out minus training loss, at the readings that have both."""
    held_out = trailing_mean(run.columns["val_loss"], 3)
    found: Series = np.where(
        np.isfinite(run.columns["val_loss"]), held_out - trailing_mean(run.columns["train_loss"]), np.nan
    )
    return found


def _held(values: Series) -> Series:
    """Each undefined value takes the last defined one before it."""
    last = np.maximum.accumulate(np.where(np.isfinite(values), np.arange(len(values)), -1))
    return np.where(last >= 0, values[np.maximum(last, 0)], np.nan)
