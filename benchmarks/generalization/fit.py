"""Fit the thresholds of logalign's rule on runs that are for fitting.

Each threshold is fitted by itself, for an alarm of any kind of evidence is an alarm. It is the one that finds most of
the overfit runs on time, then most at all, among those at least a tenth above the level of every healthy run: right
above the highest healthy run, the next one or the one after would be alarmed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.generalization import score, verdicts
from benchmarks.generalization.levels import FITTED
from benchmarks.generalization.score import Context, Detected
from benchmarks.generalization.store import Made
from benchmarks.generalization.truth import outcome
from logalign.diagnosis.overfit_rule import OverfitThresholds

MARGIN = 1.1
"""Least ratio of a threshold to the highest level of a healthy run; chosen, not fitted."""
CANDIDATES = 200


@dataclass(frozen=True, eq=False)
class Case:
    """A run and the highest level so far at each reading, with or without its baseline."""

    run: Made
    reached: NDArray[np.float64]


def fit(found: Sequence[Context]) -> dict[str, float]:
    """The thresholds by name, fitted on these runs, each with and without its baseline."""
    return {name: best(cases(found, name)) for name in FITTED}


def cases(found: Sequence[Context], name: str) -> list[Case]:
    """The levels of every run, without its baseline and, where it has one, with it."""
    both = [(each, with_baseline) for each in found for with_baseline in (False, True)[: 1 + bool(each.baselines)]]
    series = [(each.run, verdicts.said(each, with_baseline=wanted).levels[name]) for each, wanted in both]
    return [Case(run, np.maximum.accumulate(values)) for run, values in series if np.isfinite(values).any()]


def best(given: Sequence[Case]) -> float:
    """The threshold of these cases; infinite where no overfit run has a level, and then it alarms on none."""
    overfit = [case for case in given if outcome(case.run) == "overfit"]
    values = np.concatenate([np.empty(0), *(case.reached[np.isfinite(case.reached)] for case in overfit)])
    if not values.size:
        return math.inf
    quiet = [float(case.reached[-1]) for case in given if outcome(case.run) == "healthy"]
    lowest = MARGIN * max([each for each in quiet if each > 0], default=0.0)
    above = values[values >= lowest]
    choices = np.append(np.quantile(above, np.linspace(0, 1, CANDIDATES)) if above.size else [], lowest)

    def worth(threshold: float) -> tuple[int, int]:
        said = [score.judge(case.run, first_above(case, threshold)).verdict for case in overfit]
        on_time = said.count("on time")
        return on_time, on_time + said.count("late") - said.count("early")

    return float(max(np.unique(choices), key=worth))


def left_out(found: Sequence[Context], name: str) -> list[Detected]:
    """What a threshold by itself says of the runs of each recipe when it is fitted on all others."""
    given, detected = cases(found, name), []
    for recipe in sorted({case.run.config.recipe for case in given}):
        threshold = best([case for case in given if case.run.config.recipe != recipe])
        mine = [case for case in given if case.run.config.recipe == recipe]
        detected += [score.judge(case.run, first_above(case, threshold)) for case in mine]
    return detected


def first_above(case: Case, threshold: float) -> int | None:
    """The first reading whose level is above the threshold."""
    first = int(np.searchsorted(case.reached, threshold, side="right"))
    return first if first < len(case.reached) else None


def detection(found: Sequence[Context], thresholds: Mapping[str, float], *, with_baseline: bool) -> list[Detected]:
    """What the rule with these thresholds says of every run: its first alarm of any kind, held against the truth."""
    detected = []
    for context in found:
        held = verdicts.said(context, with_baseline=with_baseline).levels
        alarms = held["acceleration"] == math.inf
        for name, threshold in thresholds.items():
            alarms = alarms | (held[name] > threshold)
        first = np.flatnonzero(alarms)
        detected.append(score.judge(context.run, int(first[0]) if first.size else None))
    return detected


def summary(found: Sequence[Context]) -> list[dict[str, str]]:
    """The fitted thresholds, those of the rule, and what each does by itself in these runs and in recipes left out."""
    rows = []
    for name, threshold in fit(found).items():
        given = cases(found, name)
        here = [score.judge(case.run, first_above(case, threshold)) for case in given]
        rows.append(
            {
                "threshold": name,
                "fitted": f"{threshold:.4g}",
                "in the rule": f"{getattr(OverfitThresholds(), name):.4g}",
                "on time, found, of": _found(here),
                "false alarms": _alarms(here),
                "left out: on time, found, of": _found(left_out(found, name)),
                "left out: false alarms": _alarms(left_out(found, name)),
            }
        )
    return rows


def _found(detected: Sequence[Detected]) -> str:
    overfit = [each.verdict for each in detected if each.truth == "overfit"]
    return f"{overfit.count('on time')}, {len(overfit) - overfit.count('missed')}, {len(overfit)}"


def _alarms(detected: Sequence[Detected]) -> str:
    healthy = [each.verdict for each in detected if each.truth == "healthy"]
    return f"{healthy.count('false alarm')} of {len(healthy)}"
