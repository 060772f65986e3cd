"""The drift section of a report: the chart with its error band, the words, and the facts behind it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from logalign.common.markup import measured
from logalign.report import signal_figures
from logalign.report.drifts import UNIT, Drift
from logalign.report.figures import COLORS
from logalign.report.panels import Panel, Trace, band, known, label, line, panel, run_color
from logalign.report.shown import ShownRun, Vector
from logalign.runs.columns import Columns

TITLE = f"drift ({UNIT})"
EXPLAINED = (
    "Drift is how much a sample's loss changes while the network trains on other samples, in nats for one pass over "
    "the data. Above zero, training on other samples raises a sample's loss; below zero, it still carries over to it. "
    "Each sample is compared with itself, from one visit to the next, and what its own visit bought is taken out. The "
    "shaded band is two standard errors on either side."
)


def drift_panels(runs: Sequence[ShownRun]) -> list[Panel]:
    """Return the panel of drift with its error band and a zero line, or none where no reading has drift."""
    drifting = [(i, run) for i, run in enumerate(runs) if known(run.drawn, "drift")]
    if not drifting:
        return []
    traces: list[Trace] = []
    for i, run in drifting:
        name, color = "drift" if len(runs) == 1 else label(run.name), run_color(i, runs)
        if known(run.drawn, "drift_low"):
            traces.append(band(f"r{i}", "drift", f"{name}: two standard errors", color))
        traces.append(line(f"r{i}", "drift", name, color))
    if len(runs) == 1 and known(runs[0].drawn, "gain"):
        traces.append(
            line("r0", "gain", "gain of one visit (nats)", COLORS["vocab_centered"], dash="dash", hidden=True)
        )
    figure = signal_figures.drift_figure(
        [(run.name, run.drawn) for _, run in drifting],
        label=TITLE,
        colors=[run_color(i, runs) for i, _ in drifting],
    )
    return [panel("drift", figure, traces, title=TITLE, lines=[(0.0, "")])]


def drift_text(runs: Sequence[ShownRun]) -> str:
    """Explain drift, and for one run state its last recorded value."""
    if len(runs) > 1:
        return EXPLAINED
    columns = runs[0].columns
    rows = np.flatnonzero(np.isfinite(_column(columns, "drift")))
    return EXPLAINED if not rows.size else f"{EXPLAINED}\n\n{_numbers(columns, int(rows[-1]))}"


def drift_facts(columns: Columns) -> dict[str, str]:
    """Return the passes over the data, the pairs of visits and why drift is missing, if the last reading has them."""
    facts = {}
    passes, pairs = _at(columns, "passes", -1), _at(columns, "revisited", -1)
    if passes is not None:
        facts["Passes over the data"] = f"{passes:.4g}"
    if pairs is not None:
        facts["Pairs of visits"] = f"{int(pairs):,}"
    reason = str(columns["drift_reason"][-1]) if "drift_reason" in columns else ""
    if reason:
        facts["Drift"] = f"none at the last reading: {reason}"
    return facts


def drift_cell(columns: Columns) -> str | None:
    """The last reading's drift and standard error for a table, or None where it has none."""
    value = _at(columns, "drift", -1)
    return None if value is None else str(Drift(value=value, error=_at(columns, "drift_error", -1)))


def _numbers(columns: Columns, row: int) -> str:
    drift = Drift(value=float(columns["drift"][row]), error=_at(columns, "drift_error", row))
    text = f"At step {columns['step'][row]:,} drift is {drift} {UNIT}: {drift.direction}."
    gain, pairs = _at(columns, "gain", row), _at(columns, "revisited", row)
    if gain is not None:
        gained = measured(gain, _at(columns, "gain_error", row))
        text += f" One visit lowers the loss of its own sample by {gained} nats (gain)."
    if pairs is not None:
        text += f" This rests on {int(pairs):,} pairs of visits."
    return text if drift.error is None else f"{text} ± is one standard error."


def _column(columns: Columns, name: str) -> Vector:
    return np.asarray(columns.get(name, np.full(len(columns["step"]), np.nan)), dtype=np.float64)


def _at(columns: Columns, name: str, row: int) -> float | None:
    value = float(_column(columns, name)[row])
    return value if np.isfinite(value) else None
