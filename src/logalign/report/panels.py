"""Describe once what a report draws: interactive panels as plain data for the page's script, and figures for paper.

A panel's traces name a table and a column in it. A table holds the rows of one run: their positions (step, tokens,
epoch) and the curves. A page can thus move all curves from one axis to another, and embeds each number once.

Texts of a run (its name, its layers) go through `label()`, because plotly reads some HTML in texts as markup.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from logalign.diagnosis.drops import LossThresholds
from logalign.diagnosis.grokking import GrokThresholds
from logalign.diagnosis.outcome import OUTCOMES, SHOWN
from logalign.diagnosis.overfit_rule import OverfitThresholds
from logalign.report import figures, signal_figures
from logalign.report.chart_lines import FORM_LINES, LOSS_LINES
from logalign.report.figures import COLORS, RUN_COLORS
from logalign.report.shown import ShownRun, axis_values
from logalign.report.spectra_shown import ShownSpectra

Vector = np.ndarray[Any, Any]
Trace = dict[str, Any]
Line = tuple[float, str]

LABEL_CHARACTERS = 40
LAYER_BINS = 300
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid", "dash")
MOST_LAYERS = 200

DRIVERS = (
    ("weight_participation", "weight spread d_p"),
    ("input_participation", "activation spread d_q"),
    ("coherence", "coherence c"),
)
OF_WEIGHTS = (("stable_rank", "stable rank"), ("weight_norm", "norm of the weight"))
"""Columns that `logalign spectra` records of checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart.

    Attributes:
        key: Name of the panel and of its figure's files.
        spec: Data that the page's script draws: see report.js.
        figure: The same chart for paper.
    """

    key: str
    spec: dict[str, Any] = field(repr=False)
    figure: Figure = field(repr=False)


@dataclass
class Tables:
    """The numbers that a page holds, by table and column."""

    held: dict[str, dict[str, list[float | int | None]]] = field(default_factory=dict)

    def add(self, name: str, columns: dict[str, Vector]) -> str:
        """Store these columns, to seven significant digits, and return the table's name."""
        self.held.setdefault(name, {}).update({column: numbers(values) for column, values in columns.items()})
        return name


def numbers(values: Vector) -> list[float | int | None]:
    """Convert to JSON: whole numbers exactly, others to seven significant digits, null where undefined."""
    values = np.asarray(values)
    if values.dtype.kind == "i":
        whole: list[float | int | None] = values.tolist()
        return whole
    shown: list[float | int | None] = []
    for value in values.tolist():
        if not math.isfinite(value):
            shown.append(None)
        elif value == int(value) and abs(value) < 1e15:
            shown.append(int(value))
        else:
            shown.append(float(f"{value:.7g}"))
    return shown


def label(text: str, *, characters: int = LABEL_CHARACTERS) -> str:
    """Return a text of the run as one line of bounded length that plotly shows literally."""
    shown = " ".join(text.split())
    if len(shown) > characters:
        shown = f"{shown[: characters // 2]} … {shown[-characters // 3 :]}"
    return html.escape(shown, quote=False)


def known(columns: Any, name: str) -> bool:
    """True where a column holds any number."""
    return name in columns and bool(np.isfinite(np.asarray(columns[name], dtype=np.float64)).any())


def add_tables(runs: Sequence[ShownRun], tables: Tables) -> None:
    """Store the curves of the runs in tables r0, r1, ... and their signals in s0, s1, ..."""
    for i, run in enumerate(runs):
        drawn = run.drawn
        names = [name for name in CURVE_COLUMNS if known(drawn, name)]
        undefined = ~np.isfinite(np.asarray(drawn["lar"], dtype=np.float64))
        held = {name: np.asarray(drawn[name]) for name in names}
        if undefined.any():
            lars = np.asarray(drawn["lar"], dtype=np.float64)
            foot = float(np.nanmin(lars)) if not undefined.all() else 0.5
            held["undefined"] = np.where(undefined, foot, np.nan)
        tables.add(f"r{i}", {**axis_values(drawn), **held})
        at = run.folded.rows
        whole = {
            name: run.columns[name][at] for name in ("step", "tokens_seen", "epoch", "passes") if name in run.columns
        }
        signals = dict(run.folded.signals)
        signals["band_below"] = -signals["band"]
        tables.add(
            f"s{i}", {**axis_values(whole), **{name: each for name, each in signals.items() if known(signals, name)}}
        )


CURVE_COLUMNS = (
    *(name for name, *_ in FORM_LINES),
    "effective_dim",
    "k_centered",
    "n",
    *(name for name, *_ in LOSS_LINES),
    *(name for name, _ in DRIVERS),
    *("drift", "drift_low", "drift_high", "gain"),
    "lar_bound",
    *(name for name, _ in OF_WEIGHTS),
    *(f"{form}_{end}" for form in ("lar", "lar_centered") for end in ("low", "high")),
    *(f"base_{form}{end}" for form in ("lar", "lar_centered", "loss") for end in ("", "_low", "_high")),
)


def panel(
    key: str,
    figure: Figure,
    traces: Sequence[Trace],
    *,
    title: str,
    log: bool = False,
    lines: Sequence[Line] = (),
    height: int = 320,
    **more: Any,
) -> Panel:
    """A panel over the steps, with `lines` as thresholds."""
    spec = {
        "key": key,
        "title": title,
        "alt": str(figure.get_label()),
        "log": log,
        "height": height,
        "traces": list(traces),
        "lines": [{"y": value, "text": words} for value, words in lines],
        **more,
    }
    return Panel(key=key, spec=spec, figure=figure)


def line(table: str, column: str, name: str, color: str, *, dash: str = "solid", **more: Any) -> Trace:
    """A curve."""
    return {"kind": "line", "table": table, "y": column, "name": name, "color": color, "dash": dash, **more}


def band(table: str, column: str, name: str, color: str) -> Trace:
    """The area between COLUMN_low and COLUMN_high."""
    return {"kind": "band", "table": table, "y": column, "name": name, "color": color}


def run_color(i: int, runs: Sequence[ShownRun]) -> str:
    """The color of run i."""
    return RUN_COLORS[i % len(RUN_COLORS)] if len(runs) > 1 else COLORS["plain"]


def lar_panels(runs: Sequence[ShownRun]) -> list[Panel]:
    """LAR: all forms of one run, or plain and centered of several, and no panel for logs without LAR."""
    if all(run.folded.verdict.regime == "loss" for run in runs):
        return []
    names = [run.name for run in runs]
    if len(runs) == 1:
        run = runs[0]
        figure = figures.lar_figure(run.drawn)
        traces: list[Trace] = []
        for form, words in (("lar", "plain"), ("lar_centered", "centered")):
            if known(run.drawn, f"base_{form}"):
                traces.append(
                    band("r0", f"base_{form}", f"baseline, {words}: where healthy readings lie", COLORS["baseline"])
                )
                traces.append(line("r0", f"base_{form}", f"baseline, {words}", COLORS["baseline"], dash="dash"))
        for each in FORM_LINES:
            form, color, words = each.column, each.color, each.words
            if not known(run.drawn, form):
                continue
            if known(run.drawn, f"{form}_low"):
                traces.append(band("r0", form, f"{words}: noise of a reading", COLORS[color]))
            traces.append(
                line(
                    "r0",
                    form,
                    words,
                    COLORS[color],
                    dash=each.dash,
                    hidden=not each.is_main and known(run.drawn, "lar_centered"),
                )
            )
        bounded = known(run.drawn, "lar_bound")
        if bounded:
            traces.append(line("r0", "lar_bound", "at most, by the weight alone", COLORS["baseline"], dash="dash"))
        undefined_at = ~np.isfinite(np.asarray(run.drawn["lar"], dtype=np.float64))
        if undefined_at.any() and not (bounded and undefined_at.all()):
            traces.append(undefined("r0", "undefined reading"))
        return [panel("lar", figure, traces, title="LAR", height=380)]
    panels = []
    for form, words in (("lar", "LAR, plain"), ("lar_centered", "LAR, centered")):
        if not any(known(run.drawn, form) for run in runs):
            continue
        traces = []
        longest = max(range(len(runs)), key=lambda i: int(runs[i].drawn["step"][-1]))
        if known(runs[longest].drawn, f"base_{form}"):
            traces.append(
                band(f"r{longest}", f"base_{form}", "baseline: where healthy readings lie", COLORS["baseline"])
            )
            traces.append(line(f"r{longest}", f"base_{form}", "baseline", COLORS["baseline"], dash="dash"))
        for i, run in enumerate(runs):
            if known(run.drawn, form):
                traces.append(line(f"r{i}", form, label(run.name), run_color(i, runs)))
            if (
                form == "lar"
                and run.folded.verdict.regime != "loss"
                and (~np.isfinite(np.asarray(run.drawn["lar"], dtype=np.float64))).any()
            ):
                traces.append(undefined(f"r{i}", f"undefined reading of {label(run.name)}"))
        own = [
            {**run.drawn, "lar": run.drawn[form]}
            if known(run.drawn, form)
            else {"step": run.drawn["step"], "lar": run.drawn["step"] * np.nan}
            for run in runs
        ]
        own = [{name: column for name, column in each.items() if name != "lar_centered"} for each in own]
        figure = figures.lar_figure(*own, labels=names)
        figure.axes[0].set_ylabel(words)
        panels.append(panel(form, figure, traces, title=words))
    return panels


def undefined(table: str, name: str) -> Trace:
    """Marks where LAR is undefined."""
    return {"kind": "marks", "table": table, "y": "undefined", "name": name, "color": COLORS["accent"]}


def effective_dim_panels(runs: Sequence[ShownRun]) -> list[Panel]:
    """The effective dimension k on a log axis."""
    traces: list[Trace] = []
    for i, run in enumerate(runs):
        name = "plain" if len(runs) == 1 else label(run.name)
        if known(run.drawn, "effective_dim"):
            traces.append(line(f"r{i}", "effective_dim", name, run_color(i, runs)))
        if known(run.drawn, "k_centered"):
            words = "centered (both)" if len(runs) == 1 else f"{name}, centered"
            color = COLORS["centered"] if len(runs) == 1 else run_color(i, runs)
            traces.append(
                line(
                    f"r{i}", "k_centered", words, color, dash="solid" if len(runs) == 1 else "dot", hidden=len(runs) > 1
                )
            )
    if not traces:
        return []
    lines: list[Line] = []
    sizes = {int(run.drawn["n"][0]) for run in runs if known(run.drawn, "n") and np.isfinite(run.drawn["n"][0])}
    if len(sizes) == 1:
        n = sizes.pop()
        lines.append((n, f"n = {n:,}: unrelated weights and inputs"))
    figure = figures.effective_dim_figure(*(with_k(run) for run in runs), labels=[run.name for run in runs])
    return [panel("effective_dim", figure, traces, title="effective dimension k", log=True, lines=lines)]


def with_k(run: ShownRun) -> dict[str, Any]:
    """The drawn columns, with a column for k even where none was recorded."""
    return {"effective_dim": np.full(len(run.drawn["step"]), np.nan), **run.drawn}


def loss_panels(runs: Sequence[ShownRun]) -> list[Panel]:
    """Training loss and, where recorded, held-out loss."""
    traces: list[Trace] = []
    for i, run in enumerate(runs):
        if len(runs) == 1 and known(run.drawn, "base_loss"):
            traces.append(line("r0", "base_loss", "baseline, training", COLORS["baseline"], dash="dash"))
        for each in LOSS_LINES:
            column, color, words = each.column, each.color, each.words
            if not known(run.drawn, column) or (column == "loss_mean" and _same(run, column)):
                continue
            one = len(runs) == 1
            name = words if one else f"{label(run.name)}, {words}"
            hidden = column == "loss_mean" and not one
            traces.append(
                line(
                    f"r{i}",
                    column,
                    name,
                    COLORS[color] if one else run_color(i, runs),
                    dash=each.dash,
                    sparse=True,
                    hidden=hidden,
                )
            )
    figure = figures.loss_figure(*(run.drawn for run in runs), labels=[run.name for run in runs])
    return [] if figure is None else [panel("loss", figure, traces, title="loss (nats)")]


def _same(run: ShownRun, column: str) -> bool:
    return bool(np.array_equal(run.drawn[column], run.drawn["loss"], equal_nan=True))


def signal_panels(runs: Sequence[ShownRun]) -> list[Panel]:
    """The signals behind the verdict, with their thresholds."""
    t, g = OverfitThresholds(), GrokThresholds()
    panels = []
    for key, title, lines, height in (
        (
            "deviation",
            "deviation from the baseline",
            [(t.approaching, "approaching"), (t.overfitting, "overfitting")],
            300,
        ),
        (
            "revisited_share",
            "memorized share of revisits",
            [(t.memorized, "approaching, where drift hardly lowers the loss")],
            260,
        ),
        (
            "k_ratio",
            "k / k on the memorization plateau",
            [(g.fall_of_k, "generalizing, where steep"), (g.fall_alone, "generalizing")],
            260,
        ),
        (
            "memorized_share_low",
            "memorized share, less two standard errors",
            [(LossThresholds().memorized, "approaching, where the loss hardly falls inside passes")],
            260,
        ),
    ):
        found = [(i, run) for i, run in enumerate(runs) if known(run.folded.signals, key)]
        if not found:
            continue
        traces: list[Trace] = []
        if key == "deviation" and len(runs) == 1:
            traces.append(
                {
                    "kind": "band",
                    "table": "s0",
                    "low": "band_below",
                    "high": "band",
                    "name": "band of a healthy run",
                    "color": COLORS["baseline"],
                }
            )
        traces += [
            line(f"s{i}", key, label(run.name) if len(runs) > 1 else title, run_color(i, runs), sparse=True)
            for i, run in found
        ]
        curves = [(run.name, run.columns["step"][run.folded.rows], run.folded.signals[key]) for _, run in found]
        figure = signal_figures.signal_figure(curves, label=title.split(",")[0], lines=lines)
        panels.append(panel(key, figure, traces, title=title, lines=lines, height=height))
    limits = {
        "strain": t.strain,
        "spread": t.spread,
        "loss_below": t.loss_below,
    }
    words = {
        "strain": "strain of LAR by memorizing",
        "spread": "growth of k",
        "loss_below": "loss below the baseline's",
    }
    traces, curves = [], []
    for i, run in enumerate(runs):
        for j, (name, limit) in enumerate(limits.items()):
            if not known(run.folded.signals, name):
                continue
            column = f"share_{name}"
            told = f"{words[name]} (1 is {limit:g})"
            if len(runs) > 1:
                told = f"{label(run.name)}: {words[name]}"
            color = run_color(i, runs) if len(runs) > 1 else RUN_COLORS[j]
            traces.append(line(f"s{i}", column, told, color, dash=DASHES[j], sparse=True, scale=[name, limit]))
            plain = words[name] if len(runs) == 1 else f"{run.name}: {words[name]}"
            curves.append((plain, run.columns["step"][run.folded.rows], run.folded.signals[name] / limit))
    if traces:
        title = "share of the threshold"
        figure = signal_figures.signal_figure(curves[:8], label=title, lines=[(1.0, "approaching")])
        panels.append(
            panel("shares", figure, traces, title=title, lines=[(1.0, "approaching overfitting")], height=340)
        )
    return panels


def outcome_panels(runs: Sequence[ShownRun], tables: Tables) -> list[Panel]:
    """The outcome over time, with a lane for each outcome of one run or for each of several runs."""
    seen = [outcome for outcome in OUTCOMES if any(outcome in run.folded.outcomes for run in runs)]
    if not seen:
        return []
    traces: list[Trace] = []
    for i, run in enumerate(runs):
        told = np.array(run.folded.outcomes)
        for lane, outcome in enumerate(seen):
            at = told == outcome
            if not at.any():
                continue
            y = float(lane if len(runs) == 1 else i)
            tables.add(f"s{i}", {f"is_{outcome}": np.where(at, y, np.nan)})
            traces.append(
                {
                    "kind": "lane",
                    "table": f"s{i}",
                    "y": f"is_{outcome}",
                    "name": outcome,
                    "hover": outcome if len(runs) == 1 else f"{label(run.name)}: {outcome}",
                    "legend": not any(trace["name"] == outcome for trace in traces),
                    "color": SHOWN[outcome].color,
                }
            )
    lanes = seen if len(runs) == 1 else [label(run.name, characters=24) for run in runs]
    figure = signal_figures.outcome_figure(
        [(run.name, run.columns["step"][run.folded.rows], run.folded.outcomes) for run in runs]
    )
    return [panel("outcome", figure, traces, title="", height=120 + 34 * len(lanes), lanes=lanes, legend=len(runs) > 1)]


def driver_panels(runs: Sequence[ShownRun]) -> list[Panel]:
    """Weight spread, activation spread and coherence, where spectra were recorded."""
    figure = figures.drivers_figure(*(run.drawn for run in runs), labels=[run.name for run in runs])
    if figure is None:
        return []
    panels = []
    for column, title in DRIVERS:
        traces = [
            line(f"r{i}", column, label(run.name) if len(runs) > 1 else title, run_color(i, runs), sparse=True)
            for i, run in enumerate(runs)
            if known(run.drawn, column)
        ]
        if traces:
            panels.append(panel(column, figure, traces, title=title, height=230, static="drivers"))
    return panels


def weight_panels(runs: Sequence[ShownRun]) -> list[Panel]:
    """Stable rank and norm, where the run comes from checkpoints."""
    panels = []
    for column, title in OF_WEIGHTS:
        found = [(i, run) for i, run in enumerate(runs) if known(run.drawn, column)]
        if not found:
            continue
        curves = [(run.name, run.drawn["step"], np.asarray(run.drawn[column], dtype=np.float64)) for _, run in found]
        traces = [
            line(f"r{i}", column, label(run.name) if len(runs) > 1 else title, run_color(i, runs), sparse=True)
            for i, run in found
        ]
        panels.append(panel(column, signal_figures.signal_figure(curves, label=title), traces, title=title, height=230))
    return panels


def layers_show(run: ShownRun) -> tuple[str, str]:
    """Choose column and words for the map of layers: LAR, or the weights' spread where no layer has LAR."""
    if not any(known(columns, "lar") for columns in run.sites.values()):
        return "weight_participation", "weight spread d_p"
    return "lar", "LAR, plain"


def layer_panels(run: ShownRun) -> list[Panel]:
    """A heat map of plain LAR, layer by step, for a run that watched several."""
    column, title = layers_show(run)
    if not any(known(columns, column) for columns in run.sites.values()):
        return []
    sites = list(run.sites)[:MOST_LAYERS]
    if len(sites) < 2:
        return []
    steps = np.unique(np.concatenate([run.sites[site]["step"] for site in sites]))
    edges = steps[np.unique(np.linspace(0, len(steps), min(LAYER_BINS, len(steps)) + 1).astype(int)[:-1])].astype(float)
    values = np.full((len(sites), len(edges)), np.nan)
    for i, site in enumerate(sites):
        columns = run.sites[site]
        lar = np.asarray(columns.get(column, np.full(len(columns["step"]), np.nan)), dtype=np.float64)
        bins = np.searchsorted(edges, columns["step"], side="right") - 1
        ok = np.isfinite(lar)
        totals, counts = np.bincount(bins[ok], lar[ok], len(edges)), np.bincount(bins[ok], minlength=len(edges))
        values[i] = np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)
    width = float(np.median(np.diff(edges))) if len(edges) > 1 else 1.0
    figure = signal_figures.layers_figure(sites, np.append(edges, edges[-1] + width), values, title=title)
    ends = np.append(edges, edges[-1] + width)
    heat = {
        **_edges(run, ends),
        "sites": [label(site, characters=28) for site in sites],
        "z": [numbers(row) for row in values],
        "title": title,
    }
    return [panel("layers", figure, [], title="", height=130 + max(22 * len(sites), 120), heat=heat)]


def _edges(run: ShownRun, steps: Vector) -> dict[str, list[float | int | None]]:
    """The positions of these steps along every axis."""
    found = {"step": numbers(steps)}
    for axis, values in axis_values(run.columns).items():
        ok = np.isfinite(np.asarray(values, dtype=np.float64))
        if axis != "step":
            found[axis] = numbers(np.interp(steps, run.columns["step"][ok], values[ok]))
    return found


def spectra_panels(run: ShownRun, spectra: ShownSpectra | None) -> list[Panel]:
    """p and q by direction, at the step that a slider selects."""
    if spectra is None:
        return []
    first = next(iter(spectra.sites))
    figure = signal_figures.spectra_figure(spectra.sites[first])
    held = {
        "steps": spectra.steps,
        "n": max(int(i[-1]) for at in spectra.sites.values() for i, _, _ in at.values()),
        "sites": [
            {
                "name": site,
                "at": {
                    str(step): {"i": numbers(i), "p": numbers(p), "q": numbers(q)} for step, (i, p, q) in at.items()
                },
            }
            for site, at in spectra.sites.items()
        ],
    }
    return [panel("spectra", figure, [], title="share of the whole", height=380, log=True, spectra=held)]
