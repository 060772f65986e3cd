"""Logs without LAR: what the training loss and the epoch alone can tell of overfitting.

Method: inside a pass over the data no sample is met twice; where the next pass begins, the training loss drops by what
was memorized of its samples. The sum of these drops, as a share of itself and the loss that is left, is the **memorized
share**: of the loss that unseen samples would have, the part that is gone by seeing the same samples again. It is large
in healthy runs, too, while the loss still falls inside passes; so both are asked. The alternative, the size of the last
drop, comes later (docs/log.md). The verdict needs a loss and an epoch at three readings a pass or more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from logalign.diagnosis.epochs import DROP_READINGS, MIN_READINGS_PER_PASS, passes
from logalign.diagnosis.judge import VERDICT, Judge, Judgment, Standing
from logalign.diagnosis.series import Series
from logalign.diagnosis.trend import History, noise
from logalign.diagnosis.verdict import Outcome, Regime, Verdict
from logalign.readings import Reading

REMEMBERED = 64
ALARMS = ("approaching", "overfitting")
LR_DROP = 2 / 3
"""A learning rate that drops by more than a third lowers the loss by itself."""

AFTERWARDS = (
    "LAR cannot be computed from this log afterwards; logalign.watch(model, run=...) or a callback of "
    "logalign.integrations records it in the next training"
)
LIMITS = (
    AFTERWARDS,
    "the verdict rests on the loss and the epoch alone: it cannot see overfitting before the loss has dropped with the "
    "passes, nor any in readings as far apart as the passes",
)
SUGGESTIONS: Mapping[Outcome, str] = {
    "healthy": "Train on; record LAR in the next training.",
    "approaching": "Save a checkpoint now: more training on this data will soon not help; get more data, or stronger "
    "regularization.",
    "overfitting": "Stop, go back to a checkpoint from before it began, and use more data or stronger regularization.",
    "undecidable": "Log loss and epoch, as a fraction, several times in each pass over the data; and record LAR.",
}


@dataclass(frozen=True, kw_only=True)
class LossThresholds:
    """When a loss alone counts as approaching overfitting, and as overfitting.

    Fitted on the fitting half of the benchmark, from which LAR was taken away: docs/log.md.

    Attributes:
        memorized: The memorized share, less `errors` of its standard errors.
        errors: So many standard errors of the sum of drops are taken off.
        falls: "approaching" where the loss falls inside a pass by less than this share of what unseen samples would
            have; "overfitting" where it does not fall there.
        hold: So many readings in a row have to be beyond.
        keep: An alarm stands until the memorized share is below this share of its threshold.
    """

    memorized: float = 0.35
    errors: float = 2.0
    falls: float = 0.03
    hold: int = 3
    keep: float = 0.75


@dataclass(frozen=True, kw_only=True)
class LossSignals:
    """What one reading shows.

    Attributes:
        loss: The mean of the last six training losses.
        drops: The sum of the drops where passes began.
        share: `drops / (loss + drops)`, from 0 to 1; 0 where the sum is below zero.
        share_low: The same, less the standard errors.
        inside: Change of the loss in a pass, beside the drop at its beginning, in nats; negative where it falls.
    """

    loss: float
    drops: float
    share: float
    share_low: float
    inside: float

    @property
    def unseen(self) -> float:
        """The loss that unseen samples would have: the training loss and all that it dropped."""
        return self.loss + max(self.drops, 0.0)


def shared(drops: float, loss: float) -> float:
    """The memorized share `drops / (loss + drops)` of a positive loss; 0 where the sum of drops is below zero.

    Example:
        >>> shared(1.0, 3.0), shared(-1.0, 3.0)
        (0.25, 0.0)
    """
    return max(drops, 0.0) / (loss + max(drops, 0.0))


class LossDetector(Judge):
    """Tells from the training loss and the epoch alone whether a run overfits, reading by reading, in constant memory.

    Args:
        thresholds: When what counts.

    Example:
        >>> detector = LossDetector()
        >>> print(detector.update(Reading(step=10, lar=None, loss=2.5, epoch=0.1)).headline())
        healthy (without LAR) at step 10, since step 10
    """

    regime: Regime = "loss"
    needs_lar: ClassVar[bool] = False
    known_limits: ClassVar[tuple[str, ...]] = LIMITS

    def __init__(self, *, thresholds: LossThresholds | None = None) -> None:
        self.thresholds = LossThresholds() if thresholds is None else thresholds
        self._drops = History(("drops", "count"))
        self._sum, self._count = 0.0, 0
        self._last: list[tuple[int, LossSignals | None]] = []  # step and what it showed, the latest last
        self._reason: str | None = None
        super().__init__()

    def update(self, reading: Reading) -> Verdict:
        """As of `Judge`; the reading's reason says whether its step is an epoch."""
        self._reason = reading.reason
        return super().update(reading)

    def _follow(self) -> None:
        step = self.series.last_step
        assert step is not None
        drop = last_drop(self.series)
        if drop is not None:
            self._sum, self._count = self._sum + drop, self._count + 1
        self._drops.append(step, self._sum, float(self._count))
        self._last = [*self._last, (step, self._signals())][-REMEMBERED:]

    def _signals(self) -> LossSignals | None:
        seen = passes(*self.series.past("epoch", "completed", "loss"))
        losses = self.series.recent("loss")
        losses = losses[np.isfinite(losses)]
        loss = float(losses[-2 * DROP_READINGS :].mean()) if losses.size else math.nan
        if seen is None or not loss > 0:
            return None
        scatter = noise(losses)
        error = scatter * math.sqrt(2 * self._count / DROP_READINGS) if math.isfinite(scatter) else 0.0
        low = self._sum - self.thresholds.errors * error
        return LossSignals(
            loss=loss,
            drops=self._sum,
            share=shared(self._sum, loss),
            share_low=shared(low, loss),
            inside=seen.inside * seen.steps_per_pass,
        )

    def _forget(self, step: int) -> None:
        self._last = [each for each in self._last if each[0] < step]
        self._drops.truncate(step)
        known = self._drops.size > 0
        self._sum = float(self._drops.column("drops")[-1]) if known else 0.0
        self._count = round(float(self._drops.column("count")[-1])) if known else 0

    def _judge(self, before: Standing) -> Judgment:
        t = self.thresholds
        found = [signals for _, signals in self._last[-t.hold :] if signals is not None]
        outcome, reason = self._said(found if len(found) == t.hold else [], before.get(VERDICT))
        rests_on = (
            f"the training loss and the epoch alone; a memorized share of {t.memorized:.0%}, {t.errors:g} standard "
            f"errors taken off, and a loss that falls by less than {t.falls:.0%} of what unseen samples would have in "
            "a pass mark the approach of overfitting, fitted on the fitting half of the benchmark without its LAR"
        )
        last = found[-1] if found else None
        return Judgment(
            outcome=outcome,
            reason=reason,
            suggestion=SUGGESTIONS[outcome],
            evidence={
                "memorized_share": None if last is None else last.share,
                "memorized_share_low": None if last is None else last.share_low,
                "memorized": None if last is None else last.drops,
                "inside_pass": None if last is None else last.inside,
                "loss": self.series.last("loss"),
                "epoch": self.series.last("epoch"),
            },
            basis=(rests_on,) if outcome != "undecidable" else (),
            limits=() if self._reason is None or " no step" not in self._reason else (self._reason,),
        )

    def _said(self, last: Sequence[LossSignals], previous: Outcome | None) -> tuple[Outcome, str]:
        """The rule: outcome and reason by the last readings, all of which have to be beyond."""
        t, epoch = self.thresholds, self.series.last("epoch")
        if epoch is None:
            return "undecidable", "no epoch is recorded, so that it is not known whether data has repeated."
        if epoch < 1:
            return "healthy", f"no data has repeated so far (epoch {epoch:.2f})."
        if not last:
            return "undecidable", self._why_undecidable()
        now = last[-1]
        said = (
            f"the training loss has lost {now.share:.0%} of what unseen samples would have, in drops where passes begin"
        )
        beyond = all(each.share_low > t.memorized for each in last)
        stands = previous in ALARMS and now.share > t.keep * t.memorized
        hardly = [each.inside > -t.falls * each.unseen for each in last]
        inside = "rises" if now.inside > 0 else "hardly falls" if hardly[-1] else "falls"
        if (beyond and all(each.inside > 0 for each in last)) or (stands and previous == "overfitting"):
            return "overfitting", f"{said}; inside a pass it {inside}."
        if (beyond and all(hardly)) or stands:
            return "approaching", f"{said}; inside a pass it {inside}."
        if beyond:
            return "healthy", f"{said}, but inside a pass it still falls."
        return "healthy", f"{said}; {t.memorized:.0%} mark the approach of overfitting."

    def _why_undecidable(self) -> str:
        losses = self.series.past("loss")[1]
        if not np.isfinite(losses).any():
            return "no training loss is recorded."
        epochs, at = self.series.recent("epoch"), self.series.steps
        known = np.isfinite(epochs)
        if known.sum() > 1 and float(np.ptp(epochs[known])) * MIN_READINGS_PER_PASS > known.sum() - 1:
            return "readings are about as far apart as the passes over the data: drops between passes are not seen."
        last = self.series.last("loss")
        if last is not None and last <= 0:
            return "the loss is not above zero, so that no share of it can be taken."
        return f"too little of the data has repeated so far to see drops between passes ({at.size} readings)."

    def _own_state(self) -> dict[str, Any]:
        return {
            "drops": self._drops.state(),
            "sum": self._sum,
            "count": self._count,
            "last": [[step, None if each is None else asdict(each)] for step, each in self._last],
            "reason": self._reason,
        }

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        self._drops = History.from_state(state["drops"])
        self._sum, self._count, self._reason = state["sum"], state["count"], state["reason"]
        self._last = [(step, None if each is None else LossSignals(**each)) for step, each in state["last"]]


def last_drop(series: Series) -> float | None:
    """By how much the loss dropped where a pass began three readings ago: means of three before, less three after.

    Where the six readings are of more than two passes, the difference is of so many more drops, and divided by them.
    None where no pass began just then, or where the learning rate dropped meanwhile.
    """
    if series.last("loss") is None:
        return None  # counted with the reading that had one
    completed, losses, rates = (series.recent(name) for name in ("completed", "loss", "lr"))
    known = np.isfinite(completed) & np.isfinite(losses)
    completed, losses, rates = (each[known][-2 * DROP_READINGS :] for each in (completed, losses, rates))
    n = DROP_READINGS
    if losses.size < 2 * n:
        return None
    # A mean over the end of one pass and the beginning of the next belongs to that of most of its steps.
    begun = round(completed[n]) - round(completed[n - 1])
    between = float(completed[n:].mean() - completed[:n].mean())
    if begun < 1 or between <= 0 or (rates[1:] < LR_DROP * rates[:-1]).any():
        return None
    drop: float = losses[:n].mean() - losses[n:].mean()
    return float(drop * begun / between)
