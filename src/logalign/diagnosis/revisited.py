"""Revisited: measures what a run memorizes of returning samples, and whether it still learns from the others.

Method: a visit lowers the loss of its own sample by the **gain**. The sum over passes is the **memorized** loss, in
nats. Learning from others offsets it: where drift lowers the loss of unseen samples, the loss memorized before shrinks
by the same share. The **memorized share** is memorized / (loss + memorized). It is the part of unseen samples' loss
that repeated visits removed. The **drift** is the change of a sample's loss while the network trains on others. While
the loss falls, training pays, however much is memorized. So overfitting nears where the share is no longer small and
drift is no longer below zero. Neither is enough alone: clean classifiers settle at a drift of zero with almost nothing
memorized, and language models memorize much while they still learn (docs/log.md).
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
"""Estimates to keep for going back, one a pass."""
LOSS_READINGS = 10
"""Most readings of the last pass that its median loss uses."""
WHOLE = 1e-6
"""Tolerance of a whole number of passes."""


@dataclass(frozen=True, kw_only=True)
class Revisited:
    """Result of the last complete pass.

    Attributes:
        step: Step of the first reading after it.
        passes: Number of complete passes.
        drift: Change of a sample's loss in one pass over other samples, in nats.
        drift_error: Its standard error.
        memorized: Sum of the gains, less later learning from others, in nats.
        memorized_error: Its standard error.
        loss: The training loss.
        began: The first training loss.
        pace: Learning rate of the pass as a share of the highest so far, 1 where none is recorded.
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
        """The loss of unseen samples: the training loss plus the memorized loss."""
        return self.loss + max(self.memorized, 0.0)

    @property
    def share(self) -> float:
        """The memorized share, from 0 to 1."""
        return max(self.memorized, 0.0) / self.unseen if self.unseen > 0 else 0.0

    def of_the_first(self, errors: float = 0.0) -> float:
        """Return the memorized loss, less so many standard errors, as a share of the first training loss."""
        return max(self.memorized - errors * self.memorized_error, 0.0) / self.began if self.began > 0 else 0.0


class RevisitMemory:
    """Follows a series, sums the gains of its passes, and can go back to any of the last passes."""

    def __init__(self) -> None:
        self._found: list[tuple[Revisited, float]] = []  # result, and the gain that marks a new estimate
        self._peak: list[tuple[int, float]] = []  # step and learning rate, each higher than all before
        self._is_now = False

    @property
    def now(self) -> Revisited | None:
        """Result of the last complete pass, or None if the last reading has no drift."""
        return self._found[-1][0] if self._is_now else None

    @property
    def before(self) -> Revisited | None:
        """Result of the complete pass before it."""
        return self._found[-2][0] if self._is_now and len(self._found) > 1 else None

    def follow(self, series: Series) -> None:
        """Read the newest reading of the series."""
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
        """Forget this step and all later ones."""
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
        """Return the state as lists and numbers for strict JSON."""
        return {
            "found": [[asdict(found), gain] for found, gain in self._found],
            "peak": [list(each) for each in self._peak],
            "is_now": self._is_now,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RevisitMemory:
        """Restore a memory from `state()`."""
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
