"""Grokking: tell whether a network that fits its training data memorizes or generalizes.

Method: once the training loss is under 5 % of log m, the network interpolates. While it memorizes, LAR sits on a
plateau near 1/2 (k near n). As it turns to the general solution, LAR climbs, and k falls to the number of directions
that the learned function uses. The rule compares k, not LAR, because its ratio to the plateau's means the same at every
width. LAR also drifts up slowly in networks that never generalize, so a climb has to be steep. The rule measures the
fall of k as a power of the step, which means the same early and late.

The rule uses the **centered** LAR. An optimizer slingshot pushes all inputs in one common direction and lifts plain
LAR, sometimes for good, without generalization. Centering removes that direction. Where only plain LAR is recorded, a
climb has to last longer, and after a jump of the training loss it proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from logalign.diagnosis.judge import FROZEN, INTERPOLATION, VERDICT, Judge, Judgment, Standing, frozen, loss_limit
from logalign.diagnosis.outcome import Outcome
from logalign.diagnosis.robust import median, running_median
from logalign.diagnosis.series import Series
from logalign.diagnosis.verdict import Number

CENTERED, PLAIN = "lar_centered", "lar"


@dataclass(frozen=True, kw_only=True)
class GrokThresholds:
    """Thresholds for interpolating, memorizing and generalizing.

    They are developed on eight trainings of modular addition: mod 59 and 67, MLPs and one-block transformers, AdamW
    with weight decay 0 to 1, a fifth to half of all pairs. Three of them are tests/data/modadd*.jsonl. They are scored
    on the 39 algorithmic runs of the benchmark, without fitting there: docs/benchmark.md.

    Attributes:
        interpolation: Training loss, as a share of log m, under which the network interpolates.
        loss_readings: Readings in the median loss.
        lost_readings: Once on the plateau, the network also interpolates while the median loss of this many readings
            is under the limit. In small transformers the loss repeatedly exceeds it for up to ten readings.
        plateau_readings: Readings, from the first that interpolates, whose median LAR is the memorization plateau.
        min_plateau_readings: This many suffice for "memorizing".
        near_random: k / n on the plateau above which weights and inputs are about as unrelated as random ones. It is
            0.44 to 0.65 in those trainings. Networks that fit clean labels from the start settle far below, and have
            no memorization plateau.
        smoothing: Readings of the running median that may climb.
        fall_of_k: k / plateau k below which LAR has climbed.
        hold: Number of successive smoothed readings below it.
        hold_plain: The same where only plain LAR is known.
        steepness: k also has to fall with at least this power of the step. Where held-out accuracy rises from 0.05 to
            0.1, the powers are 0.39 to 0.5. Where it stays under 0.05, they are at most 0.2 in MLPs and 0.36 in
            transformers, while k drifts down to 70 % of the plateau's.
        stretch: Steepness covers the steps from `now / stretch` on.
        fall_alone: k / plateau k below which steepness is not required.
        keep: "generalizing" stands until k / plateau k is back above this.
        slingshot: Factor of a training loss jump over the median of five readings before, while interpolating. Plain
            LAR proves nothing after it.
    """

    interpolation: float = INTERPOLATION
    loss_readings: int = 3
    lost_readings: int = 40
    plateau_readings: int = 10
    min_plateau_readings: int = 5
    near_random: float = 0.4
    smoothing: int = 5
    fall_of_k: float = 0.75
    hold: int = 3
    hold_plain: int = 8
    steepness: float = 0.4
    stretch: float = 1.5
    fall_alone: float = 0.5
    keep: float = 0.85
    slingshot: float = 10.0


@dataclass(frozen=True, kw_only=True)
class GrokSignals:
    """The numbers that the rule uses, None where unavailable.

    Attributes:
        form: "lar_centered" or "lar", the form in use.
        loss: Median training loss of the last readings.
        loss_limit: Below it the network interpolates.
        loss_long: Median training loss of more readings, once on the plateau.
        epoch: Passes over the data.
        plateau_readings: Readings on the memorization plateau so far.
        plateau: LAR there.
        level: LAR now, smoothed.
        k: n^(2 (1 - level)): once the network generalizes, the number of directions that its solution uses.
        k_share: k / n on the plateau.
        k_ratio: k / k on the plateau.
        k_ratio_held: The highest k_ratio of the last `hold` smoothed readings, None where there are fewer.
        steepness: `-d log k / d log step` over the last stretch of steps, None where it starts before the plateau.
        slingshot_step: The step of a training loss jump during interpolation.
    """

    form: str
    loss: float | None
    loss_limit: float | None
    loss_long: float | None
    epoch: float | None
    plateau_readings: int
    plateau: float | None
    level: float | None
    k: float | None
    k_share: float | None
    k_ratio: float | None
    k_ratio_held: float | None
    steepness: float | None
    slingshot_step: int | None

    @property
    def rise(self) -> float | None:
        """The rise of LAR above its plateau."""
        return None if self.level is None or self.plateau is None else self.level - self.plateau

    @property
    def interpolates(self) -> bool:
        """True where the training loss is known and below its limit, jumps aside."""
        known = [loss for loss in (self.loss, self.loss_long) if loss is not None]
        return bool(known) and self.loss_limit is not None and min(known) < self.loss_limit

    @property
    def repeats(self) -> bool:
        """True where data has repeated, or where no epoch is recorded."""
        return self.epoch is None or self.epoch >= 1


def signals_of(
    series: Series,
    form: str,
    plateau: Sequence[tuple[int, float]],
    slingshot_step: int | None,
    thresholds: GrokThresholds,
    *,
    any_loss: bool = False,
) -> GrokSignals:
    """Compute the signals after the last reading; `plateau` holds (step, LAR) of the plateau so far."""
    hold = thresholds.hold if form == CENTERED else thresholds.hold_plain
    values = series.recent(form)
    levels = running_median(values[np.isfinite(values)], thresholds.smoothing)[-hold:]
    level = float(levels[-1]) if levels.size else None
    ground = median(np.array([lar for _, lar in plateau])) if plateau else None
    k_share = k_ratio = k_ratio_held = steepness = None
    if ground is not None and series.n is not None:
        k_share = _power(series.n, 1 - 2 * ground)
        if level is not None:
            k_ratio = _power(series.n, -2 * (level - ground))
            if levels.size == hold:
                k_ratio_held = _power(series.n, -2 * (float(levels.min()) - ground))
            steepness = _steepness(series, form, level, since=plateau[0][0], stretch=thresholds.stretch)
    return GrokSignals(
        form=form,
        loss=_median_loss(series, thresholds.loss_readings),
        loss_limit=loss_limit(series, thresholds.interpolation, any_loss=any_loss),
        loss_long=_median_loss(series, thresholds.lost_readings) if plateau else None,
        epoch=series.last("epoch"),
        plateau_readings=len(plateau),
        plateau=ground,
        level=level,
        k=None if level is None or series.n is None else _power(series.n, 2 * (1 - level)),
        k_share=k_share,
        k_ratio=k_ratio,
        k_ratio_held=k_ratio_held,
        steepness=steepness,
        slingshot_step=slingshot_step,
    )


def decide(signals: GrokSignals, thresholds: GrokThresholds, previous: Outcome | None) -> tuple[Outcome, str]:
    """The rule: return the outcome and its reason, with no state but the outcome that stands so far."""
    s = signals
    name = "centered LAR" if s.form == CENTERED else "plain LAR"
    if s.loss is None:
        return "undecidable", (
            f"the training loss is not known in all of the last {thresholds.loss_readings} readings, so neither is "
            "whether the network interpolates."
        )
    if s.loss_limit is None:
        return "undecidable", (
            "the loss did not begin near log m, as the cross entropy of an untrained classifier does, so it does not "
            "say whether the network interpolates."
        )
    if s.k is None:
        return "undecidable", "the layer's shape (m, n) is not recorded, or there are too few readings."
    if not s.interpolates:
        return "undecidable", (
            f"the training loss, {s.loss:.3g}, is not under {s.loss_limit:.3g} (5 % of log m): the network does not "
            "interpolate."
        )
    if not s.repeats:
        return "undecidable", "no data has repeated so far, so there is nothing to have memorized."
    if s.k_ratio is None or s.k_share is None or s.plateau_readings < thresholds.min_plateau_readings:
        return "undecidable", (
            f"the network interpolates, and its plateau has {s.plateau_readings} of "
            f"{thresholds.min_plateau_readings} readings so far."
        )
    t = thresholds
    steep = s.steepness is not None and s.steepness > t.steepness
    climbed = (
        s.plateau_readings >= t.plateau_readings
        and s.k_ratio_held is not None
        and s.k_ratio_held < (t.fall_of_k if steep else t.fall_alone)
    )
    stands = previous == "generalizing" and s.k_ratio < thresholds.keep
    if stands or climbed:
        if s.form == PLAIN and not stands and s.slingshot_step is not None:
            return "undecidable", (
                f"plain LAR has climbed, but the training loss jumped at step {s.slingshot_step:,}: an optimizer "
                "slingshot lifts plain LAR, too, and the centered form is not recorded."
            )
        return "generalizing", (
            f"{name} has climbed {s.rise:.3f} above its memorization plateau of {s.plateau:.3f}, and k has fallen to "
            f"{s.k:.3g}, {s.k_ratio:.0%} of the plateau's."
        )
    if s.k_share <= thresholds.near_random:
        return "undecidable", (
            f"the network interpolates, but {name} was {s.plateau:.3f} (k / n = {s.k_share:.2f}) when it began to: "
            "it never sat on a memorization plateau near 1/2."
        )
    return "memorizing", (
        f"the network interpolates (training loss {s.loss:.3g}), and {name} is {s.rise:+.3f} from its memorization "
        f"plateau of {s.plateau:.3f}: k is {s.k:.3g}, {s.k_ratio:.0%} of the plateau's"
        + (", a slow drift." if s.k_ratio < t.fall_of_k and not steep else ".")
    )


SUGGESTIONS: Mapping[Outcome, str] = {
    "memorizing": "Do not trust the training loss: train on with weight decay, or use more data; it may generalize "
    "much later or never.",
    "generalizing": "Train on until k settles; its last value estimates how many directions the solution uses.",
    "undecidable": "Pass loss and epoch to step(), and train on until the training loss is under 5 % of log m.",
}


class GrokDetector(Judge):
    """Separates memorizing from generalizing, reading by reading, in constant memory.

    Args:
        thresholds: Limits of the rule.
        any_loss: Treat every loss as a softmax cross entropy, even one that began far from log m.
        series: See `Judge`.

    Example:
        >>> from logalign import Reading
        >>> detector = GrokDetector(any_loss=True)
        >>> for step in range(0, 400, 10):
        ...     verdict = detector.update(Reading(step=step, lar=0.55 + 1e-6 * step, loss=0.01, m=59, n=64, epoch=step))
        >>> verdict.outcome, verdict.since_step
        ('memorizing', 60)
    """

    regime = "grokking"

    def __init__(
        self, *, thresholds: GrokThresholds | None = None, any_loss: bool = False, series: Series | None = None
    ) -> None:
        self._any_loss = any_loss
        super().__init__(series)
        self.thresholds = GrokThresholds() if thresholds is None else thresholds
        self._plateau: list[tuple[int, float]] = []  # step, LAR
        self._form: str | None = None
        self._slingshot_step: int | None = None

    @property
    def signals(self) -> GrokSignals:
        """The numbers behind the verdict after the last reading."""
        form = self._form or self._recorded_form()
        return signals_of(
            self.series, form, self._plateau, self._slingshot_step, self.thresholds, any_loss=self._any_loss
        )

    def _recorded_form(self) -> str:
        return PLAIN if self.series.last(CENTERED) is None else CENTERED

    def _follow(self) -> None:
        series, thresholds = self.series, self.thresholds
        loss = _median_loss(series, thresholds.loss_readings)
        limit = loss_limit(series, thresholds.interpolation, any_loss=self._any_loss)
        epoch = series.last("epoch")
        if loss is None or limit is None or loss >= limit or (epoch is not None and epoch < 1):
            return
        if len(self._plateau) < thresholds.plateau_readings:
            self._form = self._form or self._recorded_form()
            value = series.last(self._form)
            if value is not None and series.last_step is not None:
                self._plateau.append((series.last_step, value))
        elif self._slingshot_step is None and self.verdict.outcome != "generalizing":
            losses = series.recent("loss", 6)
            before = losses[:-1][np.isfinite(losses[:-1])]
            if before.size == 5 and losses[-1] / thresholds.slingshot > median(before):
                self._slingshot_step = series.last_step

    def _forget(self, step: int) -> None:
        self._plateau = [point for point in self._plateau if point[0] < step]
        if not self._plateau:
            self._form = None
        if self._slingshot_step is not None and self._slingshot_step >= step:
            self._slingshot_step = None

    def _judge(self, before: Standing) -> Judgment:
        if frozen(self.series):
            return FROZEN
        s = self.signals
        outcome, reason = decide(s, self.thresholds, before.get(VERDICT))
        t = self.thresholds
        evidence: dict[str, Number] = {
            "plateau": s.plateau,
            "rise": s.rise,
            "level": s.level,
            "generalized_k": s.k,
            "k_ratio": s.k_ratio,
            "steepness": s.steepness,
            "effective_dim": _effective_dim(self.series),
            "loss": s.loss,
            "loss_limit": s.loss_limit,
            "epoch": s.epoch,
        }
        basis = [
            f"{'centered' if s.form == CENTERED else 'plain'} LAR, median of {t.smoothing} readings, against its "
            f"median over the first {t.plateau_readings} with a training loss under {t.interpolation:.0%} of log m",
            f"generalizing: k under {t.fall_of_k:.0%} of the plateau's and falling with the step's power "
            f"{t.steepness:g} or more, or under {t.fall_alone:.0%}; memorizing: k above {t.near_random:.0%} of n on "
            "the plateau; developed on eight trainings of modular addition, scored on others: docs/benchmark.md",
        ]
        if s.epoch is None:
            basis.append("no epoch is recorded: data is taken to repeat")
        limits: tuple[str, ...] = ()
        if s.form == PLAIN:
            limits = (
                "only plain LAR is recorded: an optimizer slingshot may lift it without any generalization; record "
                "lar_centered to tell them apart",
            )
        return Judgment(
            outcome=outcome,
            reason=reason,
            suggestion=SUGGESTIONS[outcome],
            evidence=evidence,
            basis=tuple(basis),
            limits=limits,
        )

    def _own_state(self) -> dict[str, Any]:
        return {
            "plateau": [list(point) for point in self._plateau],
            "form": self._form,
            "slingshot_step": self._slingshot_step,
        }

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        self._plateau = [(step, lar) for step, lar in state["plateau"]]
        self._form = state["form"]
        self._slingshot_step = state["slingshot_step"]


def _median_loss(series: Series, count: int) -> float | None:
    losses = series.recent("loss", count)
    known = losses[np.isfinite(losses)]
    return median(known) if known.size == count else None


def _steepness(series: Series, form: str, level: float, *, since: int, stretch: float) -> float | None:
    """The power of the step with which k falls from `now / stretch` on, where LAR is the median of five bins."""
    history, now = series.history, series.last_step
    if now is None or series.n is None or now / stretch < since or now == 0:
        return None
    lar = history.column(form)
    middle = int(np.searchsorted(history.x, now / stretch))
    around = lar[max(0, middle - 2) : middle + 3]
    around = around[np.isfinite(around)]
    if not around.size:
        return None
    return 2 * math.log(series.n) * (level - median(around)) / math.log(stretch)


def _effective_dim(series: Series) -> float | None:
    lar = series.last("lar")
    return None if lar is None or series.n is None else _power(series.n, 2 * (1 - lar))


def _power(n: int, exponent: float) -> float | None:
    """n^exponent, None where a float overflows."""
    try:
        return math.pow(n, exponent)
    except OverflowError:
        return None
