"""Detector: judges a run online by its regime; `diagnose` does the same for a recorded run.

The grokking detector applies where data repeats and the training loss is under 5 % of log m, the decline detector
elsewhere. Both run all the time, so the regime may change during a training.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from logalign.diagnosis.baseline import Baseline
from logalign.diagnosis.grokking import GrokDetector, GrokThresholds
from logalign.diagnosis.held_out import HeldOutMemory
from logalign.diagnosis.loss_only import LossDetector
from logalign.diagnosis.outcome import ALARMS, Outcome
from logalign.diagnosis.overfit_rule import OverfitThresholds
from logalign.diagnosis.overfitting import OverfitDetector
from logalign.diagnosis.present import Present
from logalign.diagnosis.series import Series
from logalign.diagnosis.verdict import Episode, Verdict, combined
from logalign.errors import InputError
from logalign.runs.reading import Reading, Readings, never_tried
from logalign.runs.run import Run, RunLike, main_layer, open_run

AskedRegime = Literal["auto", "grokking", "decline", "both"]
ASKED_REGIMES: tuple[AskedRegime, ...] = ("auto", "grokking", "decline", "both")
NO_BASELINE = "the baseline is not used: a log without LAR cannot be compared with it"
STATE_VERSION = 3
REMEMBERED_EPISODES = 64


class Detector:
    """Judges a training reading by reading, in constant memory and time.

    Args:
        baseline: The decline detector compares with it, and also uses samples that repeat.
        regime: "grokking" or "decline" uses one detector. "both" takes the outcome that comes first in
            `verdict.PRECEDENCE`. "auto" uses the grokking detector while the network interpolates repeated data and
            that detector can decide, and the decline detector otherwise. While no reading has a LAR, "auto" uses only
            loss and epoch.
        grokking: Thresholds of the grokking detector.
        decline: Thresholds of the decline detector.

    Raises:
        InputError: the regime is unknown.

    Example:
        >>> detector = Detector()
        >>> detector.update(Reading(step=0, lar=0.5, epoch=0.0)).outcome
        'healthy'
    """

    def __init__(
        self,
        *,
        baseline: Baseline | None = None,
        regime: AskedRegime = "auto",
        grokking: GrokThresholds | None = None,
        decline: OverfitThresholds | None = None,
    ) -> None:
        check_regime(regime)
        self.regime = regime
        series = Series()  # both detectors share the readings
        any_loss = regime in ("grokking", "both")
        self.grokking = GrokDetector(thresholds=grokking, any_loss=any_loss, series=series)
        self.decline = OverfitDetector(baseline=baseline, thresholds=decline, series=series)
        self.without_lar: LossDetector | None = LossDetector()  # None once LAR was tried
        self._held_out = HeldOutMemory()
        self._present = Present()
        self._episodes: list[Episode] = []  # outcomes with first and last step, latest last
        self._step: int | None = None  # the last reading's
        self._verdict = self._judged()

    @property
    def verdict(self) -> Verdict:
        """The verdict after the last reading."""
        return self._verdict

    def update(self, reading: Reading) -> Verdict:
        """Add one reading; `OverfitDetector.update` defines how resumed, duplicated and undefined readings count.

        Raises:
            InputError: its layer differs from the earlier readings', or its shape from theirs or the baseline's.
        """
        judges, series = (self.decline, self.grokking), self.decline.series
        self.decline.check(reading)
        if series.goes_back(reading):
            series.rewind(reading.step)
            for judge in judges:
                judge.rewind(reading.step)
        is_new = series.add(reading)
        for judge in judges:
            judge.take(is_new=is_new)
        self._held_out.update(reading)
        if not never_tried(reading):
            self.without_lar = None
        elif self.without_lar is not None:
            self.without_lar.update(reading)
        if self._step is not None and reading.step <= self._step:
            self._present.rewind(reading.step)
            kept = [each for each in self._episodes if each.first < reading.step]
            self._episodes = [replace(each, last=min(each.last, reading.step - 1)) for each in kept]
        self._step = reading.step
        self._present.take(reading)
        said = self._judged()
        self._remember(said.outcome, reading.step)
        self._verdict = self._with_episodes(said)
        return self._verdict

    def _judged(self) -> Verdict:
        """The rules' verdict on the last reading, without earlier outcomes."""
        now = self._present.judgment
        if now is not None:
            return Verdict(
                outcome=now.outcome,
                regime="unknown",
                step=self._step,
                since_step=self._step,
                reason=now.reason,
                suggestion=now.suggestion,
                limits=self.decline.verdict.limits,
            )
        without_lar = self.without_lar
        if without_lar is not None and without_lar.series.taken and self.regime == "auto":
            verdict = without_lar.verdict
            return verdict if self.decline.baseline is None else replace(verdict, limits=(NO_BASELINE, *verdict.limits))
        grokking, decline = self.grokking.verdict, self.decline.verdict
        if self.regime == "grokking":
            return grokking
        if self.regime == "decline":
            return decline
        if self.regime == "both":
            return combined(grokking, decline)
        signals = self.grokking.signals
        if not (signals.interpolates and signals.repeats):
            return decline
        if grokking.outcome != "undecidable":
            return grokking
        if decline.outcome != "undecidable":
            return decline
        return replace(grokking, reason=f"{grokking.reason} And: {decline.reason}", suggestion=decline.suggestion)

    def _remember(self, outcome: Outcome, step: int) -> None:
        last = self._episodes[-1] if self._episodes else None
        if last is not None and last.outcome == outcome:
            self._episodes[-1] = replace(last, last=step)
        else:
            self._episodes = [*self._episodes, Episode(outcome, step, step)][-REMEMBERED_EPISODES:]

    def _with_episodes(self, said: Verdict) -> Verdict:
        """Add the first step of the outcome, alarms that have ended, and held-out losses that disagree."""
        if not self._episodes:
            return said
        ended = tuple(each for each in self._episodes[:-1] if each.outcome in ALARMS)
        held_out = self._held_out.against(said.outcome)
        return replace(said, since_step=self._episodes[-1].first, earlier=ended, held_out=held_out)

    def state_dict(self) -> dict[str, Any]:
        """The state without baseline and thresholds, as lists and numbers for JSON and `torch.save`."""
        return {
            "version": STATE_VERSION,
            "series": self.decline.series.state(),
            "grokking": self.grokking.state_beside_series(),
            "decline": self.decline.state_beside_series(),
            "without_lar": None if self.without_lar is None else self.without_lar.state_dict(),
            "held_out": self._held_out.state(),
            "present": self._present.state(),
            "episodes": [[each.outcome, each.first, each.last] for each in self._episodes],
            "step": self._step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict()` returned.

        Raises:
            InputError: it is not the state of a detector.
        """
        if state.get("version") != STATE_VERSION:
            raise InputError(
                f"state: expected what Detector.state_dict() gives (version {STATE_VERSION}), found "
                f"version {state.get('version')!r}"
            )
        self.grokking.series = self.decline.series = Series.from_state(state["series"])
        self.grokking.load_state_dict(state["grokking"])
        self.decline.load_state_dict(state["decline"])
        self.without_lar = None if state["without_lar"] is None else LossDetector()
        if self.without_lar is not None:
            self.without_lar.load_state_dict(state["without_lar"])
        self._held_out = HeldOutMemory.from_state(state["held_out"])
        self._present = Present.from_state(state["present"])
        self._episodes = [Episode(outcome, first, last) for outcome, first, last in state["episodes"]]
        self._step = state["step"]
        self._verdict = self._with_episodes(self._judged())


def diagnose(
    run: str | os.PathLike[str] | Run | Iterable[Reading | Readings],
    *,
    baseline: Baseline | RunLike | Sequence[RunLike] | None = None,
    regime: AskedRegime = "auto",
    thresholds: OverfitThresholds | None = None,
) -> Verdict:
    """Diagnose a recorded run: one of the outcomes of `Verdict`, with its reason.

    A `Detector` takes the readings one by one, so monitoring a training and diagnosing its log afterwards agree. No
    outcome rests on held-out losses in the log. `Verdict.held_out` reports where they disagree. A log without LAR is
    judged by loss and epoch alone.

    Args:
        run: A path, a Run, or readings, such as those of a `Monitor`.
        baseline: A `Baseline`, or one or several runs without overfitting to make one from.
        regime: "auto", "grokking", "decline" or "both".
        thresholds: Thresholds of the decline detector, by default the benchmark's.

    Returns:
        The verdict after the last reading of the run's main layer.

    Raises:
        RunError: there is no readable run.
        InputError: the regime is unknown, no layer of several is the main one, the readings' shapes differ, or the
            baseline's does.

    Example:
        >>> readings = [Reading(step=step, lar=0.5 + 0.001 * step, epoch=step / 1000) for step in range(0, 100, 10)]
        >>> print(diagnose(readings).headline())
        healthy (decline regime) at step 90, since step 0
    """
    if isinstance(run, str | os.PathLike | Run):
        opened = run if isinstance(run, Run) else open_run(run)
        site, readings = opened.main, list(opened.readings)
    else:
        readings = [each.main if isinstance(each, Readings) else each for each in run]
        site = main_layer(sorted({reading.site for reading in readings}))
    detector = Detector(baseline=as_baseline(baseline), regime=regime, decline=thresholds)
    for reading in readings:
        if reading.site == site:
            detector.update(reading)
    return detector.verdict


def as_baseline(baseline: Baseline | RunLike | Sequence[RunLike] | None) -> Baseline | None:
    """Return a baseline unchanged, or make one from a run."""
    return baseline if baseline is None or isinstance(baseline, Baseline) else Baseline.from_run(baseline)


def check_regime(regime: str) -> None:
    """Reject an unknown regime.

    Raises:
        InputError: it is none of "auto", "grokking", "decline" and "both".
    """
    if regime not in ASKED_REGIMES:
        raise InputError(f"regime: expected one of {', '.join(ASKED_REGIMES)}, found {regime!r}")
