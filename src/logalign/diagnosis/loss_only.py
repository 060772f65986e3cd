"""Logs without LAR: detects overfitting from the training loss and the epoch alone.

`drops.py` holds the rule. It needs a loss and an epoch at three or more readings a pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from logalign.diagnosis.drops import DropMemory, LossSignals, LossThresholds, by_drops
from logalign.diagnosis.epochs import MIN_READINGS_PER_PASS
from logalign.diagnosis.judge import VERDICT, Judge, Judgment, Standing
from logalign.diagnosis.outcome import Outcome
from logalign.diagnosis.verdict import Regime, Verdict
from logalign.runs.reading import Reading

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


class LossDetector(Judge):
    """Detects overfitting from the training loss and the epoch alone, reading by reading, in constant memory.

    Args:
        thresholds: Limits of the rule.

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
        self._drops = DropMemory(errors=self.thresholds.errors)
        self._reason: str | None = None
        super().__init__()

    def update(self, reading: Reading) -> Verdict:
        """Judge a reading, and keep its reason: it says if the step is an epoch."""
        self._reason = reading.reason
        return super().update(reading)

    def _follow(self) -> None:
        self._drops.follow(self.series)

    def _forget(self, step: int) -> None:
        self._drops.rewind(step)

    def _judge(self, before: Standing) -> Judgment:
        t = self.thresholds
        found = self._drops.held(t.hold)
        outcome, reason = self._said(found, before.get(VERDICT))
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
        """Return outcome and reason by the last readings, which all have to exceed a limit."""
        t, epoch = self.thresholds, self.series.last("epoch")
        if epoch is None:
            return "undecidable", "no epoch is recorded, so that it is not known whether data has repeated."
        if epoch < 1:
            return "healthy", f"no data has repeated so far (epoch {epoch:.2f})."
        if not last:
            return "undecidable", self._why_undecidable()
        return by_drops(last, t, previous)

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
        return {"drops": self._drops.state(), "reason": self._reason}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        self._drops = DropMemory.from_state(state["drops"], errors=self.thresholds.errors)
        self._reason = state["reason"]
