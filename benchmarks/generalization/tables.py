"""The tables of docs/benchmark.md, rebuilt from the stored runs without any training.

Each table stands between two markers in the page, `<!-- begin: NAME -->` and `<!-- end: NAME -->`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np

from benchmarks.generalization import comparing, configs, fit, score, signals, verdicts
from benchmarks.generalization.configs import FAMILIES
from benchmarks.generalization.score import Context, Detected, Interval, Signal
from benchmarks.generalization.store import Made
from benchmarks.generalization.truth import outcome, phases

PAGE = Path(__file__).parents[2] / "docs" / "benchmark.md"
SCORED = ("language", "finetuning", "vision")
is_for_fitting = cache(configs.is_for_fitting)
# Each is taken once of a run, for all tables and figures.
ALL_SIGNALS: dict[str, Signal] = {
    name: cache(signal) for name, signal in {**signals.WITHOUT_BASELINE, **signals.WITH_BASELINE}.items()
}

Row = dict[str, str]
Tables = dict[str, list[Row]]


def build(runs: Sequence[Made]) -> Tables:
    """Every table of the page."""
    found = score.contexts(runs)
    fitting = [context for context in found if is_for_fitting(context.run.config)]
    testing = [context for context in found if not is_for_fitting(context.run.config)]
    return {
        "runs": runs_table(runs),
        "within": within_table(found),
        "across": across_table(found),
        "detection": detection_table(fitting, testing),
        "detection-families": families_table(found),
        "detection-left-out": left_out_table(found),
        "ranking": ranking_table(found),
        "compare": comparing.table(
            [context.run for context in testing if context.run.config.family in SCORED], group_of
        ),
        "dimension": dimension_table(runs),
        "phases": phases_table(found),
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
            row |= {"overfit": "", "between": "", "healthy": "", "healthy, data seen twice or more": ""}
            row |= {"generalize": str(solved), "never do": str(len(mine) - solved)}
        else:
            row |= {name: str(outcomes.count(name)) for name in ("overfit", "between", "healthy")}
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


def detection_table(fitting: Sequence[Context], testing: Sequence[Context]) -> list[Row]:
    """(c) Thresholds fitted on one half, scored on the other: every signal alone, and logalign's verdicts."""
    fit_on = [context for context in fitting if context.run.config.family in SCORED]
    test = [context for context in testing if context.run.config.family in SCORED]
    rows = [
        _detection_row("**logalign, no baseline**", verdicts.detection(test, with_baseline=False)),
        _detection_row("**logalign, with baseline**", verdicts.detection(test, with_baseline=True)),
    ]
    for name, yardstick in signals.YARDSTICKS.items():
        threshold = score.fit_threshold(fit_on, yardstick)
        rows.append(_detection_row(f"*{name}*", score.detection(test, yardstick, threshold)))
    rows += [_detection_row(name, rival(tuple(fit_on), tuple(test), name)) for name in ALL_SIGNALS]
    return rows


@cache
def rival(fitting: tuple[Context, ...], testing: tuple[Context, ...], name: str) -> list[Detected]:
    """(c) What one signal, with the threshold fitted on some runs, says of others."""
    signal = ALL_SIGNALS[name]
    return score.detection(testing, signal, score.fit_threshold(fitting, signal))


def left_out_table(found: Sequence[Context]) -> list[Row]:
    """(c) logalign's rule and every signal alone, thresholds fitted on the other families, by `_left_out_cells`."""
    mine = {family: tuple(c for c in found if c.run.config.family == family) for family in SCORED}
    others = {family: tuple(c for other in SCORED if other != family for c in mine[other]) for family in SCORED}
    fitted = {family: fit.fit([c for c in others[family] if is_for_fitting(c.run.config)]) for family in SCORED}
    rows = []
    for words, with_baseline in (("**logalign, no baseline**", False), ("**logalign, with baseline**", True)):
        row = {"signal": words}
        for family in SCORED:
            row |= _left_out_cells(family, fit.detection(mine[family], fitted[family], with_baseline=with_baseline))
        rows.append(row)
    for name in ALL_SIGNALS:
        row = {"signal": name}
        for family in SCORED:
            row |= _left_out_cells(family, rival(others[family], mine[family], name))
        rows.append(row)
    return rows


def _left_out_cells(family: str, said: Sequence[Detected]) -> Row:
    """On time, found at all, overfit; false alarms."""
    overfit = [each.verdict for each in said if each.truth == "overfit"]
    healthy = [each.verdict for each in said if each.truth == "healthy"]
    at_all = len(overfit) - overfit.count("missed")
    return {
        f"{family}: on time, found, of": f"{overfit.count('on time')}, {at_all}, {len(overfit)}",
        f"{family}: false alarms": f"{healthy.count('false alarm')} of {len(healthy)}",
    }


def families_table(found: Sequence[Context]) -> list[Row]:
    """(c) logalign's verdicts by family, all runs."""
    rows = []
    for family in SCORED:
        mine = [context for context in found if context.run.config.family == family]
        for words, with_baseline in (("no baseline", False), ("with baseline", True)):
            for half, chosen in (("fitted on", True), ("other half", False)):
                part = [context for context in mine if is_for_fitting(context.run.config) is chosen]
                detected = verdicts.detection(part, with_baseline=with_baseline)
                rows.append({"family": family, "half": half, **_detection_row(words, detected)})
    return rows


def _detection_row(name: str, found: Sequence[Detected]) -> Row:
    parts = score.shares(found)
    leads = [each.lead for each in found if each.truth == "overfit" and math.isfinite(each.lead)]
    row = {"detector": name}
    row |= {words: count(parts[words]) for words in ("on time", "early", "late", "missed", "false alarm")}
    row["median lead, epochs"] = f"{np.median(leads):+.1f}" if leads else "–"
    return row


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


def count(found: Interval) -> str:
    """A share as a count, with Wilson's interval."""
    if found.count == 0:
        return "–"
    return f"{round(found.value * found.count)} of {found.count} ({found.low:.0%} to {found.high:.0%})"


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
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        found = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not found.search(text):
            raise SystemExit(f"{page}: expected the markers {begin} and {end}, found none")
        replacement = "\n".join([begin, "", *markdown(rows), "", end])
        text = found.sub(partial(_constant, replacement), text)
    page.write_text(text)


def markdown(rows: Sequence[Row]) -> list[str]:
    """A table's lines."""
    header = list(rows[0])
    align = ["---" if i == 0 else "---:" for i in range(len(header))]
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join(align) + " |"]
    return lines + ["| " + " | ".join(row[name] for name in header) + " |" for row in rows]


def _constant(text: str, _: re.Match[str]) -> str:
    return text
