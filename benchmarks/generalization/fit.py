"""Fit the rule of revisits on runs that are for fitting: what a verdict costs decides, in nats.

Three numbers of `OverfitThresholds` are chosen together, from a coarse grid: those with the lowest mean regret of the
first alarm over all runs, healthy ones among them, no run counting for more than half a nat. The grid is coarse because
the lowest regret is broad: any of its neighbors does nearly as well. The numbers of standard errors are not fitted: two
of them, as everywhere, for clean classifiers must not be alarmed by what is within the error of zero (docs/log.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.generalization.regret import Cost, cost
from benchmarks.generalization.store import Made
from benchmarks.generalization.truth import outcome
from benchmarks.generalization.verdicts import readings_of
from logalign.diagnosis.overfit_rule import OverfitThresholds, stalls
from logalign.diagnosis.revisited import Revisited, RevisitMemory
from logalign.diagnosis.series import Series

GRID = {
    "memorized": (0.1, 0.15, 0.2, 0.25, 0.3, 0.4),
    "material": (0.0, 0.01, 0.02, 0.03, 0.05),
    "falls": (0.0, 0.005, 0.01, 0.02),
}
MOST = 0.5
"""Nats that one run counts for at most."""


@dataclass(frozen=True)
class Case:
    """A run, and what samples that come back showed after each pass."""

    run: Made
    seen: tuple[tuple[int, Revisited], ...]

    def cost(self, thresholds: OverfitThresholds) -> Cost:
        """Of the first alarm."""
        first = next((reading for reading, each in self.seen if stalls(each, thresholds)), None)
        return cost(self.run, first)


def cases(runs: Sequence[Made]) -> list[Case]:
    """Those runs whose samples were followed and that did not diverge."""
    found = [Case(run, _seen(run)) for run in runs if "diverged_step" not in run.truth and "drift" in run.columns]
    return [case for case in found if case.seen]


def _seen(run: Made) -> tuple[tuple[int, Revisited], ...]:
    series, memory, found = Series(), RevisitMemory(), []
    for i, reading in enumerate(readings_of(run)):
        if series.add(reading):
            memory.follow(series)
            if memory.now is not None and (not found or memory.now is not found[-1][1]):
                found.append((i, memory.now))
    return tuple(found)


def mean_regret(given: Sequence[Case], thresholds: OverfitThresholds) -> float:
    """Over these runs, in nats."""
    return float(np.mean([min(case.cost(thresholds).regret, MOST) for case in given]))


def fit(given: Sequence[Case]) -> OverfitThresholds:
    """The thresholds of the grid with the lowest mean regret; of equals, those first in it."""
    choices = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    return min(
        (replace(OverfitThresholds(), **choice) for choice in choices), key=lambda each: mean_regret(given, each)
    )


def summary(given: Sequence[Case]) -> list[dict[str, str]]:
    """The fitted numbers and those of the rule, with their regret here, and in families left out."""
    rows = []
    for words, thresholds in (("fitted", fit(given)), ("in the rule", OverfitThresholds())):
        row = {"": words} | {name: f"{getattr(thresholds, name):g}" for name in GRID}
        rows.append(row | {"mean regret": f"{mean_regret(given, thresholds):.4f}", "runs": str(len(given))})
    families = sorted({case.run.config.family for case in given})
    for family in families if len(families) > 1 else ():
        thresholds = fit([case for case in given if case.run.config.family != family])
        mine = [case for case in given if case.run.config.family == family]
        row = {"": f"fitted without {family}"} | {name: f"{getattr(thresholds, name):g}" for name in GRID}
        rows.append(row | {"mean regret": f"{mean_regret(mine, thresholds):.4f}", "runs": str(len(mine))})
    return rows


def alarmed(given: Sequence[Case], thresholds: OverfitThresholds) -> tuple[int, int]:
    """How many healthy runs are alarmed, of how many."""
    healthy = [case for case in given if outcome(case.run) == "healthy"]
    return sum(case.cost(thresholds).alarmed for case in healthy), len(healthy)
