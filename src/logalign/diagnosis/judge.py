"""Judge: what the online detectors have in common, a thin state around pure rules.

A detector takes readings one by one, in constant memory and time. Its verdict depends on the readings alone: not on
when it was asked, saved or loaded.
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
"""Share of the loss that it began with, under which a network interpolates its data."""
BEGINS = (0.85, 1.5)
"""The first loss of an untrained classifier, as a multiple of log m: between these."""

CHECKPOINT = "{checkpoint}"
"""Stands in a suggestion for the step whose checkpoint to keep: that from which there has been an alarm."""

Standing = Mapping[str, Outcome]
"""The outcome that stands, of the verdict (`VERDICT`) and of each kind of evidence by name."""


def loss_limit(series: Series, share: float = INTERPOLATION, *, any_loss: bool = False) -> float | None:
    """The training loss under which a network interpolates its data; None where that cannot be known.

    `share` of the lesser of log m and the first loss, for a softmax cross entropy, which begins near log m. A loss that
    begins elsewhere is another one, or that of a network that was trained before, and says nothing about interpolation
    unless `any_loss`: then it is taken for a cross entropy.
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
    """What a rule says of one step: a verdict but for the steps.

    `standing` is the outcome by each kind of evidence, where a rule has several, so that an alarm of one kind stands by
    itself and makes no other kind more ready to give one.
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
    """Takes readings one by one and keeps the verdict up to date; subclasses hold the rules.

    Args:
        series: The readings, where another judge follows the same ones and takes them in: then `take` is called instead
            of `update`. By default a series of its own.

    Attributes:
        regime: Which logic this is.
        series: The readings so far.
    """

    regime: Regime
    needs_lar: ClassVar[bool] = True
    known_limits: ClassVar[tuple[str, ...]] = KNOWN_LIMITS

    def __init__(self, series: Series | None = None) -> None:
        self.series = Series(needs_lar=self.needs_lar) if series is None else series
        # Of the verdict and of each kind of evidence: since when which outcome has stood, the current one last.
        self._changes: dict[str, list[tuple[int, Outcome]]] = {}
        self._before: dict[str, Outcome] = {}  # what stood before the last reading
        self._conclude()

    @property
    def verdict(self) -> Verdict:
        """The verdict after the last reading."""
        return self._verdict

    def update(self, reading: Reading) -> Verdict:
        """Take one reading in.

        A reading without a defined LAR is passed over and counted. One whose step is not above the last means that
        training was resumed there: what was seen at that step and beyond is forgotten.

        Raises:
            InputError: it is of another layer than the readings before, or of a layer of another shape.
        """
        self.check(reading)
        if self.series.goes_back(reading):
            self.series.rewind(reading.step)
            self.rewind(reading.step)
        return self.take(is_new=self.series.add(reading))

    def take(self, *, is_new: bool) -> Verdict:
        """Judge the last reading of the series; `is_new` says whether the series took it in."""
        if is_new:
            self._follow()
        self._before = {kind: changes[-1][1] for kind, changes in self._changes.items()}
        self._conclude()
        return self._verdict

    def state_dict(self) -> dict[str, Any]:
        """All that it knows, as lists and numbers that strict JSON and `torch.save` can hold."""
        return {"series": self.series.state(), **self.state_beside_series()}

    def state_beside_series(self) -> dict[str, Any]:
        """The same without the readings, where two judges have one series."""
        return {
            "version": STATE_VERSION,
            "regime": self.regime,
            "changes": {kind: [list(change) for change in changes] for kind, changes in self._changes.items()},
            "before": dict(self._before),
            "own": self._own_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict()` gave; from a state beside the series, with the series that it has.

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
        """Refuse a reading before anything is changed by it.

        Raises:
            InputError: it is of another layer than the readings before, or of another shape.
        """
        self.series.check(reading)

    @abstractmethod
    def _follow(self) -> None:
        """Keep up with a reading that the series has just taken in."""

    @abstractmethod
    def _forget(self, step: int) -> None:
        """Forget what was concluded from readings at this step and beyond."""

    @abstractmethod
    def _judge(self, before: Standing) -> Judgment:
        """What the rules say now, given what stood before the last reading."""

    @abstractmethod
    def _own_state(self) -> dict[str, Any]: ...

    @abstractmethod
    def _load_own_state(self, state: Mapping[str, Any]) -> None: ...

    def rewind(self, step: int) -> None:
        """Forget what was concluded at this step and beyond; the series is taken back by itself."""
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
        """The step from which the verdict has been approaching or overfitting."""
        since = None
        for step, outcome in reversed(self._changes.get(VERDICT, [])):
            if outcome not in ("approaching", "overfitting"):
                break
            since = step
        return since


def frozen(series: Series) -> bool:
    """Whether the last readings all have the very same LAR: then nothing is trained, or nothing is measured."""
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
