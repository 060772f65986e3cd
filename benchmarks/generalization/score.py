"""Scores of signals and detectors against the truth; pure functions over runs that were made.

(a) `within_runs`, (b) `across_runs`, (c) `fit_threshold` and `detection`, (d) `ranking`. Intervals are 95 %: Wilson's
for shares, percentiles of a bootstrap over configurations for correlations.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
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

    def score(rows: np.ndarray) -> float:
        columns = [table.signal[rows], table.gap[rows], table.loss[rows], table.epoch[rows]]
        if within_recipe:
            columns = [_without_group_mean(column, table.group[rows]) for column in columns]
        if not partial:
            return spearman(columns[0], columns[1])
        return partial_spearman(columns[0], columns[1], columns[2:])

    known = np.flatnonzero(np.isfinite(table.signal) & np.isfinite(table.gap))
    if known.size < 8:
        return Interval(math.nan, math.nan, math.nan, int(known.size))
    low, high = bootstrap(known, table.configuration, score)
    return Interval(score(known), low, high, int(known.size))


def bootstrap(
    rows: np.ndarray, clusters: np.ndarray, score: Callable[[np.ndarray], float], *, repeats: int = BOOTSTRAPS
) -> tuple[float, float]:
    """The 95 % interval of a score when whole configurations are drawn with replacement."""
    generator = np.random.default_rng(0)
    by_cluster = [rows[clusters[rows] == name] for name in np.unique(clusters[rows])]
    scores = []
    for _ in range(repeats):
        drawn = generator.integers(0, len(by_cluster), len(by_cluster))
        scores.append(score(np.concatenate([by_cluster[i] for i in drawn])))
    low, high = np.nanpercentile(scores, [2.5, 97.5])
    return float(low), float(high)


def alarm(values: Series, threshold: float) -> int | None:
    """The first reading at which the last three lie above the threshold."""
    above = np.nan_to_num(values, nan=-np.inf) > threshold
    above[:WARM_UP_READINGS] = False
    for i in range(IN_A_ROW - 1, len(above)):
        if above[i - IN_A_ROW + 1 : i + 1].all():
            return i
    return None


@dataclass(frozen=True)
class Detected:
    """What a detector said of one run: when it raised its alarm, and how that stands to the truth.

    Attributes:
        run: Name.
        truth: "overfit", "healthy" or "between".
        verdict: "on time", "early", "late" or "missed" of an overfit run; "quiet" or "false alarm" of another.
        lead: Epochs from the alarm to the minimum of the held-out loss; negative: after it.
    """

    run: str
    truth: str
    verdict: str
    lead: float


def judge(run: Made, reading: int | None) -> Detected:
    """(c) Hold an alarm against the truth.

    On time is from one epoch before the lowest held-out loss to half an epoch after it, or five readings where those
    are fewer steps.
    """
    true = outcome(run)
    if true != "overfit":
        return Detected(run.name, true, "quiet" if reading is None else "false alarm", math.nan)
    if reading is None:
        return Detected(run.name, true, "missed", math.nan)
    steps, epochs = run.columns["step"], run.columns["epoch"]
    lowest = float(np.interp(run.truth["val_min_step"], steps, epochs))
    a_reading = float(np.median(np.diff(epochs)))
    lead = lowest - epochs[reading]
    if lead > max(EARLY_EPOCHS, TOLERATED_READINGS * a_reading):
        return Detected(run.name, true, "early", float(lead))
    late = lead < -max(LATE_EPOCHS, TOLERATED_READINGS * a_reading)
    return Detected(run.name, true, "late" if late else "on time", float(lead))


def fit_threshold(found: Sequence[Context], signal: Signal, *, candidates: int = 200) -> float:
    """The threshold with no alarm on a healthy run of those given that finds most overfit runs on time, then at all.

    NaN where the signal is undefined on all runs.
    """
    series = [(context.run, signal(context)) for context in found]
    levels = [_sustained(values) for _, values in series]
    highest = [level for (run, _), level in zip(series, levels, strict=True) if outcome(run) == "healthy"]
    finite = np.concatenate([values[np.isfinite(values)] for _, values in series])
    if finite.size == 0:
        return math.nan
    quiet = max([level for level in highest if math.isfinite(level)], default=float(finite.min()))
    above = finite[finite >= quiet]
    choices = np.unique(np.concatenate([[quiet], np.quantile(above, np.linspace(0, 1, candidates))]))

    def worth(threshold: float) -> tuple[int, int]:
        verdicts = [judge(run, alarm(values, threshold)).verdict for run, values in series if outcome(run) == "overfit"]
        on_time = verdicts.count("on time")
        return on_time, on_time + verdicts.count("late") - verdicts.count("early")

    return float(max(choices, key=worth))


def detection(found: Sequence[Context], signal: Signal, threshold: float) -> list[Detected]:
    """What the rule `signal > threshold` says of every run."""
    return [judge(context.run, alarm(signal(context), threshold)) for context in found]


def ranking(found: Sequence[Context], signal: Signal, group: Callable[[Made], str]) -> dict[str, float]:
    """(d) Spearman of the signal at the end with the final held-out loss, within groups of comparable runs."""
    by_group: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for context in found:
        value = signal(context)[-1]
        by_group[group(context.run)].append((value, context.run.truth["val_final"]))
    return {name: spearman(*np.array(pairs).T) for name, pairs in by_group.items() if len(pairs) >= 5}


def wilson(count: int, of: int) -> Interval:
    """A share with Wilson's 95 % interval."""
    if of == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    interval = stats.binomtest(count, of).proportion_ci(method="wilson")
    return Interval(count / of, interval.low, interval.high, of)


def spearman(x: Series, y: Series) -> float:
    """Spearman's rank correlation where both are defined; NaN where it is undefined."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(stats.spearmanr(x, y).statistic)


def partial_spearman(x: Series, y: Series, given: Sequence[Series]) -> float:
    """Correlation of the ranks of x and y once the ranks of others are taken out of both by least squares."""
    known = np.isfinite(x) & np.isfinite(y) & np.all([np.isfinite(each) for each in given], axis=0)
    if known.sum() < 3 + len(given):
        return math.nan
    others = np.stack([np.ones(known.sum()), *(stats.rankdata(each[known]) for each in given)], axis=1)
    residuals = []
    for values in (x, y):
        ranks = stats.rankdata(values[known])
        residuals.append(ranks - others @ np.linalg.lstsq(others, ranks, rcond=None)[0])
    if min(np.ptp(residual) for residual in residuals) < 1e-9:
        return math.nan
    return float(np.corrcoef(*residuals)[0, 1])


def shares(found: Sequence[Detected]) -> Mapping[str, Interval]:
    """Shares of overfit runs by verdict, and of healthy runs with a false alarm."""
    overfit = [each for each in found if each.truth == "overfit"]
    healthy = [each for each in found if each.truth == "healthy"]
    by_verdict = {
        name: wilson(sum(each.verdict == name for each in overfit), len(overfit))
        for name in ("on time", "early", "late", "missed")
    }
    return {**by_verdict, "false alarm": wilson(sum(e.verdict == "false alarm" for e in healthy), len(healthy))}


def _sustained(values: Series) -> float:
    """The highest threshold that would raise an alarm: the largest minimum of three readings in a row."""
    values = np.where(np.arange(len(values)) < WARM_UP_READINGS, -np.inf, np.nan_to_num(values, nan=-np.inf))
    if len(values) < IN_A_ROW:
        return -math.inf
    windows = np.lib.stride_tricks.sliding_window_view(values, IN_A_ROW)
    return float(windows.min(axis=1).max())


def _without_group_mean(values: Series, group: np.ndarray) -> Series:
    found = values.copy()
    for name in np.unique(group):
        rows = group == name
        found[rows] -= np.nanmean(values[rows]) if np.isfinite(values[rows]).any() else 0.0
    return found
