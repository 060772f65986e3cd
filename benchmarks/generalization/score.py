"""Scores of signals and detectors against the truth; pure functions over runs that were made.

(a) `within_runs`, (b) `across_runs`, (c) `fit_threshold` and `detection`, (d) `ranking`. Intervals are 95 %: Wilson's
for shares, percentiles of a bootstrap over configurations for correlations.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from benchmarks.generalization.signals import WARM_UP_READINGS, Context, Series, gap
from benchmarks.generalization.store import Made
from benchmarks.generalization.truth import outcome

IN_A_ROW = 3  # readings beyond the threshold that make an alarm
EARLY_EPOCHS, LATE_EPOCHS = 1.0, 0.5
TOLERATED_READINGS = 5  # the same in readings, where an epoch has fewer
SHARES = (0.25, 0.5, 0.75, 1.0)
BOOTSTRAPS = 1000
FEWEST_RUNS = 8  # that a correlation across runs is taken over

Signal = Callable[[Context], Series]


@dataclass(frozen=True)
class Interval:
    """A score with its 95 % interval, and how many runs it rests on."""

    value: float
    low: float
    high: float
    count: int


def contexts(runs: Sequence[Made]) -> list[Context]:
    """Each run with its baselines: those of its recipe, other than itself, that did not overfit."""
    by_recipe: dict[str, list[Made]] = defaultdict(list)
    for run in runs:
        if run.config.baseline and outcome(run) != "overfit":
            by_recipe[run.config.recipe].append(run)
    return [
        Context(run, tuple(other for other in by_recipe[run.config.recipe] if other.config.seed != run.config.seed))
        for run in runs
    ]


def within_runs(found: Iterable[Context], signal: Signal) -> list[float]:
    """(a) Spearman of the signal with the gap within each run, after the first readings."""
    scores = []
    for context in found:
        values, true = signal(context)[WARM_UP_READINGS:], gap(context.run)[WARM_UP_READINGS:]
        score = spearman(values, true)
        if math.isfinite(score):
            scores.append(score)
    return scores


@dataclass(frozen=True)
class Table:
    """One row a run, at one moment of training."""

    signal: Series
    gap: Series
    loss: Series
    epoch: Series
    group: np.ndarray
    configuration: np.ndarray


def at_share(found: Sequence[Context], signal: Signal, share: float) -> Table:
    """The signal, the gap, the training loss and the epoch of every run at the same share of its steps.

    Runs of one family and one model have the same number of steps.
    """
    rows = []
    for context in found:
        true = gap(context.run)
        known = np.flatnonzero(np.isfinite(true))
        i = known[min(len(known) - 1, round(share * (len(known) - 1)))]
        loss = context.smooth("train_loss")[i]
        rows.append((signal(context)[i], true[i], loss, context.column("epoch")[i]))
    columns = np.array(rows, dtype=float).reshape(-1, 4).T
    groups = np.array([context.run.config.recipe for context in found])
    return Table(*columns, groups, np.array([context.run.config.configuration for context in found]))


def across_runs(table: Table, *, partial: bool, within_recipe: bool) -> Interval:
    """(b) Spearman of signal and gap across runs; partial: given the training loss and the epoch.

    `within_recipe` takes the mean of every recipe from signal and gap first: only runs that share data, model and
    schedule are then compared. Partial correlations are of ranks, by least squares.
    """

    columns = [table.signal, table.gap, *((table.loss, table.epoch) if partial else ())]
    values = np.append(np.stack(columns), np.full((len(columns), 1), np.nan), axis=1)  # row -1 is no run
    group = np.append(np.unique(table.group, return_inverse=True)[1], 0)

    def score(rows: np.ndarray) -> np.ndarray:
        drawn = np.moveaxis(values[:, rows], 0, -2)
        return _rank_correlation(_without_group_means(drawn, group[rows]) if within_recipe else drawn)

    known = np.flatnonzero(np.isfinite(table.signal) & np.isfinite(table.gap))
    if known.size < FEWEST_RUNS:
        return Interval(math.nan, math.nan, math.nan, int(known.size))
    low, high = bootstrap(known, table.configuration, score)
    return Interval(float(score(known)), low, high, int(known.size))


def bootstrap(
    rows: np.ndarray, clusters: np.ndarray, score: Callable[[np.ndarray], np.ndarray], *, repeats: int = BOOTSTRAPS
) -> tuple[float, float]:
    """The 95 % interval of a score when whole configurations are drawn with replacement.

    `score` takes rows [repeats, L], in which -1 is none, and gives a score for each repeat.
    """
    members = [rows[clusters[rows] == name] for name in np.unique(clusters[rows])]
    size = max(len(each) for each in members)
    padded = np.array([np.pad(each, (0, size - len(each)), constant_values=-1) for each in members])
    drawn = np.random.default_rng(0).integers(0, len(members), (repeats, len(members)))
    scores = score(padded[drawn].reshape(repeats, -1))
    scores = scores[np.isfinite(scores)]
    if not scores.size:
        return math.nan, math.nan
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


def alarm(values: Series, threshold: float) -> int | None:
    """The first reading at which the last three lie above the threshold."""
    found = int(first_above(sustained(values), threshold))
    return found if found < len(values) else None


def ranking(found: Sequence[Context], signal: Signal, group: Callable[[Made], str]) -> dict[str, float]:
    """(d) Spearman of the signal at the end with the final held-out loss, within groups of comparable runs."""
    by_group: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for context in found:
        value = signal(context)[-1]
        by_group[group(context.run)].append((value, context.run.truth["val_final"]))
    return {name: spearman(*np.array(pairs).T) for name, pairs in by_group.items() if len(pairs) >= 5}


def spearman(x: Series, y: Series) -> float:
    """Spearman's rank correlation where both are defined; NaN where it is undefined."""
    return partial_spearman(x, y, ())


def partial_spearman(x: Series, y: Series, given: Sequence[Series]) -> float:
    """Correlation of the ranks of x and y once the ranks of others are taken out of both by least squares."""
    return float(_rank_correlation(np.stack([x, y, *given])))


def _rank_correlation(columns: np.ndarray) -> np.ndarray:
    """Partial rank correlation [...] of columns [..., C, L]: of the first two, given the others, where all are defined.

    NaN where fewer than C + 1 rows are, or where nothing but rounding is left of one of the two.
    """
    known = np.isfinite(columns).all(axis=-2, keepdims=True)
    count = known.sum(axis=-1, keepdims=True)
    ranks = stats.rankdata(np.where(known, columns, np.inf), axis=-1)  # the undefined rank last, and do not count
    means = np.where(known, ranks, 0).sum(axis=-1, keepdims=True) / np.maximum(count, 1)
    ranks = np.where(known, ranks - means, 0)
    pair, given = ranks[..., :2, :], ranks[..., 2:, :]
    products = np.linalg.pinv(given @ _turned(given), rcond=1e-12, hermitian=True) @ (given @ _turned(pair))
    left = pair - _turned(products) @ given
    x, y = left[..., 0, :], left[..., 1, :]
    defined = (count[..., 0, 0] > columns.shape[-2]) & (np.abs(left).max(axis=-1) > 1e-6).all(axis=-1)
    spread = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    return np.where(defined, (x * y).sum(axis=-1) / np.where(defined, spread, 1), np.nan)


def sustained(values: Series) -> Series:
    """At each reading, the threshold under which an alarm has been raised by then.

    It is the largest minimum so far of three readings in a row, after the first readings.
    """
    values = np.where(np.arange(len(values)) < WARM_UP_READINGS, -np.inf, np.nan_to_num(values, nan=-np.inf))
    padded = np.concatenate([np.full(IN_A_ROW - 1, -np.inf), values])
    lowest = np.lib.stride_tricks.sliding_window_view(padded, IN_A_ROW).min(axis=1)
    found: Series = np.maximum.accumulate(lowest)
    return found


def first_above(sustained: Series, thresholds: float | Series) -> np.ndarray:
    """The first reading above each threshold; one past the last where there is none."""
    return np.searchsorted(sustained, thresholds, side="right")


def _without_group_means(columns: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Columns [..., C, L] less the mean of the defined values of their group, given as whole numbers [..., L]."""
    known = np.isfinite(columns)
    belongs = np.eye(group.max() + 1)[group]  # [..., L, groups]
    sums, counts = np.where(known, columns, 0) @ belongs, known @ belongs
    return columns - (sums / np.maximum(counts, 1)) @ _turned(belongs)


def _turned(matrices: np.ndarray) -> np.ndarray:
    return np.swapaxes(matrices, -1, -2)
