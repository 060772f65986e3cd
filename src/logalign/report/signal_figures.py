"""Matplotlib figures of a verdict's signals, of many layers, and of spectra (`figures` draws the curves)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from logalign.diagnosis.outcome import OUTCOMES, SHOWN
from logalign.report import figures
from logalign.report.figures import COLORS, RUN_COLORS, Columns, house_style, new_axes

Vector = np.ndarray[Any, Any]

FEW_POINTS = 40
"""Readings up to which each is marked, so that one between two gaps shows."""
DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (8, 2)))


def _threshold(ax: Axes, value: float, words: str) -> None:
    """Draw a dashed line that carries its name."""
    ax.axhline(value, color=COLORS["accent"], linestyle="--", linewidth=1)
    ax.annotate(
        words,
        (1, value),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=8,
        color=COLORS["accent"],
    )


def signal_figure(
    curves: Sequence[tuple[str, Vector, Vector]], *, label: str, lines: Sequence[tuple[float, str]] = ()
) -> Figure:
    """Draw curves (name, steps, values) in one panel, with thresholds as dashed lines that carry their names."""
    figure, (ax,) = new_axes(1, row_height=2.6)
    with house_style():
        for i, (name, steps, values) in enumerate(curves):
            known = np.isfinite(values)
            ax.plot(
                steps[known],
                values[known],
                label=figures._plain(name),
                color=RUN_COLORS[i % len(RUN_COLORS)],
                linestyle=DASHES[i % len(DASHES)] if len(curves) > 1 else "-",
            )
        for value, words in lines:
            _threshold(ax, value, words)
    ax.set_ylabel(label)
    if len(curves) > 1:
        figures._legend(ax)
    figure.set_label(f"Line chart of {label} over training steps.")
    return figure


def drift_figure(curves: Sequence[tuple[str, Columns]], *, label: str, colors: Sequence[str]) -> Figure:
    """Draw each run's column `drift` (name, columns), the band from drift_low to drift_high, and a line at zero.

    A reading without drift leaves a gap in the curve and in the band.
    """
    figure, (ax,) = new_axes(1, row_height=2.6)
    with house_style():
        for i, ((name, columns), color) in enumerate(zip(curves, colors, strict=True)):
            steps, drift = (np.asarray(columns[each], dtype=np.float64) for each in ("step", "drift"))
            ax.plot(
                steps,
                drift,
                label=figures._plain(name),
                color=color,
                linestyle=DASHES[i % len(DASHES)],
                marker="o" if np.isfinite(drift).sum() <= FEW_POINTS else None,
                markersize=3,
            )
            low, high = (np.asarray(columns[f"drift_{end}"], dtype=np.float64) for end in ("low", "high"))
            ax.fill_between(steps, low, high, where=np.isfinite(low), color=color, alpha=0.18, linewidth=0)
        _threshold(ax, 0.0, "")
        ax.update_datalim([(float(step), 0.0) for _, columns in curves for step in columns["step"][[0, -1]]])
        ax.autoscale_view()
    ax.set_ylabel(label)
    if len(curves) > 1:
        figures._legend(ax)
    figure.set_label(f"Line chart of {label} over training steps, with its error band and a line at zero.")
    return figure


def outcome_figure(runs: Sequence[tuple[str, Vector, Sequence[str]]]) -> Figure:
    """Draw the outcome over steps, with a lane for each outcome of one run or for each of several runs."""
    figure, (ax,) = new_axes(1, row_height=0.9 + 0.3 * (len(runs) if len(runs) > 1 else 3))
    seen = [outcome for outcome in OUTCOMES if any(outcome in outcomes for _, _, outcomes in runs)]
    with house_style():
        for lane, (_, steps, outcomes) in enumerate(runs):
            told = np.array(outcomes)
            for height, outcome in enumerate(seen):
                at = steps[told == outcome]
                y = height if len(runs) == 1 else lane
                ax.plot(
                    at,
                    np.full(at.size, y),
                    linestyle="none",
                    marker="s",
                    markersize=7,
                    color=SHOWN[outcome].color,
                    label=outcome if lane == 0 else "_",
                )
    names = seen if len(runs) == 1 else [figures._plain(name) for name, _, _ in runs]
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    if len(runs) > 1:
        figures._legend(ax)
    figure.set_label("What the detector said at each step: " + ", ".join(seen) + ".")
    return figure


def layers_figure(sites: Sequence[str], edges: Vector, values: Vector, *, title: str = "LAR, plain") -> Figure:
    """Draw the titled quantity of many layers as a heat map: values [sites, bins] between bin edges in steps."""
    figure, (ax,) = new_axes(1, row_height=1.0 + 0.24 * len(sites))
    with house_style():
        mesh = ax.pcolormesh(edges, np.arange(len(sites) + 1), np.ma.masked_invalid(values), cmap="cividis")
        ax.set_yticks(np.arange(len(sites)) + 0.5, [figures._plain(site) for site in sites])
        ax.invert_yaxis()
        ax.grid(False)
        figure.colorbar(mesh, ax=ax, label=title)
    figure.set_label(f"Heat map of {title} of every layer over training steps.")
    return figure


def spectra_figure(spectra: Mapping[int, tuple[Vector, Vector, Vector]], *, n: int | None = None) -> Figure:
    """Draw p and q of one layer at up to four of the given steps, on logarithmic axes."""
    steps = sorted(spectra)
    steps = [steps[i] for i in sorted({int(i) for i in np.linspace(0, len(steps) - 1, 4).round()})]
    figure, axes = new_axes(2, row_height=2.2)
    floor = 1e-8
    with house_style():
        for ax, part, words in zip(axes, (1, 2), ("p, of the weight", "q, of the inputs"), strict=True):
            for i, step in enumerate(steps):
                ax.plot(
                    spectra[step][0],
                    np.maximum(spectra[step][part], floor),
                    label=f"step {step:,}",
                    color=RUN_COLORS[i],
                    linestyle=DASHES[i],
                )
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_ylabel(words)
        axes[-1].set_xlabel("direction, from the largest singular value down")
    figures._legend(axes[0])
    figure.set_label("Weight spectrum p and activation spectrum q, on logarithmic axes, at several steps.")
    return figure
