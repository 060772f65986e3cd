"""The tables of docs/benchmark.md and docs/benchmark-signals.md, rebuilt from the stored runs without any training.

Each table stands between two markers in the page, `<!-- begin: NAME -->` and `<!-- end: NAME -->`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.generalization import comparing, configs, regret, score, signals, verdicts
from benchmarks.generalization.configs import FAMILIES
from benchmarks.generalization.loss_only import outcomes_without_lar
from benchmarks.generalization.regret import Cost
from benchmarks.generalization.score import Context, Interval, Signal
from benchmarks.generalization.store import Made
from benchmarks.generalization.truth import outcome, phases
from benchmarks.pages import markdown, replaced
from logalign.diagnosis.overfit_rule import NEAR, TOLD

PAGE = Path(__file__).parents[2] / "docs" / "benchmark.md"
SCORED = ("language", "finetuning", "vision")
"""Families of the first two batches, in which signals are studied."""
LAST_BATCH = 3
BEST = 3
REGRET_GROUPS = {
    "language": ("language",),
    "fine-tuning": ("finetuning",),
    "vision": ("vision",),
    "tables, texts, other losses": ("tables and texts", "other losses"),
}
is_for_fitting = cache(configs.is_for_fitting)
# Each is taken once of a run, for all tables and figures.
ALL_SIGNALS: dict[str, Signal] = {
    name: cache(signal) for name, signal in {**signals.WITHOUT_BASELINE, **signals.WITH_BASELINE}.items()
}

Row = dict[str, str]
Tables = dict[str, list[Row]]


def build(runs: Sequence[Made]) -> dict[str, Tables]:
    """Every table, by the name of its page."""
    found = score.contexts(runs)
    testing = [context for context in found if not is_for_fitting(context.run.config)]
    fitting = [context for context in found if is_for_fitting(context.run.config)]
    studied = [context for context in found if context.run.config.batch < LAST_BATCH]
    compared = [context.run for context in testing if context.run.config.family in SCORED]
    return {
        "benchmark.md": {
            "runs": runs_table(runs),
            "regret": regret_table(fitting, testing),
            "held-out": held_out_table(testing),
            "instruments": instruments_table(fitting),
            "alarms": alarms_table(testing),
            "steady": steady_table(found),
            "compare": comparing.table(compared, group_of),
            "phases": phases_table(found),
        },
        "benchmark-signals.md": {
            "within": within_table(studied),
            "across": across_table(studied),
            "rivals": rivals_table(fitting, testing),
            "ranking": ranking_table(studied),
            "dimension": dimension_table(runs),
        },
    }


def runs_table(runs: Sequence[Made]) -> list[Row]:
    """How many runs there are, and what is true of them."""
    rows = []
    for family in FAMILIES:
        mine = [run for run in runs if run.config.family == family]
        outcomes = [outcome(run) for run in mine]
        repeats = sum(
            truth == "healthy" and run.columns["epoch"][-1] >= 2 for run, truth in zip(mine, outcomes, strict=True)
        )
        row = {"family": family, "runs": str(len(mine))}
        if family == "algorithmic":
            solved = sum(phases(run).solved is not None for run in mine)
            row |= dict.fromkeys(("overfit", "between", "healthy", "diverged", "healthy, data seen twice or more"), "")
            row |= {"generalize": str(solved), "never do": str(len(mine) - solved)}
        else:
            row |= {name: str(outcomes.count(name)) for name in ("overfit", "between", "healthy", "diverged")}
            row |= {"healthy, data seen twice or more": str(repeats), "generalize": "", "never do": ""}
        rows.append(row)
    return rows


def within_table(found: Sequence[Context]) -> list[Row]:
    """(a) Medians of Spearman with the gap within a run, over the runs that overfit."""
    rows = []
    for name, signal in ALL_SIGNALS.items():
        row = {"signal": name}
        for family in SCORED:
            mine = [c for c in found if c.run.config.family == family and outcome(c.run) == "overfit"]
            scores = score.within_runs(mine, signal)
            row[family] = f"{np.median(scores):.2f}" if scores else "–"
        rows.append(row)
    return rows


def across_table(found: Sequence[Context]) -> list[Row]:
    """(b) Spearman with the gap across runs of one recipe at the end, and given training loss and epoch."""
    rows = []
    for name in ALL_SIGNALS:
        row = {"signal": name}
        for family in SCORED:
            mine = tuple(c for c in found if c.run.config.family == family)
            row[family] = interval(across(mine, name, partial=False))
            row[f"{family}, given loss and epoch"] = interval(across(mine, name, partial=True))
        rows.append(row)
    return rows


@cache
def across(found: tuple[Context, ...], name: str, *, partial: bool) -> Interval:
    """(b) of one signal at the end of the runs, within recipes."""
    return score.across_runs(score.at_share(found, ALL_SIGNALS[name], 1.0), partial=partial, within_recipe=True)


def regret_table(fitting: Sequence[Context], testing: Sequence[Context]) -> list[Row]:
    """What it costs to follow logalign, the best rivals, and what people do instead; scored half."""
    test = [context for context in testing if judged(context.run)]
    runs = [context.run for context in test]
    rows = [
        regret_row("**logalign, first *approaching***", runs, said(test)),
        regret_row("logalign, first *overfitting*", runs, said(test, ("overfitting",))),
        regret_row("logalign, loss and epoch alone", runs, [without_lar(run) for run in runs]),
    ]
    fit_on = tuple(context for context in fitting if judged(context.run))
    best = best_rivals(fit_on)[:BEST]
    rows += [regret_row(name, runs, rival(fit_on, tuple(test), name)) for name in best]
    rows.append(regret_row("train to the end", runs, [regret.cost(run, None) for run in runs]))
    for passes in regret.PASSES:
        costs = [regret.cost(run, regret.after_passes(run, passes)) for run in runs]
        rows.append(regret_row(f"stop after {passes} pass{'es' if passes > 1 else ''}", runs, costs))
    return rows


def held_out_table(testing: Sequence[Context]) -> list[Row]:
    """The same against early stopping on samples kept apart, where some were; scored half."""
    test = [c for c in testing if judged(c.run) and all(name in c.run.columns for name in regret.KEPT_APART.values())]
    runs = [context.run for context in test]
    rows = [regret_row("**logalign, first *approaching***", runs, said(test))]
    for words, column in regret.KEPT_APART.items():
        costs = [regret.cost(run, regret.by_holding_out(run, column)) for run in runs]
        rows.append(regret_row(f"{words}, patience {regret.PATIENCE}", runs, costs))
    return [*rows, regret_row("train to the end", runs, [regret.cost(run, None) for run in runs])]


def instruments_table(fitting: Sequence[Context]) -> list[Row]:
    """What each kind of evidence adds: the first *approaching* without it; fitting half."""
    found = [context for context in fitting if judged(context.run)]
    runs = [context.run for context in found]
    rows = [regret_row("all", runs, said(found))]
    for words, variant in verdicts.VARIANTS.items():
        costs = [regret.cost(run, verdicts.first_of(verdicts.varied(run, variant))) for run in runs]
        rows.append(regret_row(words, runs, costs))
    return rows


def alarms_table(testing: Sequence[Context]) -> list[Row]:
    """First alarms by the evidence that they rest on, and how many kept a checkpoint near the lowest; scored half."""
    told: dict[str, list[bool]] = {kind: [] for kind in TOLD}
    for context in testing:
        heard = verdicts.said(context, with_baseline=False)
        first = verdicts.first_of(heard.outcomes)
        if judged(context.run) and first is not None:
            near = regret.cost(context.run, first).regret <= NEAR
            told[heard.rests_on[first]].append(near)
    return [
        {"first alarm rests on": kind, "alarms": str(len(each)), f"within {NEAR:g} nats of the lowest": str(sum(each))}
        for kind, each in told.items()
    ]


def steady_table(found: Sequence[Context]) -> list[Row]:
    """How often a verdict goes back from an alarm."""
    rows = []
    for family in FAMILIES:
        mine = [context for context in found if context.run.config.family == family]
        backs = [verdicts.changes_back(verdicts.outcomes(context, with_baseline=False)) for context in mine]
        row = {"family": family, "runs": str(len(backs))}
        row |= {
            f"{words} change{'s' if n != 1 else ''} back": str(sum(each == n for each in backs))
            for n, words in ((0, "no"), (1, "one"))
        }
        rows.append(row | {"more": str(sum(each > 1 for each in backs))})
    return rows


def rivals_table(fitting: Sequence[Context], testing: Sequence[Context]) -> list[Row]:
    """Every signal alone, its threshold fitted by mean regret on the fitting half; scored half."""
    fit_on = tuple(context for context in fitting if judged(context.run))
    test = tuple(context for context in testing if judged(context.run))
    runs = [context.run for context in test]
    yardsticks = [
        regret_row(f"*{name}*", runs, regret.by_signal(test, each, regret.fit_threshold(fit_on, each)))
        for name, each in signals.YARDSTICKS.items()
    ]
    return yardsticks + [regret_row(name, runs, rival(fit_on, test, name)) for name in ALL_SIGNALS]


@cache
def threshold_of(fitting: tuple[Context, ...], name: str) -> float:
    """Of one signal, by mean regret."""
    return regret.fit_threshold(fitting, ALL_SIGNALS[name])


def rival(fitting: tuple[Context, ...], testing: tuple[Context, ...], name: str) -> list[Cost]:
    """What one signal, with the threshold fitted on some runs, costs in others."""
    return regret.by_signal(testing, ALL_SIGNALS[name], threshold_of(fitting, name))


def best_rivals(fitting: tuple[Context, ...]) -> list[str]:
    """Signals that need no baseline, by their mean regret on the runs that they were fitted on."""

    def mean(name: str) -> float:
        return float(np.mean([min(each.regret, regret.MOST) for each in rival(fitting, fitting, name)]))

    return sorted(signals.WITHOUT_BASELINE, key=mean)


def judged(run: Made) -> bool:
    """Whether it is scored by regret: no algorithmic run, and none that diverged."""
    return run.config.family != "algorithmic" and outcome(run) != "diverged"


def said(found: Sequence[Context], sought: Sequence[str] = verdicts.ALARMS) -> list[Cost]:
    """What following logalign costs, without a baseline."""
    first = [verdicts.first_of(verdicts.outcomes(context, with_baseline=False), sought) for context in found]
    return [regret.cost(context.run, reading) for context, reading in zip(found, first, strict=True)]


@cache
def without_lar(run: Made) -> Cost:
    """What following logalign costs on a log without LAR."""
    return regret.cost(run, verdicts.first_of(outcomes_without_lar(run)))


def regret_row(name: str, runs: Sequence[Made], costs: Sequence[Cost]) -> Row:
    """Median and 90th percentile of the regret in overfit runs, with the median share of steps saved; healthy runs."""
    row = {"": name}
    for words, families in REGRET_GROUPS.items():
        mine = [
            c for run, c in zip(runs, costs, strict=True) if run.config.family in families and outcome(run) == "overfit"
        ]
        row[f"{words}, {sum(outcome(r) == 'overfit' and r.config.family in families for r in runs)} overfit"] = (
            f"{_quantile(mine, 0.5)}, {_quantile(mine, 0.9)}; {np.median([c.saved for c in mine]):.0%}" if mine else "–"
        )
    healthy = [c for run, c in zip(runs, costs, strict=True) if outcome(run) == "healthy"]
    row["healthy: 95th percentile"] = _quantile(healthy, 0.95)
    row["healthy: alarmed"] = f"{sum(c.alarmed for c in healthy)} of {len(healthy)}"
    return row


def _quantile(costs: Sequence[Cost], share: float) -> str:
    return f"{np.quantile([each.regret for each in costs], share):.3f}" if costs else "–"


GROUPS = {
    "language": ("text", "model", "scale", "smoothing"),
    "finetuning": ("direction", "model"),
    "vision": ("model", "samples", "batch"),
    "tables and texts": ("data", "model"),
    "other losses": ("data", "loss"),
    "algorithmic": ("model", "operation"),
}
"""The settings that runs share whose held-out losses compare, where they have them."""


def group_of(run: Made) -> str:
    """Runs whose held-out losses compare: one text, one direction, one model, one size of data."""
    settings = run.config.settings
    return ", ".join(str(settings[key]) for key in GROUPS[run.config.family] if key in settings)


def ranking_table(found: Sequence[Context]) -> list[Row]:
    """(d) Spearman of each signal at the end with the final held-out loss, within groups of comparable runs."""
    found = [context for context in found if context.run.config.family in SCORED]
    groups = list(dict.fromkeys(group_of(context.run) for context in found))
    orders = comparing.comparisons([context.run for context in found], group_of)
    compared = {order.name: comparing.spearman(order) for order in orders}
    rows = [{"signal": "**`logalign compare`**"} | {group: number(compared.get(group, math.nan)) for group in groups}]
    for name, signal in ALL_SIGNALS.items():
        scores = score.ranking(found, signal, group_of)
        row = {"signal": name} | {group: number(scores.get(group, math.nan)) for group in groups}
        rows.append(row)
    return rows


def dimension_table(runs: Sequence[Made]) -> list[Row]:
    """(e) The predicted against the independently counted dimension, in runs that generalize."""
    mine = [
        run
        for run in runs
        if run.config.family == "algorithmic" and run.facts.get("dimension") and phases(run).solved is not None
    ]
    rows = []
    for yardstick in ("dimension", "dimension_additive", "dimension_energy"):
        true = np.array([run.facts[yardstick] for run in mine], dtype=float)
        predictors = {
            "k, centered": np.array([k_of(run, "lar_centered") for run in mine]),
            "k, plain": np.array([k_of(run, "lar") for run in mine]),
            "p, best multiple": _best_multiple([run.config.settings["p"] for run in mine], true),
            "width, best multiple": _best_multiple([run.config.settings["width"] for run in mine], true),
        }
        for name, predicted in predictors.items():
            residual = float(((true - predicted) ** 2).sum())
            rows.append(
                {
                    "counted by": yardstick.removeprefix("dimension_") if "_" in yardstick else "removal",
                    "predictor": name,
                    "runs": str(len(mine)),
                    "R²": number(1 - residual / float(((true - true.mean()) ** 2).sum())),
                    "R² of a fitted line": number(float(np.corrcoef(true, predicted)[0, 1]) ** 2),
                    "median error": f"{np.median(np.abs(predicted / true - 1)):.1%}",
                }
            )
    return rows


def k_of(run: Made, form: str) -> float:
    """The effective dimension at the end: mean of the last five readings."""
    lar = float(np.nanmean(run.columns[form][-5:]))
    return float(run.columns["n"][-1] ** (2 * (1 - lar)))


def phases_table(found: Sequence[Context]) -> list[Row]:
    """What the verdicts say of the algorithmic runs: that reach 0.9, that get past 0.05 only, and the others."""
    rows = []
    for half, chosen in (("fitted on", True), ("other half", False)):
        mine = [c for c in found if c.run.config.family == "algorithmic" and is_for_fitting(c.run.config) is chosen]
        places: list[float] = []  # of the first "generalizing" between 0.05 (0) and 0.9 (1)
        solved, partly, never = [], [], []
        for context in mine:
            true, said = phases(context.run), verdicts.outcomes(context, with_baseline=False)
            first = verdicts.first_of(said, ("generalizing",))
            at = None if first is None else float(context.run.columns["step"][first])
            if true.begins is None:
                never.append((at, said[-1]))
            elif true.solved is None:
                partly.append(at is not None and at >= true.begins)
            else:
                solved.append(at is not None and at <= true.solved)
                if at is not None:
                    places.append((at - true.begins) / max(10.0, true.solved - true.begins))
        rows.append(
            {
                "half": half,
                "reach accuracy 0.9": str(len(solved)),
                '"generalizing" before': str(sum(solved)),
                "median place between 0.05 (0) and 0.9 (1)": number(float(np.median(places))) if places else "–",
                "end between 0.05 and 0.9": str(len(partly)),
                'of these "generalizing"': str(sum(partly)),
                "stay under 0.05": str(len(never)),
                'of these "generalizing", wrongly': str(sum(at is not None for at, _ in never)),
                'of these "memorizing" at the end': str(sum(last == "memorizing" for _, last in never)),
            }
        )
    return rows


def _best_multiple(values: Sequence[float], true: np.ndarray) -> np.ndarray:
    """The multiple of a predictor that fits the other runs best, for each run."""
    x = np.array(values, dtype=float)
    return np.array([v * np.median(np.delete(true / x, i)) for i, v in enumerate(x)])


def interval(found: Interval) -> str:
    """A score with its interval."""
    if not math.isfinite(found.value):
        return "–"
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def number(value: float) -> str:
    """Two digits, a dash where there is none."""
    return f"{value:.2f}" if math.isfinite(value) else "–"


def write(tables: Tables, page: Path = PAGE) -> None:
    """Put the tables between their markers.

    Raises:
        SystemExit: the page lacks a marker.
    """
    text = page.read_text()
    for name, rows in tables.items():
        text = replaced(page, text, name, markdown(rows, numbers=True))
    page.write_text(text)
