"""The rule of overfitting: signals and thresholds in, outcome and reason out, with no state but what stood before.

Kept apart from what feeds it (`overfitting.py`), so that it can be read, tested and replaced by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from logalign.diagnosis.decline import Deviation, Drift, Span, Trend
from logalign.diagnosis.repetition import Repetition
from logalign.diagnosis.verdict import Number, Outcome

EARLY_READINGS = 30
"""A classifier that has fitted its data within so many readings has done so before k could be seen to grow."""
EARLIEST_PASSES = 2.0
"""Passes over the data before which no sample has been met twice after it was learned, and a decline proves nothing."""
Kind = Literal["baseline", "loss", "passes", "revisits", "spread", "acceleration"]
RestsOn = Literal[Kind, "epoch", "nothing"]
ALARMS = ("approaching", "overfitting")


@dataclass(frozen=True, kw_only=True)
class OverfitThresholds:
    """When a decline counts as approaching overfitting, and as overfitting.

    `approaching`, `loss_below`, `strain`, `drop` and `spread` are fitted on the fitting half of the benchmark by
    `python -m benchmarks.generalization fit`, and scored on the other, where it is not so good: docs/benchmark.md.
    `form`, `smoothing` and `hold` were chosen on the same half. `overfitting` and `spread_alarm` mark what is clearly
    beyond, and are not fitted; those of the acceleration were developed on one pair of runs (tests/data/lm_fresh.jsonl
    and lm_repeat200k.jsonl).

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
        schedule_factor: How much farther below the baseline a run may be where the schedule differs from the
            baseline's: assumed.
        shortfall: Without a baseline, LAR lost to the acceleration of the decline: "approaching".
        shortfall_alarm: The same, "overfitting"; only where the learning rate is recorded and has not changed.
        acceleration_sigmas: The acceleration has to be so many standard errors from none.
        loss_below: By what share of the run's training loss the baseline's may lie above it: "approaching".
        loss_smoothing: Readings of the running median of that share.
        strain: The sum over log(step) of the training loss lost by seeing the same samples again times the LAR lost,
            both per unit of log(step): "approaching", and "overfitting" once the loss rises inside passes.
        drop: By what share of itself the training loss drops where a pass begins: the same.
        spread: Factor by which vocabulary-centered k has grown since it was lowest, in a classifier: "approaching".
        spread_alarm: The same, "overfitting".
        hold_repetition: So many readings in a row have to be beyond `drop` and `spread`, and drift above zero.
        drift_errors: Drift has to be above zero by so many of its standard errors: "approaching"; "overfitting" once it
            has been so in all readings of a whole pass. Not fitted.
    """

    form: str = "lar_vocab_centered"
    smoothing: int = 10
    hold: int = 3
    approaching: float = 0.026
    overfitting: float = 0.05
    keep: float = 0.75
    sigmas: float = 2.0
    between_one_run: float = 0.007
    schedule_factor: float = 2.0
    shortfall: float = 0.03
    shortfall_alarm: float = 0.06
    acceleration_sigmas: float = 3.0
    loss_below: float = 0.27
    loss_smoothing: int = 5
    strain: float = 0.0262
    drop: float = 0.0705
    spread: float = 1.225
    spread_alarm: float = 1.8
    hold_repetition: int = 3
    drift_errors: float = 2.0


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
        deviation_loss: Of the training loss.
        loss_below: By what share of the run's training loss the baseline's lies above it.
        schedule_difference: How the schedule differs from the baseline's, in words.
        lr_just_changed: Whether the learning rate changed materially within the readings that are smoothed.
        lr_dropped: Whether it dropped by more than a third from one to the next of the readings that passes look at.
        repetition: What passes over the same data have lately made of the loss and of LAR.
        spread: By what factor vocabulary-centered k has grown since it was lowest.
        classifies: Whether the layer has no more outputs than inputs, as classifiers do and language models do not.
        interpolates: Whether the training loss is under 5 % of log m, as is a loss of which a share says nothing.
        spent_early: Whether it was so within the first 30 readings.
        trend: The slow signals.
        why_no_baseline: Why this run's own first epoch gives none.
        drift: By how much a sample's loss changes in a pass over other samples.
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
    loss_below: Span | None
    schedule_difference: str | None
    lr_just_changed: bool
    lr_dropped: bool
    repetition: Repetition | None
    spread: float | None
    classifies: bool
    interpolates: bool
    spent_early: bool
    trend: Trend | None
    why_no_baseline: str | None
    drift: Drift | None = None

    def width(self, thresholds: OverfitThresholds) -> float | None:
        """Half the width of the band that a healthy run may lie in; None without a deviation."""
        found = self.deviation
        if found is None:
            return None
        between = thresholds.between_one_run if found.between is None else found.between
        return self.caution(thresholds) * float(thresholds.sigmas * (between**2 + found.scatter**2) ** 0.5)

    def caution(self, thresholds: OverfitThresholds) -> float:
        """By what factor a deviation has to be larger, for the schedule is not the baseline's."""
        return 1.0 if self.schedule_difference is None else thresholds.schedule_factor

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
            "loss_below": None if self.loss_below is None else self.loss_below.now,
            "decline_rate": None if slow is None else slow.decline_rate,
            "acceleration": None if slow is None else slow.acceleration,
            "acceleration_error": None if slow is None else slow.acceleration_error,
            "shortfall": None if slow is None else slow.shortfall,
            "memorization": None if passes is None else passes.memorization,
            "learning": None if passes is None else passes.learning,
            "lar_decline": None if passes is None else passes.decline,
            "strain": None if passes is None else passes.strain,
            "drop": None if passes is None else passes.drop,
            "spread": self.spread,
            "drift": None if self.drift is None else self.drift.now,
            "drift_error": None if self.drift is None else self.drift.error,
            "head_norm_growth": None if slow is None else slow.head_norm_growth,
            "loss": self.loss,
            "epoch": self.epoch,
            "warm_up_end": self.warm_up,
        }


Conclusion = tuple[Outcome, str, RestsOn]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the rule says of one reading.

    Attributes:
        outcome: The one that stands.
        reason: Why, in one sentence.
        rests_on: The evidence that it rests on.
        standing: The outcome by each kind of evidence, "undecidable" where it has nothing to say.
    """

    outcome: Outcome
    reason: str
    rests_on: RestsOn
    standing: Mapping[str, Outcome]


def decide(signals: OverfitSignals, thresholds: OverfitThresholds, previous: Mapping[str, Outcome]) -> Decision:
    """The rule, free of any state but the outcome that stands so far by each kind of evidence."""
    s, t = signals, thresholds
    if s.epoch is not None and s.epoch < 1:
        reason = f"no data has repeated so far (epoch {s.epoch:.2f})"
        if s.deviation is not None and s.deviation.low > t.approaching:
            reason += f", though LAR is {s.deviation.now:.3f} below the baseline"
        return Decision(outcome="healthy", reason=f"{reason}.", rests_on="epoch", standing={})
    if s.warm_up is None:
        reason = "the warm-up is not over: LAR moves fast in it, in every training."
        return Decision(outcome="undecidable", reason=reason, rests_on="nothing", standing={})
    found = {kind: by(s, t, previous.get(kind)) for kind, by in BY_KIND.items()}
    standing: dict[str, Outcome] = {kind: "undecidable" if each is None else each[0] for kind, each in found.items()}
    outcome, reason, rests_on = _first([each for each in found.values() if each is not None], s, t)
    return Decision(outcome=outcome, reason=reason, rests_on=rests_on, standing=standing)


def _first(said: list[Conclusion], s: OverfitSignals, t: OverfitThresholds) -> Conclusion:
    for outcome in ("overfitting", "approaching", "healthy", "undecidable"):
        for conclusion in said:
            if conclusion[0] == outcome:
                return conclusion
    return "undecidable", _why_undecidable(s, t), "nothing"


def _by_baseline(s: OverfitSignals, t: OverfitThresholds, previous: Outcome | None) -> Conclusion | None:
    """How far LAR lies below the baseline: the first of the paper's two signals."""
    width = s.width(t)
    if s.source is not None and not s.reached and previous in ALARMS:
        return previous, "the baseline ends before this step, and the alarm that was raised before stands.", "baseline"
    if s.deviation is None or width is None or (s.source == "first epoch" and s.lr_just_changed):
        return None
    limit, alarm = (max(s.caution(t) * each, width) for each in (t.approaching, t.overfitting))
    said = f"LAR is {s.deviation.now:.3f} below {_baseline_words(s)}"
    if s.deviation.low > alarm or (previous == "overfitting" and s.deviation.high > t.keep * alarm):
        return "overfitting", f"{said}, more than the {alarm:.3f} that mark overfitting.", "baseline"
    if s.deviation.low > limit or (previous in ALARMS and s.deviation.high > t.keep * limit):
        return "approaching", f"{said}, outside its band of {limit:.3f}.", "baseline"
    if width < t.overfitting:
        return "healthy", f"LAR stays within {limit:.3f} of {_baseline_words(s)}.", "baseline"
    return None


def _by_loss(s: OverfitSignals, t: OverfitThresholds, previous: Outcome | None) -> Conclusion | None:
    """How far the training loss lies below the baseline's: fresh data let nobody get there so soon."""
    if s.source == "runs" and not s.reached and previous in ALARMS:
        return previous, "the baseline ends before this step, and the alarm that was raised before stands.", "loss"
    if s.loss_below is None or s.source != "runs" or s.interpolates:
        return None
    limit = s.caution(t) * t.loss_below
    if s.loss_below.low > limit or (previous in ALARMS and s.loss_below.high > t.keep * limit):
        said = (
            f"the baseline's training loss is {s.loss_below.now:.0%} above this run's, outside its band of {limit:.0%}"
        )
        return "approaching", f"{said}: what it lacks was memorized.", "loss"
    return None


def _by_passes(s: OverfitSignals, t: OverfitThresholds, previous: Outcome | None) -> Conclusion | None:
    """Whether a run that sees its data again memorizes them by new directions, or in large drops."""
    found = s.repetition
    if found is None:
        return None
    stands = previous in ALARMS and (found.strain > t.keep * t.strain or found.drop_high > t.keep * t.drop)
    if s.lr_dropped and not stands:
        return "undecidable", "the learning rate has just dropped, and with it the loss.", "nothing"
    strained = found.strain > t.strain
    if not (stands or strained or found.drop > t.drop):
        said = (
            f"memorizing has strained LAR by {found.strain:.3f}, and the loss drops by {found.drop:.1%} with each pass"
        )
        return "healthy", f"{said}; {t.strain:g} or {t.drop:.1%} mark the approach of overfitting.", "passes"
    rises = found.learning < 0
    why = f"memorizing has strained LAR by {found.strain:.3f}, more than the {t.strain:g} of healthy runs"
    if not strained and found.drop > t.drop:
        why = f"the training loss drops by {found.drop:.1%} with each pass, and {t.drop:.1%} mark what is memorized"
    elif not strained and found.strain > t.keep * t.strain:
        least = t.keep * t.strain
        why = f"memorizing has strained LAR by {found.strain:.3f}, and the alarm stands until it is below {least:.3f}"
    elif not strained:
        drop, limit = f"{found.drop_high:.1%}", f"{t.keep * t.drop:.1%}"
        why = f"the training loss drops by up to {drop} with each pass, and the alarm stands until it is below {limit}"
    why = f"{why}; inside a pass the loss {'rises' if rises else 'falls'}."
    return "overfitting" if rises or previous == "overfitting" else "approaching", why, "passes"


def _by_revisits(s: OverfitSignals, t: OverfitThresholds, previous: Outcome | None) -> Conclusion | None:
    """Whether training on other samples makes a sample's loss rise."""
    found = s.drift
    if found is None:
        return None
    size = f"{abs(found.now):.3f} \u00b1 {found.error:.3f} nats a pass"
    rises = f"training on other samples makes a sample's loss rise, by {size}"
    if found.low_for_a_pass or (previous == "overfitting" and found.now > 0):
        return "overfitting", f"{rises}, for a whole pass now: what it learns no longer carries over.", "revisits"
    if found.low > 0 or (previous in ALARMS and found.now > 0):
        return "approaching", f"{rises}: what it learns no longer carries over.", "revisits"
    if found.now < 0:
        said = f"training on other samples lowers a sample's loss, by {size}: what it learns carries over."
    else:
        said = f"training on other samples does not clearly raise a sample's loss ({size})."
    return "healthy", said, "revisits"


def _by_spread(s: OverfitSignals, t: OverfitThresholds, previous: Outcome | None) -> Conclusion | None:
    """In a classifier: whether it needs many more directions than it began with, as it does to fit single samples."""
    if s.spread is None or not s.classifies or s.repetition is not None:
        return None
    said = f"k is {s.spread:.2f} times as large as when it was lowest"
    if s.spread > (t.keep if previous == "overfitting" else 1.0) * t.spread_alarm:
        return "overfitting", f"{said}: single samples are being fitted.", "spread"
    if s.spread > (t.keep if previous in ALARMS else 1.0) * t.spread:
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


def _by_acceleration(s: OverfitSignals, t: OverfitThresholds, previous: Outcome | None) -> Conclusion | None:
    """Whether LAR's decline speeds up: the second of the paper's signals."""
    slow = s.trend
    if s.epoch is not None and s.epoch < EARLIEST_PASSES:
        return None
    keep = t.keep if previous in ALARMS else 1.0
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


BY_KIND: Mapping[Kind, Callable[[OverfitSignals, OverfitThresholds, Outcome | None], Conclusion | None]] = {
    "baseline": _by_baseline,
    "loss": _by_loss,
    "passes": _by_passes,
    "revisits": _by_revisits,
    "spread": _by_spread,
    "acceleration": _by_acceleration,
}
"""The kinds of evidence, each a rule of its own that knows nothing of what the others said."""


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


def _baseline_words(s: OverfitSignals) -> str:
    return "what its first epoch leads to" if s.source == "first epoch" else "the baseline"


def _now(found: Deviation | None) -> float | None:
    return None if found is None else found.now
