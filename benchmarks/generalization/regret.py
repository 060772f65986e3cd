"""Regret: what it costs to follow a verdict, in nats of held-out loss.

One who follows it keeps the checkpoint of its first alarm, and that of the end where there is none. With H the held-out
loss, smoothed by a centered moving mean of five evaluations,

    regret = H(step that is kept) - min H,    saved = 1 - step that is kept / last step.

Source: the regret of early stopping, as in any decision made without the future; held-out samples reach no signal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from benchmarks.generalization import score
from benchmarks.generalization.recorder import SMOOTHING
from benchmarks.generalization.score import Context, Signal
from benchmarks.generalization.store import Made

PATIENCE = 3
"""Evaluations without a new lowest after which people stop."""
KEPT_APART = {"held out 1 %": "val1_loss", "held out 5 %": "val5_loss"}
PASSES = (1, 2, 3)
CANDIDATES = 200
MOST = 0.5
"""Nats that one run counts for at most where a threshold is fitted."""


@dataclass(frozen=True)
class Cost:
    """What following costs in one run.

    Attributes:
        regret: In nats.
        saved: Share of the steps that are not made.
        alarmed: Whether there was an alarm.
    """

    regret: float
    saved: float
    alarmed: bool


@cache
def held_out(run: Made) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The steps of the evaluations, and the smoothed held-out loss there; up to where the run diverged."""
    steps, losses = run.columns["step"], run.columns["val_loss"]
    known = np.isfinite(losses) & (steps < run.truth.get("diverged_step", np.inf))
    steps, losses = steps[known], losses[known]
    half = SMOOTHING // 2
    return steps, np.array([losses[max(0, i - half) : i + half + 1].mean() for i in range(len(losses))])


def cost(run: Made, reading: int | None) -> Cost:
    """Of keeping the checkpoint of this reading; of the last one for None. Infinite where that one has diverged."""
    steps, losses = held_out(run)
    last = run.columns["step"][-1]
    step = last if reading is None else run.columns["step"][reading]
    if step >= run.truth.get("diverged_step", np.inf):
        return Cost(float("inf"), float(1 - step / last), reading is not None)
    regret = float(np.interp(step, steps, losses) - losses.min())
    return Cost(regret, float(1 - step / last), reading is not None)


def after_passes(run: Made, passes: float) -> int | None:
    """The first reading after so many passes."""
    found = np.flatnonzero(run.columns["epoch"] >= passes)
    return int(found[0]) if found.size else None


def by_holding_out(run: Made, column: str, *, patience: int = PATIENCE) -> int | None:
    """The reading whose checkpoint early stopping keeps: the lowest before `patience` evaluations without a lower one.

    The samples kept apart are none of those that the run trained on. None where they were not evaluated, or where no
    such row of evaluations came; the lowest of all is kept then, too, so that None is only of the first kind.
    """
    losses = run.columns.get(column)
    if losses is None:
        return None
    lowest, at, since = np.inf, None, 0
    for i in np.flatnonzero(np.isfinite(losses)):
        if losses[i] < lowest:
            lowest, at, since = losses[i], int(i), 0
        else:
            since += 1
        if since >= patience:
            break
    return at


def fit_threshold(found: Sequence[Context], signal: Signal) -> float:
    """The threshold of a signal, three readings in a row above it, with the lowest mean regret over these runs.

    Infinite, and so no alarm at all, where that is lowest.
    """
    held = [(context.run, score.sustained(signal(context))) for context in found]
    finite = np.concatenate([np.empty(0), *(values[np.isfinite(values)] for _, values in held)])
    if not finite.size:
        return float("inf")
    choices = np.append(np.unique(np.quantile(finite, np.linspace(0, 1, CANDIDATES))), np.inf)
    total = np.zeros(len(choices))
    for run, values in held:
        costs = np.array([min(cost(run, i).regret, MOST) for i in range(len(values))] + [cost(run, None).regret])
        total += np.minimum(costs[score.first_above(values, choices)], MOST)
    return float(choices[int(total.argmin())])


def by_signal(found: Sequence[Context], signal: Signal, threshold: float) -> list[Cost]:
    """What the rule `signal > threshold` costs in every run."""
    return [cost(context.run, score.alarm(signal(context), threshold)) for context in found]
