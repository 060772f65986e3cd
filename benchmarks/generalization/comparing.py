"""How far the orders of `logalign compare` can be trusted, and the fit of the constants that they rest on.

A *comparison* is a group of runs whose held-out losses compare, or those of one recipe, at the last step that all have
reached. Constants are fitted on comparisons of the fitting half; those of the other half are scored.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from benchmarks.generalization import score
from benchmarks.generalization.store import Column, Made
from logalign.diagnosis import ranking
from logalign.diagnosis.comparable import Columns, aligned
from logalign.diagnosis.ranking import ESTIMATE, LOSS_AND_LAR, Quantity, Ranked
from logalign.errors import InputError

FRACTIONS = (0.5, 0.75, 1.0)
"""Of the steps in common, at which constants are fitted."""
EVALUATIONS = 5
"""The last evaluations, whose mean is the truth."""
FEWEST = 5
"""Runs that a rank correlation is taken over."""
TOO_CLOSE = 0.02
"""Nats that held-out losses have to differ by for one order to be wrong."""
LEVEL = 0.95

Group = Callable[[Made], str]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs in the order that `logalign compare` gives, and the truth about them.

    Attributes:
        name: Of the group or the recipe.
        quantity: What the order is by.
        ranked: The runs in their order.
        columns: Of each run, up to where all are judged, by name.
        truth: The held-out loss of each run there, by name.
        runs: Each run, by name.
    """

    name: str
    quantity: Quantity
    ranked: Sequence[Ranked]
    columns: Mapping[str, Columns]
    truth: Mapping[str, float]
    runs: Mapping[str, Made]


def comparisons(runs: Sequence[Made], group: Group, fraction: float = 1.0) -> Iterator[Comparison]:
    """Each group of at least two runs that compare, in the order of `logalign compare`."""
    groups: dict[str, list[Made]] = defaultdict(list)
    for run in runs:
        groups[group(run)].append(run)
    for name, mine in groups.items():
        if len(mine) < 2:
            continue
        try:
            whole, at = aligned({run.name: _until(run, math.inf) for run in mine}, {}, "step")
            columns = {run.name: _until(run, fraction * at) for run in mine if run.name in whole}
            quantity = ranking.choose(columns, {})
        except InputError:
            continue  # fewer than two of them compare
        ranked = ranking.order(columns, quantity)
        truth = {each: _truth(columns[each]["val_loss"]) for each in columns}
        yield Comparison(name, quantity, ranked, columns, truth, {run.name: run for run in mine})


def table(runs: Sequence[Made], group: Group) -> list[dict[str, str]]:
    """One row for each group of runs: how well it is ordered, and how many intervals and sure orders hold."""
    by_recipe = {each.name: each for each in comparisons(runs, lambda run: f"{group(run)}: {run.config.recipe}")}
    rows = []
    for found in comparisons(runs, group):
        parts = [each for name, each in by_recipe.items() if name.startswith(f"{found.name}: ")]
        recipes = [each for each in parts if len(each.ranked) < len(found.ranked)]
        rows.append(
            {
                "group": found.name,
                "runs": str(len(found.ranked)),
                "ordered by": found.quantity,
                "Spearman": _number(spearman(found)),
                "Spearman of plain LAR": _number(_against(found, lambda run: -run["lar"][-10:].mean())),
                "of the training loss": _number(_against(found, lambda run: run["loss"][-6:].mean())),
                "of the first pass and drift": _number(_against(found, drifted)),
                "intervals right": _share([held for each in (found, *recipes) for held in held_intervals(each)]),
                "sure neighbors right": _share([right for each in (found, *recipes) for right in sure(each)]),
            }
        )
    return rows


def drifted(columns: Columns) -> float:
    """The loss at the end of the first pass, and how far samples have drifted since; NaN where there is no drift.

    It estimates the held-out loss, too, for runs that record drift. `logalign compare` does not use it so far.
    """
    drift = columns.get("drift", np.full(columns["step"].size, np.nan))
    known, epochs = np.isfinite(drift), columns["epoch"]
    if not known.any():
        return math.nan
    first = columns["loss"][epochs < 1][-EVALUATIONS:]
    later = np.interp(columns["step"], columns["step"][known], drift[known])
    return float(first.mean() + (later[1:] * np.diff(np.maximum(epochs, 1))).sum())


def spearman(found: Comparison) -> float:
    """Of the order with the truth."""
    scores = {each.run: each.score for each in found.ranked}
    return _correlation([(scores[name], found.truth[name]) for name in scores])


def held_intervals(found: Comparison) -> list[bool]:
    """Whether each interval holds by how much a run's held-out loss lies above that of the first."""
    first = found.truth[found.ranked[0].run]
    return [
        each.low <= found.truth[each.run] - first <= each.high
        for each in found.ranked
        if each.low is not None and each.high is not None
    ]


def sure(found: Comparison) -> list[bool]:
    """Whether each run that is surely before the next one has the lower held-out loss, or no higher one to speak of."""
    return [
        found.truth[each.run] < found.truth[after.run] + TOO_CLOSE
        for each, after in zip(found.ranked, found.ranked[1:], strict=False)
        if each.is_sure
    ]


def fit(runs: Sequence[Made], group: Group) -> list[dict[str, str]]:
    """The constants that these runs give beside those of the rule, and how they do in recipes that are left out."""
    by: tuple[Group, ...] = (group, lambda run: run.config.recipe)
    every = [each for fraction in FRACTIONS for name in by for each in comparisons(runs, name, fraction)]
    first = [pair for found in every if found.quantity == ESTIMATE for pair in _pairs(found) if pair.is_first]
    scored = [pair for found in every if found.quantity == LOSS_AND_LAR for pair in _pairs(found)]
    held, right = [], []
    for recipe in sorted({run.config.recipe for run in runs}):
        if mine := [pair for pair in first if pair.recipes[1] == recipe]:
            low, high, close = _limits([pair for pair in first if recipe not in pair.recipes])
            held += [
                (low * pair.apart if pair.is_sure else -close) <= pair.true <= high * pair.apart + close
                for pair in mine
            ]
        if mine := [pair for pair in scored if recipe in pair.recipes]:
            margin = _margin([pair for pair in scored if recipe not in pair.recipes])
            right += [pair.true > -TOO_CLOSE for pair in mine if pair.apart > margin]
    fitted = dict(zip(("LOW", "HIGH", "CLOSE"), _limits(first), strict=True))
    rows = [(name, value, getattr(ranking, name), held) for name, value in fitted.items()]
    rows.append(("MARGIN", _margin(scored), ranking.MARGIN, right))
    return [
        {
            "constant": name,
            "fitted": f"{value:.3f}",
            "in the rule": f"{in_rule:.3f}",
            "holds in recipes left out": _share(left_out),
        }
        for name, value, in_rule, left_out in rows
    ]


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """A run and one behind it in the order.

    Attributes:
        recipes: Of both.
        apart: How far their scores are apart.
        true: By how much the held-out loss of the second is above that of the first.
        is_first: Whether the first is the first of its order.
        is_sure: Whether their estimates, if there are any, lie farther apart than their errors explain.
    """

    recipes: tuple[str, str]
    apart: float
    true: float
    is_first: bool
    is_sure: bool


def _pairs(found: Comparison) -> Iterator[_Pair]:
    errors = {name: (ranking.estimate(columns) or (0.0, 0.0))[1] for name, columns in found.columns.items()}
    for better, worse in combinations(found.ranked, 2):
        a, b = found.runs[better.run].config, found.runs[worse.run].config
        apart = worse.score - better.score
        yield _Pair(
            recipes=(a.recipe, b.recipe),
            apart=apart,
            true=found.truth[worse.run] - found.truth[better.run],
            is_first=better is found.ranked[0],
            is_sure=apart > ranking.SIGMAS * math.hypot(errors[better.run], errors[worse.run]),
        )


def _limits(pairs: Sequence[_Pair]) -> tuple[float, float, float]:
    """LOW, HIGH and CLOSE."""
    sure, tail = [pair for pair in pairs if pair.is_sure], (1 - LEVEL) / 2
    close = _quantile([abs(pair.true) for pair in pairs if not pair.is_sure], LEVEL)
    low = _quantile([pair.true / pair.apart for pair in sure], tail)
    high = _quantile([(pair.true - close) / pair.apart for pair in sure], 1 - tail)
    return low, high, close


def _quantile(values: Sequence[float], level: float) -> float:
    return float(np.quantile(values, level)) if values else 0.0


def _margin(pairs: Sequence[_Pair]) -> float:
    """The least difference above which so many pairs are in the right order."""
    ordered = sorted(pairs, key=lambda pair: -pair.apart)
    right = np.cumsum([pair.true > -TOO_CLOSE for pair in ordered]) / np.arange(1, len(ordered) + 1)
    enough = np.flatnonzero(right >= LEVEL)
    return ordered[enough[-1]].apart if enough.size else math.inf


def _until(run: Made, last: float) -> Columns:
    kept = run.columns["step"] <= last
    columns: dict[str, Column] = {name: values[kept] for name, values in run.columns.items()}
    return {"nonfinite": np.zeros(int(kept.sum())), **columns, "loss": columns["train_loss"]}


def _truth(losses: Column) -> float:
    return float(losses[np.isfinite(losses)][-EVALUATIONS:].mean())


def _against(found: Comparison, value: Callable[[Columns], float]) -> float:
    return _correlation([(value(columns), found.truth[name]) for name, columns in found.columns.items()])


def _correlation(pairs: Sequence[tuple[float, float]]) -> float:
    return score.spearman(*np.array(pairs).T) if len(pairs) >= FEWEST else math.nan


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "–"


def _share(held: Sequence[bool]) -> str:
    return f"{sum(held)} of {len(held)} ({np.mean(held):.0%})" if held else "–"
