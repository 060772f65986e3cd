"""The figures of docs/benchmark.md, drawn from the stored runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.generalization import regret, score, signals, tables
from benchmarks.generalization.score import Context
from benchmarks.generalization.store import Made
from benchmarks.generalization.truth import outcome, phases
from logalign.report.figures import COLORS, house_style

FOLDER = Path(__file__).parents[2] / "docs" / "images"
LEAST = 1e-3
"""Nats below which the figure of regrets does not tell."""
TITLES = {"language": "language", "finetuning": "fine-tuning", "vision": "vision"}


def draw(runs: Sequence[Made], folder: Path = FOLDER) -> list[Path]:
    """Draw and write all figures; their paths."""
    found = score.contexts(runs)
    figures = {
        "benchmark-regret": regrets(found),
        "benchmark-across": across([context for context in found if context.run.config.batch < tables.LAST_BATCH]),
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


def regrets(found: Sequence[Context]) -> Figure:
    """The share of overfit runs, scored half, in which following costs less than so many nats."""
    test = [c for c in found if not tables.is_for_fitting(c.run.config) and tables.judged(c.run)]
    test = [context for context in test if outcome(context.run) == "overfit"]
    with house_style():
        figure = Figure(figsize=(8.5, 3.4), layout="constrained")
        axes = figure.subplots(1, len(tables.REGRET_GROUPS), sharey=True)
        for ax, (words, families) in zip(axes, tables.REGRET_GROUPS.items(), strict=True):
            mine = [context for context in test if context.run.config.family in families]
            runs = [context.run for context in mine]
            lines = {"logalign, first approaching": (tables.said(mine), COLORS["plain"], "-")}
            lines |= {"loss and epoch alone": ([tables.without_lar(run) for run in runs], COLORS["centered"], "--")}
            for passes, style in ((3, ":"),):
                costs = [regret.cost(run, regret.after_passes(run, passes)) for run in runs]
                lines[f"stop after {passes} passes"] = (costs, "#777777", style)
            lines["train to the end"] = ([regret.cost(run, None) for run in runs], "#777777", "-")
            for name, (costs, color, style) in lines.items():
                x = np.maximum(np.sort([each.regret for each in costs]), LEAST)
                ax.step(x, np.arange(1, len(x) + 1) / max(1, len(x)), style, color=color, where="post", label=name)
            ax.set_xscale("log")
            ax.set_title(f"{words.replace(', other', chr(10) + 'other')}, {len(runs)} runs", fontsize="small")
        axes[0].set_ylabel("share of runs")
        figure.supxlabel("regret (nats)", fontsize="medium")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


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
                if run.config.family != family or outcome(run) not in ("overfit", "healthy"):
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
