"""Held-out losses in a log: check if they disagree with the verdict, which does not use them.

Method: compare the lowest and the last value of a centered moving mean of the evaluations. They disagree with a verdict
that trains on where the last exceeds the lowest by more than 2 % of it, 0.2 % of the losses' range, and three standard
errors. They disagree with an alarm where the last exceeds the lowest by at most one standard error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from logalign.diagnosis.history import History
from logalign.diagnosis.outcome import Outcome
from logalign.diagnosis.robust import Vector, noise
from logalign.runs.reading import Reading

NAME = "val_loss"
SMOOTHING = 5
LEAST = 4
"""Minimum evaluations for a statement."""
RISE, OF_RANGE, ERRORS = 0.02, 0.002, 3.0
"""Limits of a material rise: shares of the lowest value and of the range, and a number of standard errors."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The course of recorded held-out losses.

    Attributes:
        lowest: The lowest of the smoothed losses.
        lowest_step: Its step.
        last: The smoothed loss at the end.
        last_step: The step of the last evaluation.
        range: From the lowest of the smoothed losses to the highest.
        error: Standard error of the difference of two smoothed losses.
    """

    lowest: float
    lowest_step: int
    last: float
    last_step: int
    range: float
    error: float

    @property
    def has_risen(self) -> bool:
        """True where the loss exceeds its lowest value materially and beyond noise."""
        least = max(RISE * abs(self.lowest), OF_RANGE * self.range, ERRORS * self.error)
        return self.last - self.lowest > least

    @property
    def is_lowest(self) -> bool:
        """True where the loss exceeds its lowest value by at most its noise."""
        return self.last - self.lowest <= self.error

    def against(self, outcome: Outcome) -> str:
        """One sentence on how the loss disagrees with an outcome, or an empty string."""
        unused = "the verdict does not use it"
        if self.has_risen and outcome in ("healthy", "generalizing", "undecidable"):
            doubles = self.last - self.lowest >= abs(self.lowest)
            rise = f"to {self.last:.4g}" if doubles else f"by {(self.last - self.lowest) / abs(self.lowest):.0%}"
            since = f"was lowest at step {self.lowest_step:,} ({self.lowest:.4g}) and has risen {rise} since"
            return f"the recorded held-out loss {since}; {unused}."
        if self.is_lowest and outcome in ("overfitting", "memorizing"):
            return (
                f"the recorded held-out loss is at its lowest ({self.last:.4g} at step {self.last_step:,}); {unused}."
            )
        return ""


def held_out(steps: Vector, losses: Vector) -> HeldOut | None:
    """Summarize held-out losses, or return None for fewer than four evaluations.

    The moving mean covers five evaluations, or a third of them where there are fewer than fifteen. At both ends its
    window is cut.
    """
    known = np.isfinite(losses)
    steps, losses = steps[known], losses[known]
    if losses.size < LEAST:
        return None
    half = min(SMOOTHING, max(1, losses.size // 3)) // 2
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    at = np.arange(losses.size)
    first, end = np.maximum(at - half, 0), np.minimum(at + half + 1, losses.size)
    smooth = (sums[end] - sums[first]) / (end - first)
    lowest = int(smooth.argmin())
    error = noise(losses) * math.sqrt(1 / (end - first)[lowest] + 1 / (end - first)[-1])
    return HeldOut(
        lowest=float(smooth[lowest]),
        lowest_step=round(float(steps[lowest])),
        last=float(smooth[-1]),
        last_step=round(float(steps[-1])),
        range=float(np.ptp(smooth)),
        error=error,
    )


class HeldOutMemory:
    """The held-out losses among readings, in bounded memory: neighbors merge from 256 evaluations on."""

    def __init__(self) -> None:
        self._history = History((NAME,), capacity=256)

    def update(self, reading: Reading) -> None:
        """Add one reading; a step not above the last means that training resumed there."""
        last = self._history.last_x
        if last is not None and reading.step <= last:
            self._history.truncate(reading.step)
        loss = reading.extra.get(NAME)
        if loss is not None and math.isfinite(loss):
            self._history.append(reading.step, loss)

    def against(self, outcome: Outcome) -> str:
        """See `HeldOut.against`; empty for too few evaluations."""
        if self._history.size < LEAST:
            return ""
        found = held_out(self._history.x, self._history.y)
        return "" if found is None else found.against(outcome)

    def state(self) -> dict[str, Any]:
        """The whole state, as lists and numbers for strict JSON."""
        return self._history.state()

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> HeldOutMemory:
        """The memory that `state()` described."""
        memory = cls()
        memory._history = History.from_state(state)
        return memory
