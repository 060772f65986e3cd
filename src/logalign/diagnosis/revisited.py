"""Revisited: what a run has memorized of the samples that come back, and whether it still learns from the others.

Method: a visit lowers the loss of its own sample by the **gain**; summed over passes that is what was **memorized**, in
nats. What is learned from others makes up for it: where drift lowers the loss that unseen samples would have, what was
memorized before shrinks by the same share. Beside the loss that is left it makes the **memorized share**, memorized /
(loss + memorized): of the loss that unseen samples would have, the part that is gone by seeing the same ones again. The
**drift** says what training on other samples does to a sample's loss: while it falls, training pays, however much has
been memorized. So overfitting nears where the share is no longer small and drift no longer below zero. Neither alone
tells: clean classifiers come to rest with a drift of zero and next to nothing memorized, and language models memorize
much while they still learn (docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from logalign.diagnosis.robust import median
from logalign.diagnosis.series import Series

REMEMBERED = 256
"""Estimates, one a pass, that can be gone back to."""
LOSS_READINGS = 10
"""Readings of the last pass, at most, whose median loss is taken."""
WHOLE = 1e-6
"""Passes by which a whole number may be missed."""


@dataclass(frozen=True, kw_only=True)
class Revisited:
    """What the last complete pass showed.

    Attributes:
        step: Of the first reading after it.
        passes: How many passes there were.
        drift: Change of a sample's loss in one pass over other samples, in nats.
        drift_error: Its standard error.
        memorized: The sum of the gains, less what was learned from others since, in nats.
        memorized_error: Its standard error.
        loss: The training loss.
        began: The first training loss.
        pace: The learning rate of the pass as a share of the highest so far; 1 where none is recorded.
    """

    step: int
    passes: int
    drift: float
    drift_error: float
    memorized: float
    memorized_error: float
    loss: float
    began: float
    pace: float

    @property
    def unseen(self) -> float:
        """The loss that unseen samples would have: the training loss, and all that was memorized."""
        return self.loss + max(self.memorized, 0.0)

    @property
    def share(self) -> float:
        """The memorized share, from 0 to 1."""
        return max(self.memorized, 0.0) / self.unseen if self.unseen > 0 else 0.0

    def of_the_first(self, errors: float = 0.0) -> float:
        """What was memorized, less so many standard errors of it, as a share of the loss that training began with."""
        return max(self.memorized - errors * self.memorized_error, 0.0) / self.began if self.began > 0 else 0.0


class RevisitMemory:
    """Follows a series and sums the gains of its passes; may be taken back to any of the last passes."""

    def __init__(self) -> None:
        self._found: list[tuple[Revisited, float]] = []  # and the gain, by which a new estimate is known
        self._peak: list[tuple[int, float]] = []  # step and learning rate, each higher than all before
        self._is_now = False

    @property
    def now(self) -> Revisited | None:
        """What the last complete pass showed; None where the last reading has no drift."""
        return self._found[-1][0] if self._is_now else None

    @property
    def before(self) -> Revisited | None:
        """What the complete pass before it showed."""
        return self._found[-2][0] if self._is_now and len(self._found) > 1 else None

    def follow(self, series: Series) -> None:
        """Look at a reading that the series has just taken in."""
        step, rate = series.last_step, series.last("lr")
        assert step is not None
        if rate is not None and (not self._peak or rate > self._peak[-1][1]):
            self._peak = [*self._peak, (step, rate)][-REMEMBERED:]
        values = [series.last(name) for name in ("drift", "drift_error", "gain", "gain_error", "epoch")]
        loss = _loss(series)
        self._is_now = None not in values and math.isfinite(loss)
        if not self._is_now:
            return
        drift, drift_error, gain, gain_error, passes = (float(value) for value in values if value is not None)
        last = self._found[-1] if self._found else None
        if last is not None and gain == last[1] and drift == last[0].drift:
            return  # still the same complete pass
        complete = math.floor(passes + WHOLE)
        since = max(1, complete - (1 if last is None else last[0].passes))
        memorized, variance = (0.0, 0.0) if last is None else (last[0].memorized, last[0].memorized_error ** 2)
        unseen = loss + max(memorized, 0.0)
        kept = max(0.0, 1 + min(drift, 0.0) * since / unseen) if unseen > 0 else 0.0
        memorized, variance = kept * memorized, kept**2 * variance
        found = Revisited(
            step=step,
            passes=complete,
            drift=drift,
            drift_error=drift_error,
            memorized=memorized + since * gain,
            memorized_error=math.sqrt(variance + since * gain_error**2),
            loss=loss,
            began=loss if series.first_loss is None else series.first_loss[1],
            pace=self._pace(series),
        )
        self._found = [*self._found, (found, gain)][-REMEMBERED:]

    def rewind(self, step: int) -> None:
        """Forget what was seen at this step and beyond."""
        self._found = [each for each in self._found if each[0].step < step]
        self._peak = [each for each in self._peak if each[0] < step]
        self._is_now = False

    def _pace(self, series: Series) -> float:
        rates = series.recent("lr")[_of_last_pass(series)]
        rates = rates[np.isfinite(rates)]
        if not rates.size or not self._peak or self._peak[-1][1] <= 0:
            return 1.0
        return float(rates.mean()) / self._peak[-1][1]

    def state(self) -> dict[str, Any]:
        """All of it, as lists and numbers that strict JSON can hold."""
        return {
            "found": [[asdict(found), gain] for found, gain in self._found],
            "peak": [list(each) for each in self._peak],
            "is_now": self._is_now,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RevisitMemory:
        """The memory that `state()` described."""
        memory = cls()
        memory._found = [(Revisited(**found), float(gain)) for found, gain in state["found"]]
        memory._peak = [(int(step), float(rate)) for step, rate in state["peak"]]
        memory._is_now = state["is_now"]
        return memory


def _of_last_pass(series: Series) -> np.ndarray[Any, np.dtype[np.bool_]]:
    passes = series.recent("epoch")
    inside: np.ndarray[Any, np.dtype[np.bool_]] = passes > passes[-1] - 1
    return inside


def _loss(series: Series) -> float:
    losses = series.recent("loss")[_of_last_pass(series)][-LOSS_READINGS:]
    losses = losses[np.isfinite(losses)]
    return median(losses) if losses.size else math.nan
