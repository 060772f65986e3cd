"""Judge: the common base of the online detectors, a thin state around pure rules.

A detector takes readings one by one, in constant memory and time. Its verdict depends on the readings alone, not on
when it was read, saved or loaded.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from logalign.diagnosis.outcome import Outcome
from logalign.diagnosis.series import Series
from logalign.diagnosis.verdict import KNOWN_LIMITS, Number, Regime, Verdict
from logalign.errors import InputError
from logalign.runs.reading import Reading

STATE_VERSION = 4
REMEMBERED_CHANGES = 16
VERDICT = "verdict"
INTERPOLATION = 0.05
"""Share of the initial loss under which a network interpolates its data."""
BEGINS = (0.85, 1.5)
"""Range of an untrained classifier's first loss, as a multiple of log m."""

CHECKPOINT = "{checkpoint}"
"""Placeholder in a suggestion for the step whose checkpoint to keep: the first step of the alarm."""

Standing = Mapping[str, Outcome]
"""The current outcome of the verdict (`VERDICT`) and of each kind of evidence, by name."""


def loss_limit(series: Series, share: float = INTERPOLATION, *, any_loss: bool = False) -> float | None:
    """The training loss under which a network interpolates its data, None where unknown.

    The limit is `share` of the lesser of log m and the first loss, for a softmax cross entropy, which begins near
    log m. A loss that begins elsewhere is of another kind or from a pretrained network, and says nothing about
    interpolation. `any_loss` treats it as a cross entropy.
    """
    if series.m is None or series.m < 2:
        return None
    guess = math.log(series.m)
    if any_loss:
        return share * guess
    first = None if series.first_loss is None else series.first_loss[1]
    if first is None or not BEGINS[0] * guess <= first <= BEGINS[1] * guess:
        return None
    return share * min(first, guess)


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """A rule's result for one step: a verdict without the steps.

    `standing` is the outcome of each kind of evidence, where a rule has several. An alarm of one kind then stands by
    itself and does not make an alarm of another kind more likely.
    """

    outcome: Outcome
    reason: str
    suggestion: str
    evidence: Mapping[str, Number] = field(default_factory=dict)
    basis: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    sure: str = ""
    standing: Standing = field(default_factory=dict)


class Judge(ABC):
    """Takes readings one by one and updates the verdict by the rules of its subclass.

    Args:
        series: Readings shared with another judge, which adds them. The caller then calls `take` instead of `update`.
            By default the judge has its own series.

    Attributes:
        regime: The detector's regime.
        series: The readings so far.
    """

    regime: Regime
    needs_lar: ClassVar[bool] = True
    known_limits: ClassVar[tuple[str, ...]] = KNOWN_LIMITS

    def __init__(self, series: Series | None = None) -> None:
        self.series = Series(needs_lar=self.needs_lar) if series is None else series
        # For the verdict and each kind of evidence: the first step of each outcome, the current one last.
        self._changes: dict[str, list[tuple[int, Outcome]]] = {}
        self._before: dict[str, Outcome] = {}  # outcomes before the last reading
        self._conclude()

    @property
    def verdict(self) -> Verdict:
        """The verdict after the last reading."""
        return self._verdict

    def update(self, reading: Reading) -> Verdict:
        """Add one reading.

        The judge skips and counts a reading without a defined LAR. A step that is not above the last means that
        training resumed there, so the judge forgets everything from that step on.

        Raises:
            InputError: its layer, or the layer's shape, differs from the earlier readings'.
        """
        self.check(reading)
        if self.series.goes_back(reading):
            self.series.rewind(reading.step)
            self.rewind(reading.step)
        return self.take(is_new=self.series.add(reading))

    def take(self, *, is_new: bool) -> Verdict:
        """Judge the last reading of the series, where `is_new` says if the series added it."""
        if is_new:
            self._follow()
        self._before = {kind: changes[-1][1] for kind, changes in self._changes.items()}
        self._conclude()
        return self._verdict

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as lists and numbers for strict JSON and `torch.save`."""
        return {"series": self.series.state(), **self.state_beside_series()}

    def state_beside_series(self) -> dict[str, Any]:
        """The state without the readings, where two judges share a series."""
        return {
            "version": STATE_VERSION,
            "regime": self.regime,
            "changes": {kind: [list(change) for change in changes] for kind, changes in self._changes.items()},
            "before": dict(self._before),
            "own": self._own_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict()` returned, or a state without readings around the current series.

        Raises:
            InputError: it is not the state of such a detector.
        """
        if state.get("version") != STATE_VERSION or state.get("regime") != self.regime:
            raise InputError(
                f"state: expected what {type(self).__name__}.state_dict() gives (version {STATE_VERSION}), found "
                f"version {state.get('version')!r}, regime {state.get('regime')!r}"
            )
        if "series" in state:
            self.series = Series.from_state(state["series"])
        self._changes = {kind: [(step, said) for step, said in changes] for kind, changes in state["changes"].items()}
        self._before = dict(state["before"])
        self._load_own_state(state["own"])
        self._conclude()

    def check(self, reading: Reading) -> None:
        """Reject a reading before it changes anything.

        Raises:
            InputError: its layer or shape differs from the earlier readings'.
        """
        self.series.check(reading)

    @abstractmethod
    def _follow(self) -> None:
        """Process the reading that the series just took in."""

    @abstractmethod
    def _forget(self, step: int) -> None:
        """Forget the conclusions from this step on."""

    @abstractmethod
    def _judge(self, before: Standing) -> Judgment:
        """Apply the rules, given the outcomes before the last reading."""

    @abstractmethod
    def _own_state(self) -> dict[str, Any]: ...

    @abstractmethod
    def _load_own_state(self, state: Mapping[str, Any]) -> None: ...

    def rewind(self, step: int) -> None:
        """Forget the conclusions from this step on, but leave the series to its own rewind."""
        kept = {kind: [each for each in changes if each[0] < step] for kind, changes in self._changes.items()}
        self._changes = {kind: changes for kind, changes in kept.items() if changes}
        self._forget(step)

    def _conclude(self) -> None:
        step = self.series.last_step
        judgment = self._judge(self._before) if step is not None else _nothing_to_judge(self.series)
        if step is not None:
            for kind, outcome in {VERDICT: judgment.outcome, **judgment.standing}.items():
                changes = self._changes.get(kind, [])
                if not changes or changes[-1][1] != outcome:
                    self._changes[kind] = [*changes, (step, outcome)][-REMEMBERED_CHANGES:]
        self._verdict = Verdict(
            outcome=judgment.outcome,
            regime=self.regime if step is not None else "unknown",
            step=step,
            since_step=self._changes[VERDICT][-1][0] if step is not None else None,
            reason=judgment.reason,
            suggestion=judgment.suggestion.replace(CHECKPOINT, f"{self._alarmed_since() or 0:,}"),
            evidence=judgment.evidence,
            basis=judgment.basis,
            sure=judgment.sure,
            limits=(*judgment.limits, *_limits_of(self.series), *self.known_limits),
        )

    def _alarmed_since(self) -> int | None:
        """The first step of the current approaching or overfitting verdicts."""
        since = None
        for step, outcome in reversed(self._changes.get(VERDICT, [])):
            if outcome not in ("approaching", "overfitting"):
                break
            since = step
        return since


def frozen(series: Series) -> bool:
    """True where the last readings all have the same LAR, so nothing is trained or nothing is measured."""
    lar = series.recent("lar")
    return lar.size > 1 and bool(np.ptp(lar) == 0)


FROZEN = Judgment(
    outcome="undecidable",
    reason="LAR has had the very same value in all of the last readings.",
    suggestion="Check that the model is being trained and that the layer's inputs change.",
)


def _nothing_to_judge(series: Series) -> Judgment:
    if not series.skipped:
        return Judgment(
            outcome="undecidable", reason="no reading has been taken yet.", suggestion="Train on, and call step()."
        )
    return Judgment(
        outcome="undecidable",
        reason=f"none of {series.skipped} readings has a defined LAR.",
        suggestion="Look at the readings' field `reason`.",
    )


def _limits_of(series: Series) -> tuple[str, ...]:
    limits = []
    if series.skipped:
        limits.append(f"{series.skipped} readings have no defined LAR and were passed over")
    if series.resumes:
        limits.append(f"{series.resumes} times a step was not above the one before: taken as a resume from that step")
    return tuple(limits)
