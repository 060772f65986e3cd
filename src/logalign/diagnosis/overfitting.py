"""Overfitting: detects if training still pays or only memorizes.

Method: samples that come back show the effect of training on others, and how much is memorized (`revisited.py`).
Where no samples are followed, passes over the data (`drops.py`, `repetition.py`) and a classifier's growth of k
replace them. Both know less. A baseline that does not overfit adds evidence. While no data has repeated, there is
nothing to overfit to. The detector never reads held-out losses.

This module keeps the state and feeds the rule. `decline.py` computes signals, and `overfit_rule.py` judges them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from logalign.diagnosis.baseline import Axis, Baseline
from logalign.diagnosis.decline import (
    Deviation,
    deviation,
    loss_below,
    reaches,
    smoothed_lar,
    spread,
    tokens_per_step,
    x_of,
)
from logalign.diagnosis.drops import DropMemory
from logalign.diagnosis.judge import CHECKPOINT, FROZEN, Judge, Judgment, Standing, frozen, loss_limit
from logalign.diagnosis.outcome import OF_OVERFITTING, Outcome
from logalign.diagnosis.overfit_rule import (
    EARLY_READINGS,
    FIRST_PASSES,
    NEAR,
    TOLD,
    OverfitSignals,
    OverfitThresholds,
    RestsOn,
    decide,
)
from logalign.diagnosis.repetition import LATELY, RepetitionMemory
from logalign.diagnosis.revisited import RevisitMemory
from logalign.diagnosis.series import FORM_NAMES, Series
from logalign.diagnosis.warm_up import warm_up_end
from logalign.errors import InputError
from logalign.runs.reading import FORMS, Reading

LR_DROP, LR_SHARE, LR_READINGS = 2 / 3, 0.2, 30
"""A learning rate drops abruptly if it falls below two thirds of the one before, by over a fifth of the highest.
A schedule that ends at zero falls smoothly."""
REMEMBERED_HIGHS = 32
MOST = 0.5
"""Share of the last readings that must hold the judged form."""
PLAIN = "lar"


def _dropped(series: Series, warm_up: float | None) -> bool:
    """Return whether the learning rate dropped abruptly in the last readings after warm-up."""
    steps, rates = series.steps[-LR_READINGS:], series.recent("lr", LR_READINGS)
    rates = rates[(steps > (math.inf if warm_up is None else warm_up)) & np.isfinite(rates)]
    if not rates.size:
        return False
    highest = float(np.nanmax(series.past("lr")[1]))
    return bool(((rates[1:] < LR_DROP * rates[:-1]) & (rates[:-1] - rates[1:] > LR_SHARE * highest)).any())


def _interpolates(series: Series) -> bool:
    """Test if the network interpolates its data."""
    loss, limit = series.last("loss"), loss_limit(series)
    return loss is not None and limit is not None and loss < limit


def _spent_early(series: Series) -> bool:
    """Test if the network interpolated its data in the first readings."""
    history, limit = series.history, loss_limit(series)
    early = history.column("loss")[: max(1, EARLY_READINGS // history.stride)]
    early = early[np.isfinite(early)]
    return limit is not None and bool(early.size) and bool(early.min() < limit)


def _sure(rests_on: RestsOn) -> str:
    """Say how many such alarms came in time."""
    told = {str(kind): each for kind, each in TOLD.items()}.get(rests_on)
    if told is None:
        return ""
    return f"{told[0]} of {told[1]} such alarms in the benchmark kept a checkpoint within {NEAR:g} nats of the best."


class OverfitDetector(Judge):
    """Tells a healthy decline of LAR from overfitting, reading by reading, in constant memory.

    Args:
        baseline: Reference for the run, in addition to its own samples.
        thresholds: Limits of the rule.
        series: See `Judge`.

    Raises:
        InputError: from `update()`, if a reading's shape is not the baseline's, or it lacks tokens_seen and the
            baseline compares along tokens only.

    Example:
        >>> from logalign import Reading
        >>> detector = OverfitDetector()
        >>> verdict = detector.update(Reading(step=0, lar=0.5, epoch=0.01))
        >>> print(verdict.outcome, "-", verdict.reason)
        healthy - no data has repeated so far (epoch 0.01).
    """

    regime = "decline"

    def __init__(
        self,
        *,
        baseline: Baseline | None = None,
        thresholds: OverfitThresholds | None = None,
        series: Series | None = None,
    ) -> None:
        self._lr_dropped = False
        super().__init__(series)
        self.thresholds = OverfitThresholds() if thresholds is None else thresholds
        self.baseline = baseline
        self._warm_up: tuple[float, int] | None = None  # its last step, and the step that showed it
        self._difference: tuple[str, int] | None = None
        self._highs: list[tuple[int, float]] = []  # step and smoothed LAR, each higher than all before
        self._repetition = RepetitionMemory()
        self._drops = DropMemory(errors=self.thresholds.drops.errors)
        self._revisits = RevisitMemory()
        self.rests_on: RestsOn = "nothing"

    @property
    def signals(self) -> OverfitSignals:
        """The numbers behind the verdict after the last reading.

        Raises:
            InputError: if no reading has been taken.
        """
        series, t, baseline, warm_up = self.series, self.thresholds, self.baseline, self._warm_up_end
        if series.last_step is None:
            raise InputError("signals: expected at least one reading with a defined LAR, found none")
        found: dict[str, Deviation | None] = {}
        classifies = series.m is not None and series.n is not None and series.m <= series.n
        axis = self._axis()
        for form in (*FORMS, "loss"):
            found[form] = None
            if baseline is not None:
                found[form] = deviation(
                    series, baseline, form, axis=axis, warm_up=warm_up, smoothing=t.smoothing, hold=t.hold
                )
        return OverfitSignals(
            step=series.last_step,
            epoch=series.last("epoch"),
            loss=series.last("loss"),
            warm_up=warm_up,
            has_baseline=baseline is not None,
            reached=baseline is not None and reaches(series, baseline, self._form, axis=axis),
            deviation=found[self._form],
            deviation_plain=found["lar"],
            deviation_vocab_centered=found["lar_vocab_centered"],
            deviation_centered=found["lar_centered"],
            deviation_loss=found["loss"],
            loss_below=None
            if baseline is None
            else loss_below(series, baseline, axis=axis, warm_up=warm_up, smoothing=t.loss_smoothing, hold=t.hold),
            schedule_difference=None if self._difference is None else self._difference[0],
            lr_dropped=self._lr_dropped,
            repetition=self._repetition.held(t.hold_repetition),
            drops=self._drops.held(t.drops.hold),
            spread=spread(series, self._form, hold=t.hold_repetition, highest=self._highest) if classifies else None,
            classifies=classifies,
            interpolates=_interpolates(series),
            spent_early=_spent_early(series),
            revisited=self._revisits.now,
            revisited_before=self._revisits.before,
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
        """The judged form: the thresholds' form where most readings and the baseline have it, else plain LAR."""
        form, baseline = self.thresholds.form, self.baseline
        values = self.series.recent(form)
        recorded = np.count_nonzero(np.isfinite(values)) > MOST * values.size
        return form if recorded and (baseline is None or baseline.has(form)) else PLAIN

    def _axis(self) -> Axis:
        tokens = self.series.last("tokens_seen") is not None
        return "step" if self.baseline is None else self.baseline.axis_for(tokens=tokens)

    def check(self, reading: Reading) -> None:
        """Also check shape and axis against the baseline."""
        super().check(reading)
        if self.baseline is not None:
            self.baseline.check_shape(reading.m, reading.n, name=f"step {reading.step}")
            self.baseline.axis_for(tokens=reading.tokens_seen is not None)

    def _follow(self) -> None:
        series, step = self.series, self.series.last_step
        assert step is not None
        if series.filled and self._warm_up is None:
            history = series.history
            end = warm_up_end(history.x, history.column("lar"), history.column("lr"))
            self._warm_up = None if end is None else (end, step)
        self._lr_dropped = _dropped(series, self._warm_up_end)
        self._repetition.follow(series, self._form, counts=self._warm_up is not None and not self._lr_dropped)
        level = smoothed_lar(series, self.thresholds.form)
        if level is not None and level > self._highest:
            self._highs = [*self._highs, (step, level)][-REMEMBERED_HIGHS:]
        self._drops.follow(series)
        self._revisits.follow(series)
        baseline = self.baseline
        if series.filled and baseline is not None and self._difference is None and self._warm_up is not None:
            axis = self._axis()
            words = baseline.schedule_difference(
                x_of(series, axis), series.recent("lr"), axis=axis, tokens_per_step=tokens_per_step(series)
            )
            self._difference = None if words is None else (words, step)

    def _forget(self, step: int) -> None:
        if self._warm_up is not None and self._warm_up[1] >= step:
            self._warm_up = None
        if self._difference is not None and self._difference[1] >= step:
            self._difference = None
        self._lr_dropped = _dropped(self.series, self._warm_up_end)
        self._highs = [high for high in self._highs if high[0] < step]
        self._repetition.rewind(step)
        self._drops.rewind(step)
        self._revisits.rewind(step)

    def _judge(self, before: Standing) -> Judgment:
        if frozen(self.series):
            return FROZEN
        signals, t = self.signals, self.thresholds
        said = decide(signals, t, before)
        self.rests_on = said.rests_on
        return Judgment(
            outcome=said.outcome,
            reason=said.reason,
            suggestion=self._suggestion(said.outcome),
            evidence=signals.numbers(t),
            basis=self._basis(said.rests_on),
            sure=_sure(said.rests_on) if said.outcome in OF_OVERFITTING else "",
            limits=self._limits(signals),
            standing=said.standing,
        )

    def _suggestion(self, outcome: Outcome) -> str:
        """Say what to do, or only what is missing for an outcome."""
        if outcome == "healthy":
            return "Train on."
        if outcome == "approaching":
            return (
                f"Keep the checkpoint of step {CHECKPOINT}: training on this data will soon stop paying; get more "
                "data, or stronger regularization."
            )
        if outcome == "overfitting":
            return (
                f"Stop, and keep the checkpoint of step {CHECKPOINT}; more data or stronger regularization would help."
            )
        series = self.series
        missing = [name for name in ("loss", "epoch") if series.last(name) is None]
        if missing:
            return f"Pass {' and '.join(missing)} to step()."
        if series.last("drift") is None and (series.last("epoch") or 0.0) >= FIRST_PASSES:
            return (
                "Let samples be followed: pass their ids, step(samples=ids), or their losses, step(losses=losses); the "
                "readings' field drift_reason says what is missing."
            )
        return "Train on."

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
        if rests_on == "loss":
            assert baseline is not None
            return (
                f"the training loss against {baseline.describe()}",
                f"approaching: the baseline's is {t.loss_below:.0%} above it in {t.hold} medians of {t.loss_smoothing} "
                f"readings; {fitted}",
            )
        if rests_on == "revisits":
            return (
                "how the losses of samples change from one visit to the next, while the network trains on others: "
                "robust regression over the last complete pass (docs/revisits.md)",
                f"approaching: a memorized share above {t.memorized:.0%}, of the first loss more than {t.material:.0%} "
                f"memorized with {t.errors:g} standard errors taken off, and a drift above -{t.falls:.0%} of what "
                "unseen samples would have, times the learning rate's share of its highest; overfitting: the same for "
                f"two passes, or drift above zero by {t.stands:g} standard errors; {fitted}",
            )
        if rests_on == "strain":
            return (
                "what the training loss does inside passes over the data and from one to the next, and the slope of "
                f"{name} in log(step) over the last factor of {LATELY:g} in steps",
                f"approaching: a strain of {t.strain:g} (loss lost by seeing the same samples again, times LAR lost, "
                f"summed over log(step)); overfitting: if the loss rises inside passes, too; {fitted}",
            )
        if rests_on == "drops":
            return (
                f"the training loss where passes begin: a memorized share of {t.drops.memorized:.0%}, and a loss that "
                f"falls by less than {t.drops.falls:.0%} of what unseen samples would have inside a pass; {fitted}",
            )
        if rests_on == "spread":
            return (
                f"{name} of a layer with no more outputs than inputs: k against its lowest value",
                f"approaching: {t.spread:g} times as large, in {t.hold_repetition} readings; overfitting: "
                f"{t.spread_alarm:g}; fitted on the fitting half of the benchmark (docs/benchmark.md)",
            )
        return ()

    def _limits(self, signals: OverfitSignals) -> tuple[str, ...]:
        baseline, limits = self.baseline, []
        if signals.schedule_difference is not None:
            limits.append(
                f"{signals.schedule_difference}: the band is {self.thresholds.schedule_factor:g} times as wide"
            )
        if baseline is not None:
            if baseline.site != self.series.site:
                limits.append(f"the baseline is of the layer {baseline.site!r}, the run of {self.series.site!r}")
            if signals.deviation is not None and signals.deviation.between is None:
                limits.append(
                    "the baseline is one run: how far runs of other seeds lie apart is assumed "
                    f"({self.thresholds.between_one_run})"
                )
            if baseline.epoch is not None and baseline.epoch > 1:
                limits.append(f"the baseline itself repeats its data (epoch {baseline.epoch:.1f})")
        return tuple(limits)

    def _own_state(self) -> dict[str, Any]:
        return {
            "lr_dropped": self._lr_dropped,
            "warm_up": None if self._warm_up is None else list(self._warm_up),
            "difference": None if self._difference is None else list(self._difference),
            "highs": [list(high) for high in self._highs],
            "repetition": self._repetition.state(),
            "drops": self._drops.state(),
            "revisits": self._revisits.state(),
        }

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        self._lr_dropped = state["lr_dropped"]
        self._warm_up = None if state["warm_up"] is None else (state["warm_up"][0], state["warm_up"][1])
        self._difference = None if state["difference"] is None else (state["difference"][0], state["difference"][1])
        self._highs = [(step, level) for step, level in state["highs"]]
        self._repetition = RepetitionMemory.from_state(state["repetition"])
        self._drops = DropMemory.from_state(state["drops"], errors=self.thresholds.drops.errors)
        self._revisits = RevisitMemory.from_state(state["revisits"])
