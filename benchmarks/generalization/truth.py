"""What is true of a run, from held-out samples that no signal has seen; written down before anything was fitted.

- *overfit*: the smoothed held-out loss ends above its lowest point by more than max(0.05 nat, 3 standard errors);
- *healthy*: by less than 0.02 nat; between the two, a run is counted and not scored;
- *diverged*: the held-out loss is no number any more, or the training loss ends half above where it began;
- *generalizes* (algorithmic): held-out accuracy is at least 0.9 at the end, and *at* the steps where it passed 0.05 and
  0.9 for good.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.generalization.store import Made

OVERFIT_RISE, OVERFIT_ERRORS, HEALTHY_RISE, DIVERGED = 0.05, 3.0, 0.02, 1.5
BEGINS, SOLVED = 0.05, 0.9


@dataclass(frozen=True)
class Phases:
    """Steps at which an algorithmic run passed the accuracies for good; None where it never did."""

    memorized: int | None
    begins: int | None
    solved: int | None


def outcome(run: Made) -> str:
    """Give "overfit", "healthy", "between" or "diverged"."""
    losses = run.columns.get("train_loss", np.zeros(1))
    if "diverged_step" in run.truth or losses[-1] > DIVERGED * losses[0]:
        return "diverged"
    rise, error = run.truth["rise"], run.truth["rise_se"]
    if rise > max(OVERFIT_RISE, OVERFIT_ERRORS * error):
        return "overfit"
    return "healthy" if rise < HEALTHY_RISE else "between"


def epoch_of_minimum(run: Made) -> float:
    """The epoch of the lowest held-out loss."""
    return float(np.interp(run.truth["val_min_step"], run.columns["step"], run.columns["epoch"]))


def phases(run: Made) -> Phases:
    """When an algorithmic run memorized its training pairs and when it generalized."""
    steps = run.columns["step"]
    return Phases(
        memorized=_first(steps, run.columns["train_acc"] >= 0.99),
        begins=_for_good(steps, run.columns["val_acc"] >= BEGINS),
        solved=_for_good(steps, run.columns["val_acc"] >= SOLVED),
    )


def _first(steps: np.ndarray, reached: np.ndarray) -> int | None:
    found = np.flatnonzero(reached)
    return int(steps[found[0]]) if found.size else None


def _for_good(steps: np.ndarray, reached: np.ndarray) -> int | None:
    """The first step from which at least nine in ten readings hold, the last ones among them."""
    if not reached.any() or reached[-5:].mean() < 0.5:
        return None
    share = np.cumsum(reached[::-1])[::-1] / np.arange(len(reached), 0, -1)
    found = np.flatnonzero(reached & (share >= 0.9))
    return int(steps[found[0]]) if found.size else None
