"""Epochs: how the training loss moves inside a pass over the data, and from one pass to the next.

Method: inside a pass no sample repeats, so the loss moves as on fresh data, except for what the network forgets of the
pass before. Where the next pass begins, the network has seen every sample once more, and the loss drops by what it
memorized. A regression on the step and on the number of completed passes separates the two. It needs no held-out data
and no baseline, only data in passes and readings finer than a pass. The alternative, the loss alone, cannot separate
learning from memorizing, because both lower it.

Shapes: steps, epochs and losses are one-dimensional and of equal length. Steps increase.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from logalign.diagnosis.robust import MAD_TO_SIGMA, Vector, median

WINDOW_PASSES = 3.0
"""Window of the regression, in passes."""
MIN_READINGS = 10
MIN_READINGS_PER_PASS = 1.5
"""Coarser readings cannot resolve a pass: they do not separate step and completed passes."""
DROP_READINGS = 3
"""Readings before and after the start of a pass, for the means to compare."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Changes of the training loss over the last few passes.

    Attributes:
        step: Last step.
        steps_per_pass: The length of a pass.
        inside: Change of the loss inside a pass, in nats a step.
        between: Further change from one pass to the next, in nats, negative where samples are memorized.
    """

    step: float
    steps_per_pass: float
    inside: float
    between: float

    @property
    def memorization(self) -> float:
        """Loss decrease from seeing samples again, in nats per unit of log(step), comparable over a run."""
        return -self.between / self.steps_per_pass * self.step

    @property
    def learning(self) -> float:
        """Loss decrease inside passes, in the same unit, negative where the loss rises."""
        return -self.inside * self.step


def completed_passes(before: float, now: float) -> float:
    """The mean number of completed passes over the steps from epoch `before` to epoch `now`, both from 0 on.

    A mean loss over these steps averages samples seen that many times.

    Example:
        >>> completed_passes(0.5, 1.5), completed_passes(2.0, 2.0)
        (0.5, 2.0)
    """
    if not now > before:
        return float(math.floor(now))
    return (_area(now) - _area(before)) / (now - before)


def _area(epoch: float) -> float:
    """The integral of floor(e) from 0 to `epoch`."""
    whole = math.floor(epoch)
    return whole * (whole - 1) / 2 + whole * (epoch - whole)


def passes(steps: Vector, epochs: Vector, completed: Vector, losses: Vector) -> Passes | None:
    """Fit `loss = a + inside step + between completed` over the last three passes, at least ten readings.

    Args:
        steps: Training steps.
        epochs: Passes over the data at the reading.
        completed: `completed_passes` of the steps that the loss averages.
        losses: Training losses.

    Returns:
        None where readings are too few, no pass ends among them, or a pass is as short as a reading or two.
    """
    known = np.isfinite(epochs) & np.isfinite(completed) & np.isfinite(losses)
    steps, epochs, completed, losses = steps[known], epochs[known], completed[known], losses[known]
    if steps.size < MIN_READINGS:
        return None
    first = min(int(np.searchsorted(epochs, epochs[-1] - WINDOW_PASSES)), steps.size - MIN_READINGS)
    steps, epochs, completed, losses = steps[first:], epochs[first:], completed[first:], losses[first:]
    seen = float(epochs[-1] - epochs[0])
    if seen <= 0 or np.ptp(np.floor(epochs)) < 1 or (np.diff(epochs) < 0).any():
        return None
    steps_per_pass = float(steps[-1] - steps[0]) / seen
    if steps_per_pass < MIN_READINGS_PER_PASS * median(np.diff(steps)):
        return None
    design = np.stack([np.ones(steps.size), (steps - steps[-1]) / steps_per_pass, completed - completed[-1]], axis=1)
    fit, _, rank, _ = np.linalg.lstsq(design, losses, rcond=1e-6)
    if rank < design.shape[1]:
        return None
    return Passes(
        step=float(steps[-1]),
        steps_per_pass=steps_per_pass,
        inside=float(fit[1]) / steps_per_pass,
        between=float(fit[2]),
    )


@dataclass(frozen=True, kw_only=True)
class Memorized:
    """The memorization of a run so far, in nats of training loss.

    Attributes:
        drops: Sum of the drops of the training loss where passes begin.
        loss: Training loss at the end, the mean of the last readings.
        error: Standard error of `loss + drops`, from the scatter of readings.
    """

    drops: float
    loss: float
    error: float

    @property
    def held_out_loss(self) -> float:
        """The loss to expect on unseen samples: the training loss plus all that was memorized."""
        return self.loss + self.drops


def memorized(epochs: Vector, losses: Vector) -> Memorized | None:
    """Sum the drops of the training loss where passes begin: the mean of three readings before, less three after.

    Rises count as negative drops, so scatter does not add up over many passes. Where a pass has fewer than three
    readings, those after its start reach beyond its end, and the sum shrinks in proportion. The result is None where a
    pass has fewer than 1.5 readings, losses or epochs are missing, or readings number fewer than ten.
    """
    known = np.isfinite(epochs) & np.isfinite(losses)
    epochs, losses = epochs[known], losses[known]
    if epochs.size < MIN_READINGS or (np.diff(epochs) < 0).any():
        return None
    span = float(epochs[-1] - epochs[0])
    if span <= 0 or (epochs.size - 1) / span < MIN_READINGS_PER_PASS:
        return None
    begins = np.flatnonzero(np.diff(np.floor(epochs)) >= 1) + 1
    total, boundaries = 0.0, 0
    for i in begins:
        before, after = losses[max(0, i - DROP_READINGS) : i], losses[i : i + DROP_READINGS]
        if after.size == DROP_READINGS:
            total += float(before.mean() - after.mean())
            boundaries += 1
    moves = np.diff(losses)[np.diff(np.floor(epochs)) < 1]  # changes in passes
    if moves.size < DROP_READINGS:
        return None
    scatter = MAD_TO_SIGMA * median(np.abs(moves)) / math.sqrt(2)
    last = losses[-2 * DROP_READINGS :]
    share = min(1.0, (epochs.size - 1) / span / DROP_READINGS)
    error = scatter * math.sqrt(1 / last.size + share**2 * 2 * boundaries / DROP_READINGS)
    return Memorized(drops=share * total, loss=float(last.mean()), error=error)
