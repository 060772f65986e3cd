"""Matplotlib figures of runs, drawn from the NumPy columns of `Run.columns()`.

The functions use matplotlib's object interface and never pyplot, which keeps a global list of figures and picks a
window system. A report must also work on machines without a screen and in programs that have figures of their own.
For the same reason the house style is a context (`house_style`) and not a change of the global settings.

Every `*_figure` function takes the columns of one run, or of several runs to overlay:
    lar_figure(run.columns())
    lar_figure(clean.columns(), noisy.columns(), labels=["clean labels", "40 % random labels"])
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from logalign.errors import InputError, MissingExtraError
from logalign.report.chart_lines import FORM_LINES, LOSS_LINES

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    from matplotlib.typing import LineStyleType
except ImportError as error:
    raise MissingExtraError('figures need matplotlib: pip install "logalign[report]"') from error

Columns = Mapping[str, np.ndarray]

# Okabe and Ito's palette, distinguishable with every common form of color blindness, and one wine red for emphasis.
COLORS = {
    "plain": "#0072B2",
    "centered": "#D55E00",
    "vocab_centered": "#009E73",
    "token_centered": "#CC79A7",
    "train": "#56B4E9",
    "held_out": "#E69F00",
    "baseline": "#7F7F7F",
    "accent": "#882255",
}

# One color for each of several overlaid runs.
RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#882255", "#E69F00", "#56B4E9", "#444444")

# Characters of the legend's size that fit over a panel, approximately, and characters shown of a run's name.
_LEGEND_CHARACTERS = 100
_LABEL_CHARACTERS = 40

_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "logalign",
}


@contextmanager
def house_style() -> Iterator[None]:
    """Draw and save figures in this library's style, without changing matplotlib's global settings."""
    with matplotlib.rc_context(_STYLE):
        yield


def new_axes(rows: int, *, width: float = 7.5, row_height: float = 2.6) -> tuple[Figure, list[Axes]]:
    """Make a figure of `rows` panels, one above the other, that share the x axis "step".

    Args:
        rows: number of panels, at least one.
        width: the figure's width, in inches.
        row_height: one panel's height, in inches.

    Returns:
        The figure and its axes from top to bottom. Lines drawn inside `house_style()` have the style's weights.
    """
    if rows < 1:
        raise InputError(f"a figure has at least one panel; got rows={rows}")
    with house_style():
        figure = Figure(figsize=(width, row_height * rows + 0.4), layout="constrained")
        axes = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
        axes[-1].set_xlabel("step")
    return figure, axes


def draw_curve(
    ax: Axes,
    columns: Columns,
    name: str,
    *,
    label: str,
    color: str,
    linestyle: LineStyleType = "-",
    linewidth: float = 1.6,
) -> bool:
    """Draw the column `name` over `step`.

    An undefined LAR is a gap in its line. Other columns may be recorded more rarely than LAR (a held-out loss, say), so
    their line joins the points that exist. Returns True if it drew anything. An absent or empty column draws nothing.
    """
    if name not in columns:
        return False
    step = np.asarray(columns["step"], dtype=float)
    value = np.asarray(columns[name], dtype=float)
    known = np.isfinite(value)
    if not known.any():
        return False
    if not (name.startswith("lar") or name == "effective_dim"):
        step, value = step[known], value[known]
    with house_style():
        ax.plot(
            step,
            value,
            label=label,
            color=color,
            linestyle=linestyle,
            linewidth=linewidth,
            marker="o" if known.sum() == 1 else None,
            markersize=4,
        )
    return True


def _draw_band(ax: Axes, columns: Columns, name: str, color: str) -> None:
    """Shade the area between the columns NAME_low and NAME_high, where they exist."""
    if f"{name}_low" in columns:
        step, low, high = (np.asarray(columns[each], dtype=float) for each in ("step", f"{name}_low", f"{name}_high"))
        known = np.isfinite(low) & np.isfinite(high)
        ax.fill_between(step[known], low[known], high[known], color=color, alpha=0.15, linewidth=0)


def _draw_undefined(ax: Axes, runs: Sequence[Columns]) -> None:
    """Mark the steps with undefined plain LAR at the foot of the panel, so that every reading shows."""
    steps = np.concatenate([np.asarray(run["step"], dtype=float)[~np.isfinite(run["lar"])] for run in runs])
    if steps.size:
        ax.plot(
            steps,
            np.zeros(steps.size),
            linestyle="none",
            marker="x",
            markersize=5,
            color=COLORS["accent"],
            transform=ax.get_xaxis_transform(),
            clip_on=False,
            label="undefined reading",
        )


def _check(runs: Sequence[Columns], labels: Sequence[str]) -> list[str]:
    if not runs:
        raise InputError("a figure needs the columns of at least one run; got none")
    if labels and len(labels) != len(runs):
        raise InputError(f"expected one label a run; got {len(labels)} labels for {len(runs)} runs")
    return [_plain(label) for label in labels] or [f"run {i + 1}" for i in range(len(runs))]


def _plain(label: str) -> str:
    """Keep matplotlib from reading dollars in a run's name as mathematics and from hiding names that begin with "_"."""
    shown = " ".join(label.split())
    if len(shown) > _LABEL_CHARACTERS:
        shown = f"{shown[: _LABEL_CHARACTERS // 2]} … {shown[-_LABEL_CHARACTERS // 3 :]}"
    shown = shown.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _legend(ax: Axes, entries: Sequence[Line2D] | None = None) -> None:
    """Put the legend above the panel, where it covers no curve, in as many columns as its texts allow."""
    handles = ax.get_legend_handles_labels()[0] if entries is None else list(entries)
    if not handles:
        return
    longest = max(len(str(handle.get_label())) for handle in handles)
    with house_style():
        ax.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=max(1, min(len(handles), 5, _LEGEND_CHARACTERS // (longest + 6))),
            borderaxespad=0.2,
            handlelength=1.8,
            columnspacing=1.2,
        )


def _color(i: int) -> str:
    return RUN_COLORS[i % len(RUN_COLORS)]


def lar_figure(*runs: Columns, labels: Sequence[str] = ()) -> Figure:
    """Draw LAR over steps: all forms in one panel for one run, plain and centered in two panels for several."""
    names = _check(runs, labels)
    if len(runs) == 1:
        figure, (ax,) = new_axes(1, row_height=3.2)
        for column, color, words, linestyle, _ in FORM_LINES:
            _draw_band(ax, runs[0], column, COLORS[color])
            draw_curve(ax, runs[0], column, label=words, color=COLORS[color], linestyle=linestyle)
            base = f"base_{column}"
            _draw_band(ax, runs[0], base, COLORS["baseline"])
            draw_curve(ax, runs[0], base, label=f"baseline, {words}", color=COLORS["baseline"], linestyle="-.")
        _draw_undefined(ax, runs)
        ax.set_ylabel("LAR")
        _legend(ax)
        figure.set_label("Line chart of the log-alignment ratio over training steps, plain and centered.")
        return figure
    both = any(np.isfinite(np.asarray(run.get("lar_centered", np.nan), dtype=float)).any() for run in runs)
    figure, axes = new_axes(2 if both else 1)
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        draw_curve(axes[0], run, "lar", label=name, color=_color(i))
        if both:
            draw_curve(axes[1], run, "lar_centered", label=name, color=_color(i))
    _draw_undefined(axes[0], runs)
    axes[0].set_ylabel("LAR, plain")
    if both:
        axes[1].set_ylabel("LAR, centered")
    _legend(axes[0])
    figure.set_label(f"Line chart of the log-alignment ratio over training steps for {len(runs)} runs.")
    return figure


def effective_dim_figure(*runs: Columns, labels: Sequence[str] = ()) -> Figure:
    """Draw the effective dimension k over steps on a log axis, and for one run its centered form and the bound n."""
    names = _check(runs, labels)
    figure, (ax,) = new_axes(1, row_height=3.2)
    if len(runs) == 1:
        run = runs[0]
        draw_curve(ax, run, "effective_dim", label="plain", color=COLORS["plain"])
        if "lar_centered" in run and "n" in run:
            n = np.asarray(run["n"], dtype=float)
            k = n ** (2 * (1 - np.asarray(run["lar_centered"], dtype=float)))
            centered = {"step": run["step"], "effective_dim": k}
            draw_curve(ax, centered, "effective_dim", label="centered (both)", color=COLORS["centered"])
    else:
        for i, (run, name) in enumerate(zip(runs, names, strict=True)):
            draw_curve(ax, run, "effective_dim", label=name, color=_color(i))
    _log_scale(ax)
    ax.set_ylabel("effective dimension k")
    _legend(ax)
    figure.set_label("Line chart of the effective dimension over training steps, on a logarithmic axis.")
    return figure


def _log_scale(ax: Axes) -> None:
    """Set a logarithmic y axis with plain numbers as ticks, even where the data span less than a decade."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 4 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def loss_figure(*runs: Columns, labels: Sequence[str] = ()) -> Figure | None:
    """Draw the training loss and any recorded held-out loss, or return None if no run has recorded a loss."""
    names = _check(runs, labels)
    figure, (ax,) = new_axes(1, row_height=3.2)
    single = len(runs) == 1
    seen = set()
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        for column, color, words, linestyle, is_main in LOSS_LINES:
            if not is_main:
                continue
            shown = COLORS[color] if single else _color(i)
            if draw_curve(ax, run, column, label=words if single else name, color=shown, linestyle=linestyle):
                seen.add(column)
    if not seen:
        return None
    ax.set_ylabel("loss (nats)")
    if single:
        _legend(ax)
    else:
        # Colors distinguish the runs, line styles the two losses: n + 2 entries and not 2 n.
        by_color = [Line2D([], [], color=_color(i), label=name) for i, name in enumerate(names)]
        by_style = [
            Line2D([], [], color="#444444", linestyle=linestyle, label=words)
            for column, _, words, linestyle, _ in LOSS_LINES
            if column in seen
        ]
        _legend(ax, [*by_color, *by_style])
    figure.set_label("Line chart of the training loss, and of the held-out loss where recorded, over training steps.")
    return figure


def drivers_figure(*runs: Columns, labels: Sequence[str] = ()) -> Figure | None:
    """Draw the factors of k: the participation ratios of weights and inputs, and their coherence, k = sqrt(d_p d_q)/c.

    Returns None if no run has a spectral reading (`watch(..., spectra_every=...)`).
    """
    names = _check(runs, labels)
    panels = [
        (column, words)
        for column, words in (
            ("weight_participation", "weight\nparticipation"),
            ("input_participation", "input\nparticipation"),
            ("coherence", "coherence"),
        )
        if any(column in run and np.isfinite(np.asarray(run[column], dtype=float)).any() for run in runs)
    ]
    if not panels:
        return None
    figure, axes = new_axes(len(panels), row_height=1.8)
    for ax, (column, words) in zip(axes, panels, strict=True):
        for i, (run, name) in enumerate(zip(runs, names, strict=True)):
            draw_curve(ax, run, column, label=name, color=_color(i))
        ax.set_ylabel(words)
    if len(runs) > 1:
        _legend(axes[0])
    figure.set_label("Line charts of the participation ratios of weights and inputs and of their coherence over steps.")
    return figure


def sites_figure(sites: Mapping[str, Columns]) -> Figure:
    """Draw the plain LAR of several layers of one run."""
    figure, (ax,) = new_axes(1, row_height=3.2)
    for i, (site, columns) in enumerate(sites.items()):
        draw_curve(ax, columns, "lar", label=site, color=_color(i), linestyle="-" if i < len(RUN_COLORS) else "--")
    ax.set_ylabel("LAR, plain")
    _legend(ax)
    figure.set_label("Line chart of the plain log-alignment ratio of several layers over training steps.")
    return figure
