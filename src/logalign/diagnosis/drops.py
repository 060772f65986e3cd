"""Drops: estimate the memorized share of the training loss from its drops where passes over the data begin.

Method: inside a pass over the data no sample repeats. Where the next pass begins, the training loss drops by what the
network memorized of its samples. The **memorized share** is the sum of these drops, divided by that sum plus the
remaining loss. It is the part of the unseen samples' loss that repetition removes. The share is also large in healthy
runs while the loss still falls inside passes, so the rule uses both. The alternative, the size of the last drop, comes
later (docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from logalign.diagnosis.epochs import DROP_READINGS
from logalign.diagnosis.history import History
from logalign.diagnosis.outcome import OF_OVERFITTING, Outcome
from logalign.diagnosis.robust import noise
from logalign.diagnosis.series import Series

REMEMBERED = 64
LR_DROP = 2 / 3
"""A learning rate cut of more than a third lowers the loss by itself."""


@dataclass(frozen=True, kw_only=True)
class LossThresholds:
    """Thresholds for approaching overfitting, and overfitting, from a loss alone.

    They are fitted on the fitting half of the benchmark, without LAR: docs/log.md.

    Attributes:
        memorized: Limit of the memorized share, less `errors` of its standard errors.
        errors: Number of standard errors of the sum of drops to subtract.
        falls: "approaching" needs a loss that falls inside a pass by less than this share of the unseen samples' loss.
            "overfitting" needs one that does not fall there.
        hold: Number of successive readings beyond the limits.
        keep: An alarm stands until the memorized share is below this share of its threshold.
    """

    memorized: float = 0.35
    errors: float = 2.0
    falls: float = 0.03
    hold: int = 3
    keep: float = 0.75


@dataclass(frozen=True, kw_only=True)
class LossSignals:
    """Signals of one reading.

    Attributes:
        loss: The mean of the last six training losses.
        drops: The sum of the drops where passes began.
        share: `drops / (loss + drops)`, from 0 to 1, and 0 where the sum is below zero.
        share_low: The same, less the standard errors.
        inside: Change of the loss in a pass without the drop at its start, in nats, negative where it falls.
    """

    loss: float
    drops: float
    share: float
    share_low: float
    inside: float

    @property
    def unseen(self) -> float:
        """The loss that unseen samples would have: the training loss plus all its drops."""
        return self.loss + max(self.drops, 0.0)


def shared(drops: float, loss: float) -> float:
    """The memorized share `drops / (loss + drops)` of a positive loss, 0 where the sum of drops is negative.

    Example:
        >>> shared(1.0, 3.0), shared(-1.0, 3.0)
        (0.25, 0.0)
    """
    return max(drops, 0.0) / (loss + max(drops, 0.0))


class DropMemory:
    """Follows a series and sums the drops, and can rewind to any step.

    Args:
        errors: Number of standard errors that `share_low` subtracts.
    """

    def __init__(self, *, errors: float) -> None:
        self._errors = errors
        self._drops = History(("drops", "count"))
        self._sum, self._count = 0.0, 0
        self._last: list[tuple[int, LossSignals | None]] = []  # step and its signals, the latest last

    def follow(self, series: Series) -> None:
        """Process the reading that the series just took in."""
        step = series.last_step
        assert step is not None
        drop = last_drop(series)
        if drop is not None:
            self._sum, self._count = self._sum + drop, self._count + 1
        self._drops.append(step, self._sum, float(self._count))
        self._last = [*self._last, (step, self._signals(series))][-REMEMBERED:]

    def _signals(self, series: Series) -> LossSignals | None:
        seen = series.passes
        losses = series.recent("loss")
        losses = losses[np.isfinite(losses)]
        loss = float(losses[-2 * DROP_READINGS :].mean()) if losses.size else math.nan
        if seen is None or not loss > 0:
            return None
        scatter = noise(losses)
        error = scatter * math.sqrt(2 * self._count / DROP_READINGS) if math.isfinite(scatter) else 0.0
        return LossSignals(
            loss=loss,
            drops=self._sum,
            share=shared(self._sum, loss),
            share_low=shared(self._sum - self._errors * error, loss),
            inside=seen.inside * seen.steps_per_pass,
        )

    def held(self, hold: int) -> list[LossSignals]:
        """The signals of the last `hold` readings, empty unless each has some."""
        found = [signals for _, signals in self._last[-hold:] if signals is not None]
        return found if len(found) == hold else []

    def rewind(self, step: int) -> None:
        """Forget everything from this step on."""
        self._last = [each for each in self._last if each[0] < step]
        self._drops.truncate(step)
        known = self._drops.size > 0
        self._sum = float(self._drops.column("drops")[-1]) if known else 0.0
        self._count = round(float(self._drops.column("count")[-1])) if known else 0

    def state(self) -> dict[str, Any]:
        """The whole state, as lists and numbers for strict JSON."""
        return {
            "drops": self._drops.state(),
            "sum": self._sum,
            "count": self._count,
            "last": [[step, None if each is None else asdict(each)] for step, each in self._last],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], *, errors: float) -> DropMemory:
        """The memory that `state()` described."""
        memory = cls(errors=errors)
        memory._drops = History.from_state(state["drops"])
        memory._sum, memory._count = state["sum"], state["count"]
        memory._last = [(step, None if each is None else LossSignals(**each)) for step, each in state["last"]]
        return memory


def by_drops(last: Sequence[LossSignals], t: LossThresholds, previous: Outcome | None) -> tuple[Outcome, str]:
    """The rule: outcome and reason from the last readings, which must all exceed the limits."""
    now = last[-1]
    said = f"the training loss has lost {now.share:.0%} of what unseen samples would have, in drops where passes begin"
    beyond = all(each.share_low > t.memorized for each in last)
    stands = previous in OF_OVERFITTING and now.share > t.keep * t.memorized
    hardly = [each.inside > -t.falls * each.unseen for each in last]
    inside = "rises" if now.inside > 0 else "hardly falls" if hardly[-1] else "falls"
    if (beyond and all(each.inside > 0 for each in last)) or (stands and previous == "overfitting"):
        return "overfitting", f"{said}; inside a pass it {inside}."
    if (beyond and all(hardly)) or stands:
        return "approaching", f"{said}; inside a pass it {inside}."
    if beyond:
        return "healthy", f"{said}, but inside a pass it still falls."
    errors = f" with {t.errors:g} standard errors taken off" if t.errors else ""
    return "healthy", f"{said}; {t.memorized:.0%}{errors} mark the approach of overfitting."


def last_drop(series: Series) -> float | None:
    """The loss drop where a pass began three readings ago: mean of three readings before, less three after.

    Where the six readings span more than two passes, the difference holds several drops and is divided accordingly.
    It is None where no pass began then, or where the learning rate dropped.
    """
    if series.last("loss") is None:
        return None  # counted with an earlier reading
    completed, losses, rates = (series.recent(name) for name in ("completed", "loss", "lr"))
    known = np.isfinite(completed) & np.isfinite(losses)
    completed, losses, rates = (each[known][-2 * DROP_READINGS :] for each in (completed, losses, rates))
    n = DROP_READINGS
    if losses.size < 2 * n:
        return None
    # A mean loss across the boundary of two passes belongs to the pass with most of its steps.
    begun = round(completed[n]) - round(completed[n - 1])
    between = float(completed[n:].mean() - completed[:n].mean())
    if begun < 1 or between <= 0 or (rates[1:] < LR_DROP * rates[:-1]).any():
        return None
    drop: float = losses[:n].mean() - losses[n:].mean()
    return float(drop * begun / between)
