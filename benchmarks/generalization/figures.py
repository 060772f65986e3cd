"""The figures of docs/benchmark.md, drawn from the stored runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.generalization import score, signals, tables, verdicts
from benchmarks.generalization.score import Context, Detected
from benchmarks.generalization.store import Made
from benchmarks.generalization.truth import outcome, phases
from logalign.report.figures import COLORS, house_style

FOLDER = Path(__file__).parents[2] / "docs" / "images"
VERDICT_COLORS = {"on time": "#009E73", "early": "#E69F00", "late": "#0072B2"}
SHOWN_RIVALS = 8
TITLES = {"language": "language", "finetuning": "fine-tuning", "vision": "vision"}


def draw(runs: Sequence[Made], folder: Path = FOLDER) -> list[Path]:
    """Draw and write all figures; their paths."""
    found = score.contexts(runs)
    figures = {
        "benchmark-leads": leads(found),
        "benchmark-across": across(found),
        "benchmark-dimension": dimension(runs),
        "benchmark-runs": examples(runs),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with house_style():
        for name, figure in figures.items():
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=130, metadata={"Software": None})
            paths.append(path)
    return paths


def leads(found: Sequence[Context]) -> Figure:
    """When alarms come, in epochs before the lowest held-out loss: logalign, and the rivals that find most on time."""
    fit = [c for c in found if tables.is_for_fitting(c.run.config) and c.run.config.family in tables.SCORED]
    test = [c for c in found if not tables.is_for_fitting(c.run.config) and c.run.config.family in tables.SCORED]
    rows = {
        "logalign, no baseline": verdicts.detection(test, with_baseline=False),
        "logalign, with baseline": verdicts.detection(test, with_baseline=True),
    }
    rivals = {name: tables.rival(tuple(fit), tuple(test), name) for name in tables.ALL_SIGNALS}
    best = sorted(rivals, key=lambda name: -sum(each.verdict == "on time" for each in rivals[name]))[:SHOWN_RIVALS]
    rows |= {name: rivals[name] for name in best}
    with house_style():
        figure = Figure(figsize=(8.5, 0.42 * len(rows) + 1.4), layout="constrained")
        ax, beside = figure.subplots(1, 2, sharey=True, width_ratios=[2.4, 1])
        for y, (_, each) in enumerate(rows.items()):
            for kind, color in VERDICT_COLORS.items():
                x = [_squeezed(d.lead) for d in each if d.verdict == kind]
                jitter = y + 0.22 * np.sin(np.arange(len(x)) * 2.4)
                ax.plot(x, jitter, "o", color=color, markersize=4, alpha=0.8, label=kind if y == 0 else None)
            for x, words in enumerate(_counts(each)):
                beside.text(x, y, words, ha="center", va="center")
        for x, words in enumerate(("overfit,\non time", "healthy,\nalarmed")):
            beside.text(x, -0.7, words, ha="center", va="bottom")
        beside.set_xlim(-0.5, 1.5)
        beside.set_axis_off()
        ax.set_yticks(range(len(rows)), list(rows))
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.axvline(0, color="#555555", linewidth=0.8)
        ticks = [-100, -10, -1, 0, 1, 10, 100]
        ax.set_xticks([_squeezed(t) for t in ticks], [str(t) for t in ticks])
        ax.set_xlabel("epochs from the alarm to the lowest held-out loss\n(positive: the alarm came first)")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return figure


def _counts(detected: Sequence[Detected]) -> tuple[str, str]:
    """How many overfit runs are found on time, and how many healthy ones raise an alarm."""
    overfit = [each.verdict == "on time" for each in detected if each.truth == "overfit"]
    healthy = [each.verdict == "false alarm" for each in detected if each.truth == "healthy"]
    return f"{sum(overfit)} of {len(overfit)}", f"{sum(healthy)} of {len(healthy)}"


def across(found: Sequence[Context]) -> Figure:
    """The partial rank correlation with the gap, given training loss and epoch, of selected signals."""
    shown = (
        "LAR",
        "LAR, vocabulary-centered",
        "LAR, centered",
        "LAR, deviation",
        "norm of the head",
        "gradient norm",
        "RankMe of the inputs",
        "stable rank",
        "WeightWatcher alpha, mean",
        "entropy of predictions",
    )
    with house_style():
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.subplots(1, len(tables.SCORED), sharey=True)
        for ax, family in zip(axes, tables.SCORED, strict=True):
            mine = tuple(c for c in found if c.run.config.family == family)
            for y, name in enumerate(shown):
                each = tables.across(mine, name, partial=True)
                if math.isfinite(each.value):
                    color = COLORS["plain"] if name.startswith("LAR") else COLORS["baseline"]
                    ax.plot([each.low, each.high], [y, y], color=color)
                    ax.plot(each.value, y, "o", color=color, markersize=5)
            if not ax.lines:
                ax.annotate("too few runs", (0.5, 0.5), xycoords="axes fraction", ha="center")
            ax.axvline(0, color="#555555", linewidth=0.8)
            ax.set_xlim(-1.05, 1.05)
            ax.set_title(TITLES[family])
        axes[0].set_yticks(range(len(shown)), shown)
        axes[0].set_ylim(len(shown) - 0.5, -0.5)
        figure.supxlabel("rank correlation with the gap at the end, given training loss and epoch", fontsize="medium")
    return figure


def dimension(runs: Sequence[Made]) -> Figure:
    """Centered and plain k against the counted dimension."""
    mine = [r for r in runs if r.facts.get("dimension") and phases(r).solved is not None]
    with house_style():
        figure = Figure(figsize=(7.5, 3.4), layout="constrained")
        axes = figure.subplots(1, 2, sharex=True, sharey=True)
        for ax, (form, words) in zip(axes, (("lar_centered", "centered"), ("lar", "plain")), strict=True):
            for model, marker, color, label in (
                ("mlp", "o", COLORS["plain"], "MLP"),
                ("transformer", "^", COLORS["centered"], "transformer"),
            ):
                part = [run for run in mine if run.config.settings["model"] == model]
                x = [run.facts["dimension_additive"] for run in part]
                k = [tables.k_of(run, form) for run in part]
                ax.plot(x, k, marker, color=color, markersize=5, label=label, alpha=0.6)
            top = max([run.facts["dimension_additive"] for run in mine], default=10) + 4
            ax.plot([0, top], [0, top], color="#999999", linewidth=0.8)
            ax.set_title(f"k, {words}")
            ax.set_xlabel("directions counted (additive)")
        axes[0].set_ylabel("k")
        axes[0].legend()
    return figure


def examples(runs: Sequence[Made]) -> Figure:
    """LAR and held-out loss of all runs but the algorithmic ones, overfit and healthy."""
    with house_style():
        figure = Figure(figsize=(7.5, 5.4), layout="constrained")
        axes = figure.subplots(2, len(tables.SCORED))
        for column, family in enumerate(tables.SCORED):
            for run in runs:
                if run.config.family != family or outcome(run) == "between":
                    continue
                color = COLORS["centered"] if outcome(run) == "overfit" else COLORS["plain"]
                for ax, name in ((axes[0, column], "lar"), (axes[1, column], "val_loss")):
                    values = signals.trailing_mean(run.columns[name])
                    ax.plot(run.columns["step"], values, color=color, linewidth=0.7, alpha=0.6)
            axes[0, column].set_title(TITLES[family])
            axes[1, column].set_xlabel("step")
        axes[0, 0].set_ylabel("LAR, plain")
        axes[1, 0].set_ylabel("held-out loss (nats)\nnever used by a signal")
        axes[0, 0].plot([], [], color=COLORS["centered"], label="overfit in the end")
        axes[0, 0].plot([], [], color=COLORS["plain"], label="healthy")
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def _squeezed(epochs: float) -> float:
    """A symmetric logarithmic scale, linear within one epoch."""
    return math.copysign(math.log10(1 + abs(epochs) * 9), epochs)
