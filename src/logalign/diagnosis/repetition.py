"""Repetition: what a run makes of seeing its data again, reading by reading, in constant memory.

Method: passes over the same data (`epochs.py`) tell how fast the training loss falls by seeing the same samples again;
LAR tells whether new directions come into use meanwhile. Their product, summed over log(step), is the **strain**: it
grows only while a run memorizes by new directions, and by how much of both. The alternative, a threshold on either or
on their product at one moment, comes late or not at all: between runs both differ as much at the lowest point of the
held-out loss as they do between healthy runs and overfit ones, and their noise hides the moment (docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from logalign.diagnosis.history import History
from logalign.diagnosis.robust import Vector, running_median
from logalign.diagnosis.series import Series

MIN_SLOPE_READINGS = 5
LATELY = 1.8
"""Factor in steps over which LAR's decline is measured, so that it means the same early and late."""
REMEMBERED = 64
"""Readings whose repetition is remembered as it was; what was before them in the bins of a history."""


@dataclass(frozen=True)
class Repetition:
    """What a run that sees its data again has lately made of it.

    Attributes:
        memorization: Loss that was lost by seeing the same samples again, in nats per unit of log(step).
        learning: Loss that was lost inside passes, in the same unit; negative where it rises there.
        decline: LAR that was lost, per unit of log(step), over the last factor of 1.8 in steps.
        strain: The sum so far of memorization times decline over log(step), since the warm-up.
    """

    memorization: float
    learning: float
    decline: float
    strain: float


def repetition(series: Series, form: str, *, strain: float = 0.0) -> Repetition | None:
    """Learning and memorizing, told apart by what the training loss does inside passes and between them.

    None where that cannot be seen: no epoch or loss is recorded, too little has been repeated so far, or a pass is
    hardly longer than the distance of readings.
    """
    seen, rate = series.passes, lately(*series.past(form))
    if seen is None or rate is None:
        return None
    return Repetition(
        memorization=seen.memorization,
        learning=seen.learning,
        decline=-rate,
        strain=strain,
    )


def lately(steps: Vector, values: Vector) -> float | None:
    """The slope of a curve in log(step) over the last factor of 1.8 in steps, by least squares on medians of three.

    None for fewer than five readings.
    """
    if not steps.size or steps[-1] <= 0:
        return None
    first = int(np.searchsorted(steps, max(steps[-1] / LATELY, 1.0)))
    x, y = steps[first:], values[first:]
    known = np.isfinite(y)
    x, y = x[known], running_median(y[known], 3)
    if y.size < MIN_SLOPE_READINGS:
        return None
    u = np.log(x[1:-1] / x[-1])  # of the ratio: logarithms of very large steps do not differ
    u = u - u.mean()
    return float(u @ y / (u @ u))


class RepetitionMemory:
    """Follows a series and sums the strain; may be taken back to any step.

    What the last readings showed is remembered as it was, the strain of all before them in a history's bins.
    """

    def __init__(self) -> None:
        self._last: list[tuple[int, Repetition | None]] = []  # step and what was seen at it, the latest last
        self._strains = History(("strain",))

    @property
    def strain(self) -> float:
        """The sum so far."""
        known = [found.strain for _, found in self._last if found is not None]
        if known:
            return known[-1]
        return float(self._strains.y[-1]) if self._strains.size else 0.0

    def follow(self, series: Series, form: str, *, counts: bool) -> None:
        """Look at a reading that the series has just taken in; `counts` says whether strain is summed over it."""
        step = series.last_step
        assert step is not None
        found = repetition(series, form, strain=self.strain)
        if found is not None and counts:
            found = _strained(found, series.steps)
        self._last = [*self._last, (step, found)][-REMEMBERED:]
        if found is not None:
            self._strains.append(step, found.strain)

    def rewind(self, step: int) -> None:
        """Forget what was seen at this step and beyond."""
        self._last = [each for each in self._last if each[0] < step]
        self._strains.truncate(step)

    def held(self, hold: int) -> Repetition | None:
        """The least of the last `hold` readings, and the most of their learning; None unless all of them saw passes.

        Strain is that of the last reading: it is a sum, and needs no confirmation.
        """
        found = [each for _, each in self._last[-hold:] if each is not None]
        if len(found) < hold:
            return None
        return Repetition(
            memorization=min(each.memorization for each in found),
            learning=max(each.learning for each in found),
            decline=min(each.decline for each in found),
            strain=found[-1].strain,
        )

    def state(self) -> dict[str, Any]:
        """All of it, as lists and numbers that strict JSON can hold."""
        last = [[step, None if found is None else asdict(found)] for step, found in self._last]
        return {"last": last, "strains": self._strains.state()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RepetitionMemory:
        """The memory that `state()` described."""
        memory = cls()
        memory._last = [(step, None if found is None else Repetition(**found)) for step, found in state["last"]]
        memory._strains = History.from_state(state["strains"])
        return memory


def _strained(found: Repetition, steps: Vector) -> Repetition:
    """With the strain of the last step from reading to reading; LAR that rises undoes none."""
    if steps.size < 2 or steps[-2] <= 0:
        return found
    added = found.memorization * max(found.decline, 0.0) * math.log(steps[-1] / steps[-2])
    return Repetition(found.memorization, found.learning, found.decline, found.strain + added)
