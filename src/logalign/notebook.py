"""Show a run in a notebook: its card, and the figure of `run.plot()`."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from logalign.common import markup
from logalign.common.extras import load
from logalign.errors import InputError, LogAlignError
from logalign.report.thin import kept_rows
from logalign.runs.log import READINGS
from logalign.runs.reading import never_tried
from logalign.runs.run import Run, main_layer

SHOWN_AT_ONCE = 16_000_000
"""The most bytes of a log that a notebook reads only to show a run."""
ROWS = 2_000
"""A longer run shows the lowest and the highest value of every stretch of a curve."""
BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#808080"
DRIFT = "drift (nats a pass)"
CURVES = (
    (DRIFT, (("drift", DRIFT, BLUE),)),
    ("LAR", (("lar", "plain", BLUE), ("lar_centered", "centered", ORANGE))),
    ("k", (("effective_dim", "k", BLUE),)),
    ("loss", (("loss", "training", BLUE), ("loss_mean", "training, mean", GREEN), ("val_loss", "held out", ORANGE))),
)


def plot(run: Run, *, site: str | None = None) -> Any:
    """Draw a run over its steps: drift, LAR plain and centered, k on a logarithmic axis, losses.

    Drift is the change of a sample's loss while the network trains on other samples. Its plot has two standard errors
    on either side and a line at zero.

    Args:
        run: The recorded run.
        site: The layer. The default is the run's main layer.

    Returns:
        A plotly Figure, which a notebook shows as the last value of a cell. Undefined readings are gaps.

    Raises:
        MissingExtraError: plotly is not installed.
        InputError: the layer has no readings.
        RunError: the run is damaged.
    """
    graphs = load("plotly.graph_objects", extra="report", purpose="run.plot()")
    make_subplots = load("plotly.subplots", extra="report", purpose="run.plot()").make_subplots
    site = run.main if site is None else site
    columns = run.columns(site)
    if not columns["step"].size:
        sites = ", ".join(sorted({reading.site for reading in run.readings})) or "no readings"
        raise InputError(f"{run.name}: expected readings of the layer {site!r}, found {sites}")
    kept = kept_rows([columns[name].astype(np.float64) for name in ("step", *_recorded(columns))], most=ROWS)
    panels = [(title, lines) for title, lines in CURVES if any(name in _recorded(columns) for name, _, _ in lines)]
    figure = make_subplots(rows=max(1, len(panels)), cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for row, (title, lines) in enumerate(panels, 1):
        if title == DRIFT:
            figure.add_trace(_error_band(graphs, columns, kept), row=row, col=1)
            figure.add_hline(y=0, row=row, col=1, line={"color": GRAY, "width": 1, "dash": "dash"})
        for name, label, color in lines:
            if name in _recorded(columns):
                line = graphs.Scatter(
                    x=columns["step"][kept],
                    y=columns[name][kept],
                    name=label if label == title else f"{title}, {label}",
                    line={"color": color, "width": 1.5},
                    # A reading between two undefined readings is a point, not a line.
                    mode="lines" if np.isfinite(columns[name]).all() else "lines+markers",
                    marker={"size": 3},
                )
                figure.add_trace(line, row=row, col=1)
        figure.update_yaxes(title_text=title, type="log" if title == "k" else "linear", row=row, col=1)
    figure.update_xaxes(title_text="step", row=len(panels) or 1, col=1)
    figure.update_xaxes(gridcolor="rgba(128,128,128,.25)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(128,128,128,.25)", zeroline=False)
    figure.update_layout(
        title={"text": escape(f"{run.name}: {site}", quote=False), "font": {"size": 14}},
        height=140 + 180 * max(1, len(panels)),
        margin={"l": 60, "r": 20, "t": 50, "b": 80},
        hovermode="x unified",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GRAY},
        hoverlabel={"font": {"color": "#222222"}, "bgcolor": "#f4f4f4"},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    )
    return figure


def card(run: Run) -> str:
    """Return a run's facts and curves as HTML for a notebook, or the damage of the run."""
    log = run.path if run.path.is_file() else run.path / READINGS
    if "readings" not in run.__dict__ and log.is_file() and log.stat().st_size > SHOWN_AT_ONCE:
        size = f"{log.stat().st_size / 1e6:,.0f} MB, not read yet; .readings reads them"
        return markup.card(f"Run {run.name}", markup.facts({"readings": size}))
    try:
        readings = run.readings
    except LogAlignError as error:
        return markup.card(f"Run {run.name}", markup.text("damaged:", str(error)))
    if not readings:
        return markup.card(f"Run {run.name}", markup.facts({"readings": "none yet"}))
    sites = list(dict.fromkeys(reading.site for reading in readings))
    site = main_layer(sites, named=run.meta.get("main"), otherwise=sites[0])
    main = [reading for reading in readings if reading.site == site]
    last = main[-1]
    known = [reading for reading in main if reading.lar is not None]
    facts = {
        "layer": f"{last.site} (m = {markup.number(last.m, ',')}, n = {markup.number(last.n, ',')})",
        "readings": f"{len(main):,}, steps {main[0].step:,} to {last.step:,}",
        "LAR": f"{markup.number(last.lar)} at the last" + (f" ({last.reason})" if last.reason else ""),
    }
    others = {"LAR, centered": last.lar_centered, "k": last.effective_dim, "loss": last.loss}
    facts |= {name: markup.number(value) for name, value in others.items() if value is not None}
    if last.drift is not None:
        facts["drift"] = f"{markup.measured(last.drift, last.drift_error)} nats a pass"
    is_without_lar = all(never_tried(reading) for reading in main)
    if len(known) < len(main) and not is_without_lar:
        facts["undefined"] = f"{len(main) - len(known):,} readings"
    if len(sites) > 1:
        facts["other layers"] = f"{len(sites) - 1:,}"
    steps = [reading.step for reading in main]
    drawn = [
        markup.Drawn("LAR", markup.BLUE, steps, [reading.lar for reading in main]),
        markup.Drawn("centered", markup.ORANGE, steps, [reading.lar_centered for reading in main]),
    ]
    if is_without_lar:
        held_out = [(reading.step, reading.extra.get("val_loss")) for reading in main]
        held_out = [each for each in held_out if each[1] is not None]
        drawn = [
            markup.Drawn("loss", markup.BLUE, steps, [reading.loss for reading in main]),
            markup.Drawn("held out", markup.ORANGE, [step for step, _ in held_out], [loss for _, loss in held_out]),
        ]
    shown = [each for each in drawn if any(value is not None for value in each.y)]
    return markup.card(f"Run {run.name}", markup.facts(facts), markup.curves(shown, x_name="step"))


def _error_band(graphs: Any, columns: Any, kept: Any) -> Any:
    """Outline two standard errors about the drift, in each stretch where it is known."""
    steps, drift, error = (columns[name][kept] for name in ("step", "drift", "drift_error"))
    rows = np.flatnonzero(np.isfinite(drift) & np.isfinite(error))
    x: list[float | None] = []
    y: list[float | None] = []
    for stretch in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
        back = stretch[::-1]
        x += [*steps[stretch].tolist(), *steps[back].tolist(), None]
        y += [*(drift + 2 * error)[stretch].tolist(), *(drift - 2 * error)[back].tolist(), None]
    return graphs.Scatter(
        x=x,
        y=y,
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor="rgba(0,114,178,.18)",
        hoverinfo="skip",
        showlegend=False,
    )


def _recorded(columns: Any) -> list[str]:
    """Return the curves with at least one defined value."""
    return [name for _, lines in CURVES for name, _, _ in lines if name in columns and np.isfinite(columns[name]).any()]
