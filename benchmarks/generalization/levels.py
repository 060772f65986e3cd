"""Levels: the numbers that logalign's rule holds against its thresholds, at every reading.

A threshold below a level makes an alarm, whatever the threshold: so thresholds can be fitted, and rules with other
thresholds scored, without judging the runs again. That the levels of the rule's own thresholds alarm where its verdicts
do is tested on every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from logalign.diagnosis.detector import Detector
from logalign.diagnosis.overfit_rule import OverfitSignals, OverfitThresholds

SILENT = -math.inf
FITTED = ("approaching", "loss_below", "strain", "drop", "spread")
"""The fields of `OverfitThresholds` that are fitted; each has a level."""


def levels(detector: Detector) -> dict[str, float]:
    """What stands against each threshold after the last reading, and "acceleration": whether that alarms by itself.

    SILENT where the rule does not ask, and where the verdict is that of the grokking regime.
    """
    names = (*FITTED, "acceleration")
    if detector.decline.series.last_step is None or detector.verdict.regime == "grokking":
        return dict.fromkeys(names, SILENT)
    s, t = detector.decline.signals, detector.decline.thresholds
    if (s.epoch is not None and s.epoch < 1) or s.warm_up is None:
        return dict.fromkeys(names, SILENT)
    return {name: OF[name](s, t) for name in names}


def _approaching(s: OverfitSignals, t: OverfitThresholds) -> float:
    width = s.width(t)
    if s.deviation is None or width is None or (s.source == "first epoch" and s.lr_just_changed):
        return SILENT
    return s.deviation.low / s.caution(t) if s.deviation.low > width else SILENT


def _loss_below(s: OverfitSignals, t: OverfitThresholds) -> float:
    if s.loss_below is None or s.source != "runs" or s.interpolates:
        return SILENT
    return s.loss_below.low / s.caution(t)


def _strain(s: OverfitSignals, t: OverfitThresholds) -> float:
    return SILENT if s.repetition is None or s.lr_dropped else s.repetition.strain


def _drop(s: OverfitSignals, t: OverfitThresholds) -> float:
    return SILENT if s.repetition is None or s.lr_dropped else s.repetition.drop


def _spread(s: OverfitSignals, t: OverfitThresholds) -> float:
    return SILENT if s.spread is None or not s.classifies or s.repetition is not None else s.spread


def _acceleration(s: OverfitSignals, t: OverfitThresholds) -> float:
    slow = s.trend
    if slow is None or slow.decline_rate >= 0 or slow.shortfall <= t.shortfall or slow.lr_changed_at is not None:
        return SILENT
    return math.inf if slow.acceleration <= -t.acceleration_sigmas * slow.acceleration_error else SILENT


OF: Mapping[str, Callable[[OverfitSignals, OverfitThresholds], float]] = {
    "approaching": _approaching,
    "loss_below": _loss_below,
    "strain": _strain,
    "drop": _drop,
    "spread": _spread,
    "acceleration": _acceleration,
}
