"""Overfitting: does LAR fall as in healthy training, or beyond it?

Method: LAR falls in healthy training, too, so the fall itself says nothing. What does is the deviation from a baseline
that does not overfit, beyond what scatter and seeds explain; and, where there is no baseline, a decline that speeds up
in log(step) though the learning rate has not changed. While no data has repeated, there is nothing to overfit to.
Held-out losses are never looked at.

Signals (`decline.py`) and rule (`decide`) are kept apart: the rule is a pure function of numbers and thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from logalign.diagnosis.baseline import Axis, Baseline, first_epoch
from logalign.diagnosis.decline import (
    LATELY,
    Deviation,
    Repetition,
    Trend,
    deviation,
    fitted_bins,
    reaches,
    repetition,
    smoothed_lar,
    spread,
    tokens_per_step,
    trend,
    x_of,
)
from logalign.diagnosis.judge import FROZEN, Judge, Judgment, frozen
from logalign.diagnosis.series import FORM_NAMES, FORMS, Series
from logalign.diagnosis.trend import lr_changes, warm_up_end
from logalign.diagnosis.verdict import Number, Outcome
from logalign.errors import InputError
from logalign.readings import Reading

INTERPOLATION = 0.05
"""Training loss, as a share of log m, under which a network interpolates its data."""
LR_DROP, LR_READINGS = 2 / 3, 30
EARLY_READINGS = 30
"""A classifier that has fitted its data within so many readings has done so before k could be seen to grow."""
REMEMBERED_HIGHS = 32
PLAIN = "lar"
RestsOn = Literal["epoch", "baseline", "passes", "spread", "acceleration", "nothing"]


@dataclass(frozen=True, kw_only=True)
class OverfitThresholds:
    """When a decline counts as approaching overfitting, and as overfitting.

    `form`, `smoothing`, `hold`, `approaching`, `memorization`, `decline` and `spread` are fitted on the fitting half of
    the benchmark, without a false alarm there, and scored on the other, where it is not so good: docs/benchmark.md.
    `overfitting`, `spread_alarm` and `learning` mark what is clearly beyond, and are not fitted; those of the
    acceleration were developed on one pair of runs (tests/data/lm_fresh.jsonl and lm_repeat200k.jsonl).

    Attributes:
        form: The form of LAR that is judged.
        smoothing: Readings of the running median.
        hold: So many running medians in a row have to be beyond.
        approaching: Deviation from the baseline.
        overfitting: Deviation from the baseline.
        keep: An outcome stands until all running medians are below this share of its threshold.
        sigmas: A deviation has to be beyond so many standard deviations of the band, too.
        between_one_run: Standard deviation between runs, where the baseline is one run and does not know it: assumed,
            the size of the scatter of one reading.
        schedule_factor: How much wider the band is where the schedule differs from the baseline's: assumed.
        shortfall: Without a baseline, LAR lost to the acceleration of the decline: "approaching".
        shortfall_alarm: The same, "overfitting"; only where the learning rate is recorded and has not changed.
        acceleration_sigmas: The acceleration has to be so many standard errors from none.
        memorization: Training loss lost by seeing the same samples again, in nats per unit of log(step), above which a
            run memorizes.
        decline: LAR lost per unit of log(step) over the last factor of 1.8 in steps, above which new directions come
            into use. "Approaching" is a run that memorizes and declines.
        spread: Factor by which vocabulary-centered k has grown since it was lowest, in a classifier: "approaching".
        spread_alarm: The same, "overfitting".
        learning: Training loss lost inside passes, in nats per unit of log(step). A run that memorizes and declines is
            "overfitting" once it is below 0, that is, once the loss rises inside passes, and stays so until it is above
            this.
        hold_repetition: So many readings in a row have to be beyond `memorization`, `decline` and `spread`.
    """

    form: str = "lar_vocab_centered"
    smoothing: int = 10
    hold: int = 3
    approaching: float = 0.03
    overfitting: float = 0.05
    keep: float = 0.75
    sigmas: float = 2.0
    between_one_run: float = 0.007
    schedule_factor: float = 2.0
    shortfall: float = 0.03
    shortfall_alarm: float = 0.06
    acceleration_sigmas: float = 3.0
    memorization: float = 0.6
    decline: float = 0.0625
    spread: float = 1.25
    spread_alarm: float = 1.8
    learning: float = 0.75
    hold_repetition: int = 3


@dataclass(frozen=True, kw_only=True)
class OverfitSignals:
    """The numbers that the rule looks at; None where a number could not be had.

    Attributes:
        step: Of the last reading.
        epoch: Passes over the data.
        loss: Training loss of the last reading.
        warm_up: Step of the last reading of the warm-up; None while it lasts.
        source: Where the baseline comes from; None without one.
        reached: Whether the baseline has a value at the last reading.
        deviation: In the form that is judged.
        deviation_plain: In the plain form.
        deviation_vocab_centered: In the vocabulary-centered form.
        deviation_centered: In the centered form.
        deviation_loss: Of the training loss, a rival signal.
        schedule_difference: How the schedule differs from the baseline's, in words.
        lr_just_changed: Whether the learning rate changed materially within the readings that are smoothed.
        lr_dropped: Whether it dropped by more than a third from one to the next of the readings that passes look at.
        repetition: What passes over the same data have lately made of the loss and of LAR.
        spread: By what factor vocabulary-centered k has grown since it was lowest.
        classifies: Whether the layer has no more outputs than inputs, as classifiers do and language models do not.
        spent_early: Whether the training loss was under 5 % of log m within the first 30 readings.
        trend: The slow signals.
        why_no_baseline: Why this run's own first epoch gives none.
    """

    step: int
    epoch: float | None
    loss: float | None
    warm_up: float | None
    source: Literal["runs", "first epoch"] | None
    reached: bool
    deviation: Deviation | None
    deviation_plain: Deviation | None = None
    deviation_vocab_centered: Deviation | None
    deviation_centered: Deviation | None
    deviation_loss: Deviation | None
    schedule_difference: str | None
    lr_just_changed: bool
    lr_dropped: bool
    repetition: Repetition | None
    spread: float | None
    classifies: bool
    spent_early: bool
    trend: Trend | None
    why_no_baseline: str | None

    def width(self, thresholds: OverfitThresholds) -> float | None:
        """Half the width of the band that a healthy run may lie in; None without a deviation."""
        found = self.deviation
        if found is None:
            return None
        between = thresholds.between_one_run if found.between is None else found.between
        if self.schedule_difference is not None:
            between *= thresholds.schedule_factor
        return float(thresholds.sigmas * (between**2 + found.scatter**2) ** 0.5)

    def numbers(self, thresholds: OverfitThresholds) -> dict[str, Number]:
        """The signals by name, as a verdict's evidence shows them."""
        slow, passes = self.trend, self.repetition
        return {
            "deviation": _now(self.deviation),
            "deviation_low": None if self.deviation is None else self.deviation.low,
            "band": self.width(thresholds),
            "deviation_slope": None if slow is None else slow.deviation_slope,
            "deviation_plain": _now(self.deviation_plain),
            "deviation_vocab_centered": _now(self.deviation_vocab_centered),
            "deviation_centered": _now(self.deviation_centered),
            "deviation_loss": _now(self.deviation_loss),
            "decline_rate": None if slow is None else slow.decline_rate,
            "acceleration": None if slow is None else slow.acceleration,
            "acceleration_error": None if slow is None else slow.acceleration_error,
            "shortfall": None if slow is None else slow.shortfall,
            "memorization": None if passes is None else passes.memorization,
            "learning": None if passes is None else passes.learning,
            "lar_decline": None if passes is None else passes.decline,
            "spread": self.spread,
            "head_norm_growth": None if slow is None else slow.head_norm_growth,
            "loss": self.loss,
            "epoch": self.epoch,
            "warm_up_end": self.warm_up,
        }


def decide(
    signals: OverfitSignals, thresholds: OverfitThresholds, previous: Outcome | None
) -> tuple[Outcome, str, RestsOn]:
    """The outcome, the reason, and what it rests on: the rule, free of any state but the outcome that stands so far."""
    s, t = signals, thresholds
    if s.epoch is not None and s.epoch < 1:
        reason = f"no data has repeated so far (epoch {s.epoch:.2f})"
        if s.deviation is not None and s.deviation.low > t.approaching:
            reason += f", though LAR is {s.deviation.now:.3f} below the baseline"
        return "healthy", f"{reason}.", "epoch"
    if s.warm_up is None:
        return "undecidable", "the warm-up is not over: LAR moves fast in it, in every training.", "nothing"
    found = [by(s, t, previous) for by in (_by_baseline, _by_passes, _by_spread, _by_acceleration)]
    for outcome in ("overfitting", "approaching", "healthy"):
        for conclusion in found:
            if conclusion is not None and conclusion[0] == outcome:
                return conclusion
    undecidable = next((conclusion for conclusion in found if conclusion is not None), None)
    return undecidable or ("undecidable", _why_undecidable(s, t), "nothing")


Conclusion = tuple[Outcome, str, RestsOn]


def _by_baseline(s: OverfitSignals, t: OverfitThresholds, previous: Outcome | None) -> Conclusion | None:
    """How far LAR lies below the baseline: the first of the paper's two signals."""
    width = s.width(t)
    if s.source is not None and not s.reached and previous in ("approaching", "overfitting"):
        return previous, "the baseline ends before this step, and the alarm that was raised before stands.", "baseline"
    if s.deviation is None or width is None or (s.source == "first epoch" and s.lr_just_changed):
        return None
    outcome = _by_deviation(s.deviation, width, t, previous)
    said = f"LAR is {s.deviation.now:.3f} below {_baseline_words(s)}"
    if outcome == "overfitting":
        return outcome, f"{said}, more than the {max(t.overfitting, width):.3f} that mark overfitting.", "baseline"
    if outcome == "approaching":
        return outcome, f"{said}, outside its band of {max(t.approaching, width):.3f}.", "baseline"
    if width < t.overfitting:
        return "healthy", f"LAR stays within {max(t.approaching, width):.3f} of {_baseline_words(s)}.", "baseline"
    return None


def _by_passes(s: OverfitSignals, t: OverfitThresholds, previous: Outcome | None) -> Conclusion | None:
    """Whether new directions come into use while the loss falls by seeing the same samples again."""
    found = s.repetition
    if found is None:
        return None
    repeated = f"{found.memorization:.2f} nats per unit of log(step) from seeing the same samples again"
    if previous in ("approaching", "overfitting") and found.memorization_high > t.keep * t.memorization:
        # LAR may have stopped falling, for all is memorized or the schedule has cooled down: that undoes nothing.
        stands = found.learning < (t.learning if previous == "overfitting" else 0.0)
        said = f"the training loss still falls by {repeated}, as since the first alarm"
        return "overfitting" if stands else "approaching", f"{said}; inside a pass the loss {_moves(found)}.", "passes"
    if s.lr_dropped:
        return "undecidable", "the learning rate has just dropped, and with it the loss.", "nothing"
    memorizes = found.memorization > t.memorization
    if memorizes and found.decline > t.decline:
        said = f"the training loss falls by {repeated}, and LAR by {found.decline:.3f}"
        outcome: Outcome = "overfitting" if found.learning < 0 else "approaching"
        return outcome, f"{said}; inside a pass the loss {_moves(found)}.", "passes"
    limit = f"LAR only by {found.decline:.3f}, and {t.decline:.4g} mark its approach"
    if not memorizes:
        limit = f"{t.memorization:.2f} mark the approach of overfitting"
    return "healthy", f"the training loss falls by {repeated}; {limit}.", "passes"


def _moves(found: Repetition) -> str:
    return "rises" if found.learning < 0 else "falls"


def _by_spread(s: OverfitSignals, t: OverfitThresholds, previous: Outcome | None) -> Conclusion | None:
    """In a classifier: whether it needs many more directions than it began with, as it does to fit single samples."""
    if s.spread is None or not s.classifies or s.repetition is not None:
        return None
    said = f"k is {s.spread:.2f} times as large as when it was lowest"
    if s.spread > (t.keep if previous == "overfitting" else 1.0) * t.spread_alarm:
        return "overfitting", f"{said}: single samples are being fitted.", "spread"
    if s.spread > (t.keep if previous in ("approaching", "overfitting") else 1.0) * t.spread:
        return "approaching", f"{said}; {t.spread:.2f} mark the approach of overfitting.", "spread"
    if s.spent_early:
        return (
            "undecidable",
            (
                f"the training data were fitted within the first {EARLY_READINGS} readings, before k could be seen to "
                "grow; take readings more often."
            ),
            "nothing",
        )
    return "healthy", f"{said}; {t.spread:.2f} mark the approach of overfitting.", "spread"


def _by_deviation(found: Deviation, width: float, t: OverfitThresholds, previous: Outcome | None) -> Outcome:
    alarm, limit = max(t.overfitting, width), max(t.approaching, width)
    if found.low > alarm or (previous == "overfitting" and found.high > t.keep * alarm):
        return "overfitting"
    if found.low > limit or (previous in ("approaching", "overfitting") and found.high > t.keep * limit):
        return "approaching"
    return "healthy"


def _by_acceleration(s: OverfitSignals, t: OverfitThresholds, previous: Outcome | None) -> Conclusion | None:
    """Whether LAR's decline speeds up: the second of the paper's signals."""
    slow = s.trend
    keep = t.keep if previous in ("approaching", "overfitting") else 1.0
    keep_alarm = t.keep if previous == "overfitting" else 1.0
    if slow is None or slow.decline_rate >= 0 or slow.shortfall <= keep * t.shortfall:
        return None
    if slow.acceleration > -keep * t.acceleration_sigmas * slow.acceleration_error:
        return None
    said = f"LAR falls faster than before, and has lost {slow.shortfall:.3f} more than it would have"
    if slow.lr_changed_at is not None:
        at = f"{slow.lr_changed_at:,.0f}"
        return "undecidable", f"{said}, but the learning rate changed at step {at}, which moves LAR, too.", "nothing"
    if slow.lr_known and slow.shortfall > keep_alarm * t.shortfall_alarm:
        return "overfitting", f"{said}, at an unchanged learning rate.", "acceleration"
    return "approaching", f"{said}.", "acceleration"


def _why_undecidable(s: OverfitSignals, t: OverfitThresholds) -> str:
    width = s.width(t)
    if s.source is None:
        own = f" ({s.why_no_baseline})" if s.why_no_baseline else ""
        return f"there is no baseline{own}, and LAR's decline does not speed up: it may be healthy or not."
    if not s.reached:
        return "the baseline has no value at this step."
    if s.deviation is None or width is None:
        return f"fewer than {t.smoothing + t.hold - 1} readings after the warm-up can be compared with the baseline."
    if s.source == "first epoch" and s.lr_just_changed:
        return "the learning rate has just changed, which moves LAR, too."
    return f"LAR is within the baseline's band, which is too wide to tell: {width:.3f}."


def _dropped(series: Series, warm_up: float | None) -> bool:
    """Whether the learning rate dropped abruptly among the last readings, the warm-up left out."""
    steps, rates = series.steps[-LR_READINGS:], series.recent("lr", LR_READINGS)
    rates = rates[(steps > (math.inf if warm_up is None else warm_up)) & np.isfinite(rates)]
    return bool((rates[1:] < LR_DROP * rates[:-1]).any())


def _spent_early(series: Series) -> bool:
    """Whether the training loss was under 5 % of log m within the first readings."""
    if series.m is None or series.m < 2:
        return False
    history = series.history
    early = history.column("loss")[: max(1, EARLY_READINGS // history.stride)]
    early = early[np.isfinite(early)]
    return bool(early.size) and bool(early.min() < INTERPOLATION * math.log(series.m))


def _baseline_words(s: OverfitSignals) -> str:
    return "what its first epoch leads to" if s.source == "first epoch" else "the baseline"


def _now(found: Deviation | None) -> float | None:
    return None if found is None else found.now


SUGGESTIONS: Mapping[Outcome, str] = {
    "healthy": "Train on.",
    "approaching": "Keep a checkpoint of now: training on this data will soon stop paying; get more data, or stronger "
    "regularization.",
    "overfitting": "Stop, go back to a checkpoint from before it began, and use more data or stronger regularization.",
    "undecidable": "Give a baseline: a run of the same set-up on data that does not repeat; and pass epoch and lr to "
    "step().",
}


class OverfitDetector(Judge):
    """Tells a healthy decline of LAR from overfitting, reading by reading, in constant memory.

    Args:
        baseline: What the run is compared with. Without one, its own first epoch, where that is long enough.
        thresholds: When to call it what.

    Raises:
        InputError: from `update()`, a reading of another shape than the baseline's, or one without tokens_seen where
            the baseline compares along tokens only.

    Example:
        >>> from logalign import Reading
        >>> detector = OverfitDetector()
        >>> verdict = detector.update(Reading(step=0, lar=0.5, epoch=0.01))
        >>> print(verdict.outcome, "-", verdict.reason)
        healthy - no data has repeated so far (epoch 0.01).
    """

    regime = "decline"

    def __init__(self, *, baseline: Baseline | None = None, thresholds: OverfitThresholds | None = None) -> None:
        super().__init__()
        self.thresholds = OverfitThresholds() if thresholds is None else thresholds
        self._given = baseline
        self._own: Baseline | None = None
        self._own_step: int | None = None  # when the first epoch was seen to be over
        self._why_no_baseline: str | None = None
        self._warm_up: tuple[float, int] | None = None  # its last step, and when that was known
        self._difference: tuple[str, int] | None = None
        self._highs: list[tuple[int, float]] = []  # step and smoothed LAR, each higher than all before
        self._trend: tuple[tuple[object, ...], Trend | None] | None = None  # of which history, what

    @property
    def baseline(self) -> Baseline | None:
        """What the run is compared with: the one given, or its own first epoch."""
        return self._given if self._given is not None else self._own

    @property
    def signals(self) -> OverfitSignals:
        """The numbers that the verdict after the last reading rests on.

        Raises:
            InputError: no reading has been taken.
        """
        series, t, baseline, warm_up = self.series, self.thresholds, self.baseline, self._warm_up_end
        if series.last_step is None:
            raise InputError("signals: expected at least one reading with a defined LAR, found none")
        found: dict[str, Deviation | None] = {}
        axis = self._axis()
        for form in (*FORMS, "loss"):
            found[form] = None
            if baseline is not None:
                found[form] = deviation(
                    series, baseline, form, axis=axis, warm_up=warm_up, smoothing=t.smoothing, hold=t.hold
                )
        count = t.smoothing + t.hold
        changes = lr_changes(series.steps[-count:], series.recent("lr", count))
        return OverfitSignals(
            step=series.last_step,
            epoch=series.last("epoch"),
            loss=series.last("loss"),
            warm_up=warm_up,
            source=None if baseline is None else baseline.source,
            reached=baseline is not None and reaches(series, baseline, self._form, axis=axis),
            deviation=found[self._form],
            deviation_plain=found["lar"],
            deviation_vocab_centered=found["lar_vocab_centered"],
            deviation_centered=found["lar_centered"],
            deviation_loss=found["loss"],
            schedule_difference=None if self._difference is None else self._difference[0],
            lr_just_changed=bool(changes.size),
            lr_dropped=_dropped(series, warm_up),
            repetition=repetition(series, self._form, hold=t.hold_repetition),
            spread=spread(series, self._form, hold=t.hold_repetition, highest=self._highest),
            classifies=series.m is not None and series.n is not None and series.m <= series.n,
            spent_early=_spent_early(series),
            trend=self._slow_signals(axis),
            why_no_baseline=self._why_no_baseline,
        )

    @property
    def _warm_up_end(self) -> float | None:
        return None if self._warm_up is None else self._warm_up[0]

    @property
    def _highest(self) -> float:
        """The highest smoothed LAR so far."""
        return self._highs[-1][1] if self._highs else -math.inf

    @property
    def _form(self) -> str:
        """The form that is judged: the thresholds' one where run and baseline have it, else plain LAR."""
        form, baseline = self.thresholds.form, self.baseline
        recorded = self.series.last(form) is not None
        return form if recorded and (baseline is None or baseline.has(form)) else PLAIN

    def _axis(self) -> Axis:
        tokens = self.series.last("tokens_seen") is not None
        return "step" if self.baseline is None else self.baseline.axis_for(tokens=tokens)

    def _check(self, reading: Reading) -> None:
        super()._check(reading)
        if self._given is not None:
            self._given.check_shape(reading.m, reading.n, name=f"step {reading.step}")
            self._given.axis_for(tokens=reading.tokens_seen is not None)

    def _follow(self) -> None:
        series, step = self.series, self.series.last_step
        assert step is not None
        if series.filled and self._warm_up is None:
            history = series.history
            end = warm_up_end(history.x, history.column("lar"), history.column("lr"))
            self._warm_up = None if end is None else (end, step)
        level = smoothed_lar(series, self.thresholds.form)
        if level is not None and level > self._highest:
            self._highs = [*self._highs, (step, level)][-REMEMBERED_HIGHS:]
        epoch = series.last("epoch")
        if self._given is None and self._own_step is None and epoch is not None and epoch >= 1:
            self._take_first_epoch(step)
        baseline = self.baseline
        if series.filled and baseline is not None and self._difference is None and self._warm_up is not None:
            axis = self._axis()
            words = baseline.schedule_difference(
                x_of(series, axis), series.recent("lr"), axis=axis, tokens_per_step=tokens_per_step(series)
            )
            self._difference = None if words is None else (words, step)

    def _take_first_epoch(self, step: int) -> None:
        self._own_step = step
        try:
            self._own = first_epoch(self.series)
        except InputError as error:
            self._why_no_baseline = str(error)

    def _slow_signals(self, axis: Axis) -> Trend | None:
        """Taken anew only when some bins of the history have been filled, so that a long run costs less per reading."""
        history, bins = self.series.history, fitted_bins(self.series)
        end = float(history.x[bins - 1]) if bins else None
        key = (history.stride, bins, end, self._warm_up, self._own_step, axis, self._form)
        if self._trend is None or self._trend[0] != key:
            self._trend = (
                key,
                trend(self.series, self._form, warm_up=self._warm_up_end, baseline=self.baseline, axis=axis),
            )
        return self._trend[1]

    def _forget(self, step: int) -> None:
        if self._warm_up is not None and self._warm_up[1] >= step:
            self._warm_up = None
        if self._own_step is not None and self._own_step >= step:
            self._own = self._own_step = self._why_no_baseline = None
        if self._difference is not None and self._difference[1] >= step:
            self._difference = None
        self._highs = [high for high in self._highs if high[0] < step]
        self._trend = None

    def _judge(self, before: Outcome | None) -> Judgment:
        if frozen(self.series):
            return FROZEN
        signals, t = self.signals, self.thresholds
        outcome, reason, rests_on = decide(signals, t, before)
        return Judgment(
            outcome=outcome,
            reason=reason,
            suggestion=SUGGESTIONS[outcome],
            evidence=signals.numbers(t),
            basis=self._basis(rests_on),
            limits=self._limits(signals),
        )

    def _basis(self, rests_on: RestsOn) -> tuple[str, ...]:
        t, baseline = self.thresholds, self.baseline
        name = FORM_NAMES[self._form]
        fitted = "fitted on the fitting half of the benchmark (docs/benchmark.md)"
        if rests_on == "epoch":
            return ("the epoch: data that has not repeated cannot have been memorized",)
        if rests_on == "baseline":
            assert baseline is not None
            return (
                f"{name} against {baseline.describe()}, along {'tokens' if self._axis() == 'tokens' else 'steps'}",
                f"approaching: {t.approaching} below it in {t.hold} medians of {t.smoothing} readings, and outside "
                f"{t.sigmas:g} standard deviations; overfitting: {t.overfitting}; {fitted}",
            )
        if rests_on == "passes":
            return (
                "what the training loss does inside passes over the data and from one to the next, and the slope of "
                f"{name} in log(step) over the last factor of {LATELY:g} in steps",
                f"approaching: {t.memorization:g} nats of loss per unit of log(step) from seeing the same samples "
                f"again, and {t.decline:g} of LAR, in {t.hold_repetition} readings; overfitting: if the loss rises "
                "inside passes, too; fitted on the fitting half of the benchmark (docs/benchmark.md)",
            )
        if rests_on == "spread":
            return (
                f"{name} of a layer with no more outputs than inputs: k against its lowest value",
                f"approaching: {t.spread:g} times as large, in {t.hold_repetition} readings; overfitting: "
                f"{t.spread_alarm:g}; fitted on the fitting half of the benchmark (docs/benchmark.md)",
            )
        if rests_on == "acceleration":
            return (
                f"the acceleration of {name}'s decline in log(step), the later half of the run against the earlier",
                f"approaching: {t.shortfall} of LAR lost to it, at {t.acceleration_sigmas:g} standard errors; "
                f"overfitting: {t.shortfall_alarm} at a recorded, unchanged learning rate; developed on one pair of "
                "runs of a small GPT, scored on others: docs/benchmark.md",
            )
        return ()

    def _limits(self, signals: OverfitSignals) -> tuple[str, ...]:
        baseline, limits = self.baseline, []
        if signals.schedule_difference is not None:
            limits.append(
                f"{signals.schedule_difference}: the band is {self.thresholds.schedule_factor:g} times as wide"
            )
        if baseline is not None and baseline.source == "runs":
            if baseline.site != self.series.site:
                limits.append(f"the baseline is of the layer {baseline.site!r}, the run of {self.series.site!r}")
            if signals.deviation is not None and signals.deviation.between is None:
                limits.append(
                    "the baseline is one run: how far runs of other seeds lie apart is assumed "
                    f"({self.thresholds.between_one_run})"
                )
            if baseline.epoch is not None and baseline.epoch > 1:
                limits.append(f"the baseline itself repeats its data (epoch {baseline.epoch:.1f})")
        if baseline is not None and baseline.source == "first epoch":
            limits.append("the baseline is extrapolated from this run's first epoch, and the farther the less sure")
        return tuple(limits)

    def _own_state(self) -> dict[str, Any]:
        return {
            "warm_up": None if self._warm_up is None else list(self._warm_up),
            "difference": None if self._difference is None else list(self._difference),
            "own_step": self._own_step,
            "highs": [list(high) for high in self._highs],
            "why_no_baseline": self._why_no_baseline,
            "own": None if self._own is None else self._own.state(),
        }

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        self._warm_up = None if state["warm_up"] is None else (state["warm_up"][0], state["warm_up"][1])
        self._difference = None if state["difference"] is None else (state["difference"][0], state["difference"][1])
        self._own_step = state["own_step"]
        self._highs = [(step, level) for step, level in state["highs"]]
        self._why_no_baseline = state["why_no_baseline"]
        self._own = None if state["own"] is None else Baseline.from_state(state["own"])
        self._trend = None
