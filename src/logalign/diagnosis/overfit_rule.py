"""The overfitting rule: derives outcome and reason from signals, thresholds and earlier outcomes alone.

`overfitting.py` feeds it. The two are separate, so that the rule can be read, tested and replaced alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from logalign.diagnosis.decline import Deviation, Span
from logalign.diagnosis.drops import LossSignals, LossThresholds, by_drops
from logalign.diagnosis.outcome import OF_OVERFITTING, Outcome
from logalign.diagnosis.repetition import Repetition
from logalign.diagnosis.revisited import Revisited
from logalign.diagnosis.verdict import Number

FIRST_PASSES = 2.0
"""Passes over the data from which on returning samples give drift and gain."""
TOLD: Mapping[Kind, tuple[int, int]] = {"revisits": (30, 38), "drops": (12, 17), "strain": (12, 12), "spread": (16, 16)}
"""Counts by the evidence of a run's first alarm: alarms that kept a checkpoint within `NEAR` nats of the lowest
held-out loss, and all alarms, in the half of the benchmark that nothing was fitted on (docs/benchmark.md, "alarms")."""
NEAR = 0.05
EARLY_READINGS = 30
"""A classifier that fits its data within so many readings does so before the growth of k can show."""
Kind = Literal["baseline", "loss", "revisits", "strain", "drops", "spread"]
RestsOn = Literal[Kind, "epoch", "nothing"]
WITH_REVISITS: tuple[Kind, ...] = ("baseline", "loss", "revisits")
WITHOUT: tuple[Kind, ...] = ("baseline", "loss", "drops", "strain", "spread")
"""Evidence where no samples are followed. `WITH_REVISITS` omits the kinds that add nothing to revisits."""


@dataclass(frozen=True, kw_only=True)
class OverfitThresholds:
    """Limits of approaching overfitting and of overfitting.

    `python -m benchmarks.generalization fit` fits all on the fitting half of the benchmark, except `overfitting`,
    `spread_alarm` and the smoothing, which mark a clear excess (docs/benchmark.md).

    Attributes:
        form: Judged form of LAR.
        smoothing: Readings in the running median.
        hold: Running medians in a row that have to exceed a limit.
        approaching: Deviation from the baseline for "approaching".
        overfitting: Deviation from the baseline for "overfitting".
        keep: An outcome stands until all running medians are below this share of its threshold.
        sigmas: Standard deviations of the band that a deviation also has to exceed.
        between_one_run: Standard deviation between runs, where a baseline of one run cannot give it. It is assumed, the
            size of the scatter of one reading.
        schedule_factor: Assumed factor by which a run may lie farther below a baseline with another schedule.
        loss_below: Share of the run's training loss by which the baseline's may lie above it: "approaching".
        loss_smoothing: Readings in the running median of that share.
        memorized: Memorized share of revisits up to which no drift raises an alarm.
        material: Memorized loss up to which it does not matter, as a share of the first training loss.
        errors: Standard errors to subtract from the memorized loss before it is compared with `material`. It is set,
            not fitted: a loss that may be zero is no ground for an alarm.
        falls: Beyond both, training pays while drift lowers the loss in a pass by this share of unseen samples' loss,
            times the pace of the learning rate. Otherwise the outcome is "approaching".
        stands: An alarm stands until drift is below that by so many of its standard errors. It is "overfitting" where
            drift exceeds zero by as many, or after two such passes in a row.
        strain: Sum over log(step) of the training loss lost to repeated samples times the LAR lost, both per unit of
            log(step): "approaching", and "overfitting" once the loss rises inside passes.
        spread: Growth factor of a classifier's vocabulary-centered k since its lowest value: "approaching".
        spread_alarm: The same for "overfitting".
        hold_repetition: Readings in a row that have to exceed `spread`, or see passes.
        drops: Limits of the loss drops where passes begin.
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
    loss_below: float = 0.27
    loss_smoothing: int = 5
    memorized: float = 0.2
    material: float = 0.01
    errors: float = 2.0
    falls: float = 0.01
    stands: float = 2.0
    strain: float = 0.0262
    spread: float = 1.225
    spread_alarm: float = 1.8
    hold_repetition: int = 3
    drops: LossThresholds = field(default_factory=LossThresholds)


@dataclass(frozen=True, kw_only=True)
class OverfitSignals:
    """The numbers that the rule reads, None where unknown.

    Attributes:
        step: Step of the last reading.
        epoch: Passes over the data.
        loss: Training loss of the last reading.
        warm_up: Last step of the warm-up, or None while it lasts.
        has_baseline: True if there is a baseline.
        reached: True if the baseline has a value at the last reading.
        deviation: Deviation in the judged form.
        deviation_plain: Deviation in the plain form.
        deviation_vocab_centered: Deviation in the vocabulary-centered form.
        deviation_centered: Deviation in the centered form.
        deviation_loss: Deviation of the training loss.
        loss_below: Share of the run's training loss by which the baseline's lies above it.
        schedule_difference: Difference from the baseline's schedule, in words.
        lr_dropped: True if the learning rate dropped abruptly among the last readings.
        repetition: Recent effect of passes over the same data on the loss and on LAR.
        drops: Recent loss drops where passes begin, empty where they cannot be seen.
        spread: Growth factor of a classifier's vocabulary-centered k since its lowest value.
        classifies: True if the layer has no more outputs than inputs: classifiers do, language models do not.
        interpolates: True if the network interpolates its data. A share of its loss then says nothing.
        spent_early: True if it did so within the first 30 readings.
        revisited: Result of returning samples in the last complete pass.
        revisited_before: The same in the pass before it.
    """

    step: int
    epoch: float | None
    loss: float | None
    warm_up: float | None
    has_baseline: bool
    reached: bool
    deviation: Deviation | None
    deviation_plain: Deviation | None = None
    deviation_vocab_centered: Deviation | None
    deviation_centered: Deviation | None
    deviation_loss: Deviation | None
    loss_below: Span | None
    schedule_difference: str | None
    lr_dropped: bool
    repetition: Repetition | None
    drops: Sequence[LossSignals] = ()
    spread: float | None
    classifies: bool
    interpolates: bool
    spent_early: bool
    revisited: Revisited | None = None
    revisited_before: Revisited | None = None

    def width(self, thresholds: OverfitThresholds) -> float | None:
        """Return half the width of a healthy run's band, or None without a deviation."""
        found = self.deviation
        if found is None:
            return None
        between = thresholds.between_one_run if found.between is None else found.between
        return self.caution(thresholds) * float(thresholds.sigmas * (between**2 + found.scatter**2) ** 0.5)

    def caution(self, thresholds: OverfitThresholds) -> float:
        """Return the factor that widens the limits where the schedule is not the baseline's."""
        return 1.0 if self.schedule_difference is None else thresholds.schedule_factor

    def numbers(self, thresholds: OverfitThresholds) -> dict[str, Number]:
        """Return the signals by name, for a verdict's evidence."""
        passes, seen = self.repetition, self.revisited
        return {
            "drift": None if seen is None else seen.drift,
            "drift_error": None if seen is None else seen.drift_error,
            "memorized": None if seen is None else seen.memorized,
            "memorized_error": None if seen is None else seen.memorized_error,
            "revisited_share": None if seen is None else seen.share,
            "deviation": _now(self.deviation),
            "deviation_low": None if self.deviation is None else self.deviation.low,
            "band": self.width(thresholds),
            "deviation_plain": _now(self.deviation_plain),
            "deviation_vocab_centered": _now(self.deviation_vocab_centered),
            "deviation_centered": _now(self.deviation_centered),
            "deviation_loss": _now(self.deviation_loss),
            "loss_below": None if self.loss_below is None else self.loss_below.now,
            "memorization": None if passes is None else passes.memorization,
            "learning": None if passes is None else passes.learning,
            "lar_decline": None if passes is None else passes.decline,
            "strain": None if passes is None else passes.strain,
            "dropped_share": self.drops[-1].share if self.drops else None,
            "spread": self.spread,
            "loss": self.loss,
            "epoch": self.epoch,
            "warm_up_end": self.warm_up,
        }


Conclusion = tuple[Outcome, str, RestsOn]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The rule's result for one reading.

    Attributes:
        outcome: Outcome that stands.
        reason: Its cause, in one sentence.
        rests_on: Evidence that decided it.
        standing: Outcome by each kind of evidence, "undecidable" where it says nothing.
    """

    outcome: Outcome
    reason: str
    rests_on: RestsOn
    standing: Mapping[str, Outcome]


def decide(signals: OverfitSignals, thresholds: OverfitThresholds, previous: Mapping[str, Outcome]) -> Decision:
    """Apply the rule, given the outcome that stands so far by each kind of evidence."""
    s, t = signals, thresholds
    if s.epoch is not None and s.epoch < 1:
        reason = f"no data has repeated so far (epoch {s.epoch:.2f})"
        if s.deviation is not None and s.deviation.low > t.approaching:
            reason += f", though LAR is {s.deviation.now:.3f} below the baseline"
        return Decision(outcome="healthy", reason=f"{reason}.", rests_on="epoch", standing={})
    if s.warm_up is None and s.revisited is None:
        reason = "the warm-up is not over: LAR moves fast in it, in every training."
        return Decision(outcome="undecidable", reason=reason, rests_on="nothing", standing={})
    asked = WITHOUT if s.revisited is None else WITH_REVISITS
    found = {kind: BY_KIND[kind](s, t, previous.get(kind)) for kind in asked}
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
    """Judge LAR's distance below the baseline, the first of the paper's signals."""
    width = s.width(t)
    if s.has_baseline and not s.reached and previous in OF_OVERFITTING:
        return previous, "the baseline ends before this step, and the alarm that was raised before stands.", "baseline"
    if s.deviation is None or width is None:
        return None
    limit, alarm = (max(s.caution(t) * each, width) for each in (t.approaching, t.overfitting))
    said = f"LAR is {s.deviation.now:.3f} below the baseline"
    if s.deviation.low > alarm or (previous == "overfitting" and s.deviation.high > t.keep * alarm):
        return "overfitting", f"{said}, more than the {alarm:.3f} that mark overfitting.", "baseline"
    if s.deviation.low > limit or (previous in OF_OVERFITTING and s.deviation.high > t.keep * limit):
        return "approaching", f"{said}, outside its band of {limit:.3f}.", "baseline"
    if width < t.overfitting:
        return "healthy", f"LAR stays within {limit:.3f} of the baseline.", "baseline"
    return None


def _by_loss(s: OverfitSignals, t: OverfitThresholds, previous: Outcome | None) -> Conclusion | None:
    """Judge how far the loss lies below the baseline's: fresh data never lower it so soon."""
    if s.has_baseline and not s.reached and previous in OF_OVERFITTING:
        return previous, "the baseline ends before this step, and the alarm that was raised before stands.", "loss"
    if s.loss_below is None or s.interpolates:
        return None
    limit = s.caution(t) * t.loss_below
    if s.loss_below.low > limit or (previous in OF_OVERFITTING and s.loss_below.high > t.keep * limit):
        said = (
            f"the baseline's training loss is {s.loss_below.now:.0%} above this run's, outside its band of {limit:.0%}"
        )
        return "approaching", f"{said}: what it lacks was memorized.", "loss"
    return None


def _by_revisits(s: OverfitSignals, t: OverfitThresholds, previous: Outcome | None) -> Conclusion | None:
    """Judge whether much is memorized, and training on other samples no longer lowers a sample's loss."""
    now = s.revisited
    if now is None:
        return None
    size = f"{abs(now.drift):.2g} \u00b1 {now.drift_error:.1g} nats a pass"
    rises = now.drift > t.stands * now.drift_error
    memorized = f"{now.share:.0%} of the loss that unseen samples would have is gone by seeing the same ones again"
    if stalls(now, t) or (previous in OF_OVERFITTING and not _pays(now, t)):
        if rises:
            said = f"training on other samples now makes a sample's loss rise, by {size}"
        else:
            said = f"training on other samples no longer clearly lowers a sample's loss ({now.drift:+.2g} \u00b1 "
            said += f"{now.drift_error:.1g} nats a pass)"
        twice = s.revisited_before is not None and stalls(s.revisited_before, t) and stalls(now, t)
        outcome: Outcome = "overfitting" if rises or twice or previous == "overfitting" else "approaching"
        return outcome, f"{said}, and {memorized}: what it learns no longer carries over.", "revisits"
    if now.drift < -now.drift_error:
        said = f"training on other samples lowers a sample's loss, by {size}: what it learns carries over."
    elif now.share <= t.memorized:
        said = (
            f"little has been memorized: {memorized}; {t.memorized:.0%}, and a drift that no longer lowers the loss, "
            "mark the approach of overfitting."
        )
    elif now.of_the_first(t.errors) <= t.material:
        said = (
            f"what has been memorized, {now.memorized:.2g} \u00b1 {now.memorized_error:.1g} nats, is not clearly more "
            f"than {t.material:.0%} of the loss that training began with, {now.began:.2g} nats."
        )
    else:
        said = (
            f"{memorized}, but training on other samples may still lower a sample's loss ({now.drift:+.2g} \u00b1 "
            f"{now.drift_error:.1g} nats a pass)."
        )
    return "healthy", said, "revisits"


def stalls(seen: Revisited, t: OverfitThresholds) -> bool:
    """Return whether training no longer pays and much is memorized."""
    much = seen.share > t.memorized and seen.of_the_first(t.errors) > t.material
    return much and seen.drift > -t.falls * seen.unseen * seen.pace


def _pays(seen: Revisited, t: OverfitThresholds) -> bool:
    """Test if training clearly pays."""
    return seen.drift + t.stands * seen.drift_error < -t.falls * seen.unseen * seen.pace


def _by_strain(s: OverfitSignals, t: OverfitThresholds, previous: Outcome | None) -> Conclusion | None:
    """Judge whether a run that sees its data again memorizes it through new directions of the head."""
    found = s.repetition
    if found is None:
        return None
    if s.lr_dropped:
        return (
            None
            if previous is None
            else (previous, "the learning rate has just dropped; the verdict stands.", "strain")
        )
    stands = previous in OF_OVERFITTING and found.strain > t.keep * t.strain
    strain = f"strain, the loss memorized times the LAR lost, is {found.strain:.3f}; {t.strain:g} marks the approach"
    if not (stands or found.strain > t.strain):
        said = f"what is memorized takes hardly any new directions of the head into use ({strain} of overfitting)."
        return "healthy", said, "strain"
    rises = found.learning < 0
    why = (
        f"what is memorized takes new directions of the head into use ({strain} of overfitting), and inside a pass the "
        f"loss {'rises' if rises else 'falls'}."
    )
    return "overfitting" if rises or previous == "overfitting" else "approaching", why, "strain"


def _by_drops(s: OverfitSignals, t: OverfitThresholds, previous: Outcome | None) -> Conclusion | None:
    """Judge whether repeated samples removed most of the loss, and it hardly falls inside passes."""
    if not s.drops or s.classifies:
        return None
    if s.lr_dropped:
        return (
            None if previous is None else (previous, "the learning rate has just dropped; the verdict stands.", "drops")
        )
    outcome, reason = by_drops(s.drops, t.drops, previous)
    return outcome, reason, "drops"


def _by_spread(s: OverfitSignals, t: OverfitThresholds, previous: Outcome | None) -> Conclusion | None:
    """Judge whether a classifier needs many more directions than at first, as it does to fit single samples."""
    if s.spread is None or not s.classifies or s.repetition is not None:
        return None
    said = f"k is {s.spread:.2f} times as large as when it was lowest"
    if s.spread > (t.keep if previous == "overfitting" else 1.0) * t.spread_alarm:
        return "overfitting", f"{said}: single samples are being fitted.", "spread"
    if s.spread > (t.keep if previous in OF_OVERFITTING else 1.0) * t.spread:
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


BY_KIND: Mapping[Kind, Callable[[OverfitSignals, OverfitThresholds, Outcome | None], Conclusion | None]] = {
    "baseline": _by_baseline,
    "loss": _by_loss,
    "revisits": _by_revisits,
    "strain": _by_strain,
    "drops": _by_drops,
    "spread": _by_spread,
}
"""The rule of each kind of evidence. No rule knows the results of the others."""


def _why_undecidable(s: OverfitSignals, t: OverfitThresholds) -> str:
    width = s.width(t)
    if s.epoch is None and not s.has_baseline:
        return "whether data has repeated is not known: neither samples nor an epoch tell how often they were seen."
    if not s.has_baseline:
        if s.epoch is not None and s.epoch < FIRST_PASSES:
            return f"there have been {s.epoch:.2f} passes over the data, and samples tell from the second on."
        return "samples that come back are not seen, nor passes in the loss, and there is no baseline."
    if not s.reached:
        return "the baseline has no value at this step."
    if s.deviation is None or width is None:
        return f"fewer than {t.smoothing + t.hold - 1} readings after the warm-up can be compared with the baseline."
    return f"LAR is within the baseline's band, which is too wide to tell: {width:.3f}."


def _now(found: Deviation | None) -> float | None:
    return None if found is None else found.now
