"""Scores of signals and detectors against the truth; pure functions over runs that were made.

(a) `within_runs`, (b) `across_runs`, (c) `fit_threshold` and `detection`, (d) `ranking`. Intervals are 95 %: Wilson's
for shares, percentiles of a bootstrap over configurations for correlations.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

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
    found = int(_first_above(_sustained(values), threshold))
    return found if found < len(values) else None


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
    finite = np.concatenate([values[np.isfinite(values)] for _, values in series])
    if finite.size == 0:
        return math.nan
    highest = [_sustained(values)[-1] for run, values in series if outcome(run) == "healthy"]
    quiet = max([level for level in highest if math.isfinite(level)], default=float(finite.min()))
    above = finite[finite >= quiet]
    choices = np.unique(np.concatenate([[quiet], np.quantile(above, np.linspace(0, 1, candidates))]))
    on_time, late, early = (np.zeros(len(choices), dtype=int) for _ in range(3))
    for run, values in series:
        if outcome(run) == "overfit":
            verdicts = _verdict_by_reading(run)[_first_above(_sustained(values), choices)]
            on_time += verdicts == "on time"
            late += verdicts == "late"
            early += verdicts == "early"
    worth = list(zip(on_time, on_time + late - early, strict=True))
    return float(choices[max(range(len(choices)), key=worth.__getitem__)])


@cache
def _verdict_by_reading(run: Made) -> np.ndarray:
    """The verdict on an alarm at each reading, and last the one on none."""
    readings = [*range(len(run.columns["step"])), None]
    return np.array([judge(run, reading).verdict for reading in readings])


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


def shares(found: Sequence[Detected]) -> Mapping[str, Interval]:
    """Shares of overfit runs by verdict, and of healthy runs with a false alarm."""
    overfit = [each for each in found if each.truth == "overfit"]
    healthy = [each for each in found if each.truth == "healthy"]
    by_verdict = {
        name: wilson(sum(each.verdict == name for each in overfit), len(overfit))
        for name in ("on time", "early", "late", "missed")
    }
    return {**by_verdict, "false alarm": wilson(sum(e.verdict == "false alarm" for e in healthy), len(healthy))}


def _sustained(values: Series) -> Series:
    """At each reading, the threshold under which an alarm has been raised by then.

    It is the largest minimum so far of three readings in a row, after the first readings.
    """
    values = np.where(np.arange(len(values)) < WARM_UP_READINGS, -np.inf, np.nan_to_num(values, nan=-np.inf))
    padded = np.concatenate([np.full(IN_A_ROW - 1, -np.inf), values])
    lowest = np.lib.stride_tricks.sliding_window_view(padded, IN_A_ROW).min(axis=1)
    found: Series = np.maximum.accumulate(lowest)
    return found


def _first_above(sustained: Series, thresholds: float | Series) -> np.ndarray:
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
