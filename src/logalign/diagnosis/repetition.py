"""Repetition: measures the effect of repeated data on a run, reading by reading, in constant memory.

Method: passes over the same data (`epochs.py`) show how fast the training loss falls on repeated samples. LAR shows
whether new directions come into use meanwhile. Their product, summed over log(step), is the **strain**. It grows only
while a run memorizes through new directions, by the amount of both. The alternative, a threshold on either or on their
product at one moment, comes late or never. At the lowest held-out loss, both differ as much between runs as between
healthy and overfit runs, and their noise hides the moment (docs/log.md).
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
"""Readings whose repetition is kept exactly. The bins of a history hold the earlier ones."""


@dataclass(frozen=True)
class Repetition:
    """The recent effect of repeated data on a run.

    Attributes:
        memorization: Loss that repeated samples removed, in nats per unit of log(step).
        learning: Loss lost inside passes, in the same unit, negative where the loss rises.
        decline: LAR lost, per unit of log(step), over the last factor of 1.8 in steps.
        strain: Sum so far of memorization times decline over log(step), since the warm-up.
    """

    memorization: float
    learning: float
    decline: float
    strain: float


def repetition(series: Series, form: str, *, strain: float = 0.0) -> Repetition | None:
    """Separate learning from memorizing by the training loss inside passes and between them.

    The result is None where no epoch or loss is recorded, too little data has repeated so far, or a pass is hardly
    longer than the distance of readings.
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
    """Fit a slope in log(step) over the last factor of 1.8 in steps, by least squares on medians of three.

    It is None for fewer than five readings.
    """
    if not steps.size or steps[-1] <= 0:
        return None
    first = int(np.searchsorted(steps, max(steps[-1] / LATELY, 1.0)))
    x, y = steps[first:], values[first:]
    known = np.isfinite(y)
    x, y = x[known], running_median(y[known], 3)
    if y.size < MIN_SLOPE_READINGS:
        return None
    u = np.log(x[1:-1] / x[-1])  # log of the ratio: logarithms of very large steps do not differ
    u = u - u.mean()
    return float(u @ y / (u @ u))


class RepetitionMemory:
    """Follows a series, sums the strain, and can go back to any step.

    It keeps the results of the last readings exactly, and all earlier strain in a history's bins.
    """

    def __init__(self) -> None:
        self._last: list[tuple[int, Repetition | None]] = []  # step and result, the latest last
        self._strains = History(("strain",))

    @property
    def strain(self) -> float:
        """The sum so far."""
        known = [found.strain for _, found in self._last if found is not None]
        if known:
            return known[-1]
        return float(self._strains.y[-1]) if self._strains.size else 0.0

    def follow(self, series: Series, form: str, *, counts: bool) -> None:
        """Read the newest reading of the series, and add its strain where `counts` is true."""
        step = series.last_step
        assert step is not None
        found = repetition(series, form, strain=self.strain)
        if found is not None and counts:
            found = _strained(found, series.steps)
        self._last = [*self._last, (step, found)][-REMEMBERED:]
        if found is not None:
            self._strains.append(step, found.strain)

    def rewind(self, step: int) -> None:
        """Forget this step and all later ones."""
        self._last = [each for each in self._last if each[0] < step]
        self._strains.truncate(step)

    def held(self, hold: int) -> Repetition | None:
        """Return the last `hold` readings' minima and highest learning, or None unless all saw passes.

        Strain comes from the last reading: it is a sum, and needs no confirmation.
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
        """Return the state as lists and numbers for strict JSON."""
        last = [[step, None if found is None else asdict(found)] for step, found in self._last]
        return {"last": last, "strains": self._strains.state()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RepetitionMemory:
        """Restore a memory from `state()`."""
        memory = cls()
        memory._last = [(step, None if found is None else Repetition(**found)) for step, found in state["last"]]
        memory._strains = History.from_state(state["strains"])
        return memory


def _strained(found: Repetition, steps: Vector) -> Repetition:
    """Add the strain since the reading before. A rising LAR undoes none."""
    if steps.size < 2 or steps[-2] <= 0:
        return found
    added = found.memorization * max(found.decline, 0.0) * math.log(steps[-1] / steps[-2])
    return Repetition(found.memorization, found.learning, found.decline, found.strain + added)
