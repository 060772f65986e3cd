"""Make a run ready to draw on page and figures: thinned columns, verdict, noise band and baseline.

Shapes: columns are one-dimensional and of equal length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from logalign.diagnosis.baseline import Axis, Baseline
from logalign.diagnosis.overfit_rule import OverfitThresholds
from logalign.diagnosis.robust import MAD_TO_SIGMA
from logalign.diagnosis.series import LARGEST, POSSIBLE_LAR
from logalign.errors import InputError
from logalign.report.drifts import SIGMAS
from logalign.report.folded import Folded, fold
from logalign.report.thin import kept_rows
from logalign.runs.columns import Columns, site_columns
from logalign.runs.reading import FORMS
from logalign.runs.run import Run, main_layer
from logalign.samples.passes import passes_of

Vector = np.ndarray[Any, Any]

ROWS = 6_000
"""Rows of curves that one page holds, over all its runs."""
FEWEST_ROWS = 1_000
CURVES = (
    "lar",
    "lar_centered",
    "lar_vocab_centered",
    "lar_token_centered",
    "effective_dim",
    "loss",
    "loss_mean",
    "val_loss",
)
"""Curves whose extremes survive thinning."""
OF_REVISITS = ("drift",)
"""The same, for runs that have any of these. Further curves widen the stretches."""
NOISE_READINGS = 21
SMOOTHING = 5
NOISE_SIGMAS = 2.0
DRAWN_BASELINES = ("lar", "lar_centered", "loss")


@dataclass(frozen=True, kw_only=True)
class ShownRun:
    """One run of a report.

    Attributes:
        run: The recorded run.
        name: Short name, unlike the other runs'.
        site: The layer that the report covers.
        sites: The columns of every layer, in the order of their first readings.
        rows: Rows of the main layer's columns to draw.
        drawn: Those rows, with `k_centered`, noise bands and baseline added.
        folded: The detector's outcome and signals.
    """

    run: Run
    name: str
    site: str
    sites: Mapping[str, Columns] = field(repr=False)
    rows: Vector = field(repr=False)
    drawn: Columns = field(repr=False)
    folded: Folded = field(repr=False)

    @property
    def columns(self) -> Columns:
        """All readings of the main layer."""
        return self.sites[self.site]

    @property
    def thinned(self) -> bool:
        """True where some readings are not drawn."""
        return len(self.rows) < len(self.columns["step"])


def shown_run(run: Run, name: str, *, baseline: Baseline | None = None, rows: int = ROWS) -> ShownRun:
    """Read a run, judge it, and choose what to draw.

    Args:
        run: The recorded run.
        name: The run's name on the page.
        baseline: The verdict's reference.
        rows: Most rows to draw.

    Raises:
        RunError: the run is damaged.
        InputError: the run holds no reading, or the baseline does not fit it.
    """
    sites = site_columns(run)
    if not sites:
        raise InputError(f"{run.name}: expected at least one reading to draw, found none yet")
    site = main_layer(sites, named=run.meta.get("main"), otherwise=next(iter(sites)))
    columns = sites[site]
    if baseline is not None:
        baseline.check_shape(_last(columns, "m"), _last(columns, "n"), name=run.name)
    folded = fold(columns, site, baseline=baseline)
    curves = [columns[name].astype(np.float64) for name in CURVES if name in columns]
    of_revisits = [columns[name].astype(np.float64) for name in OF_REVISITS if name in columns]
    curves += [curve for curve in of_revisits if np.isfinite(curve).any()]
    kept = kept_rows(curves, most=rows)
    drawn = {name: _drawable(name, values[kept]) for name, values in columns.items() if values.dtype.kind in "fi"}
    drawn["reason"] = columns["reason"][kept]
    _add_k(drawn)
    for form in ("lar", "lar_centered"):
        low, high = noise_band(columns[form], kept)
        drawn[f"{form}_low"], drawn[f"{form}_high"] = low, high
    _add_drift_band(drawn)
    _add_baseline(drawn, folded.baseline)
    return ShownRun(run=run, name=name, site=site, sites=sites, rows=kept, drawn=drawn, folded=folded)


def _drawable(name: str, values: Vector) -> Vector:
    """Make undefined what a detector also ignores: floats beyond 1e100, an impossible LAR, a k of 0 or below."""
    if values.dtype.kind == "i":
        return values
    low, high = POSSIBLE_LAR if name in FORMS else (-LARGEST, LARGEST)
    with np.errstate(invalid="ignore"):
        possible = (values >= low) & (values <= high)
    if name == "effective_dim":
        possible &= values > 0
    return np.where(possible, values, np.nan)


def noise_band(values: Vector, rows: Vector, *, readings: int = NOISE_READINGS) -> tuple[Vector, Vector]:
    """Compute the range of a reading by chance: the running median and two standard deviations on either side.

    The median covers five readings. The standard deviation is robust. It measures the moves from one reading to the
    next about their median, over the square root of two, so that a trend does not count. It covers `readings` readings
    about each row. The range is NaN where there are fewer.
    """
    low, high = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    half, near = readings // 2, SMOOTHING // 2
    inside = np.flatnonzero((rows >= half) & (rows < len(values) - half))
    around = values[rows[inside][:, None] + np.arange(-half, half + 1)]
    known = np.isfinite(around).all(axis=1)
    around, inside = around[known], inside[known]
    center = np.median(around[:, half - near : half + near + 1], axis=1)
    moves = np.diff(around, axis=1)
    moves -= np.median(moves, axis=1, keepdims=True)
    width = NOISE_SIGMAS * MAD_TO_SIGMA * np.median(np.abs(moves), axis=1) / np.sqrt(2)
    low[inside], high[inside] = center - width, center + width
    return low, high


def axis_values(columns: Columns) -> dict[str, Vector]:
    """Return the axes for these rows: step, and tokens and passes where most rows have them."""
    steps = np.asarray(columns["step"])
    found = {"step": steps}
    none = np.full(steps.shape, np.nan)
    passes, epochs = columns.get("passes", none), columns.get("epoch", none)
    for axis, values in (("tokens", columns.get("tokens_seen", none)), ("epoch", passes_of(steps, passes, epochs))):
        values = np.asarray(values, dtype=np.float64)
        if np.isfinite(values).mean() > 0.5 and np.nanmax(values) > np.nanmin(values):
            found[axis] = values
    return found


def _add_k(drawn: dict[str, Vector]) -> None:
    """Add k of the centered LAR, and of the plain one where no k was recorded."""
    if "n" not in drawn:
        return
    wanted = {"k_centered": "lar_centered"}
    if "effective_dim" not in drawn or not np.isfinite(drawn["effective_dim"]).any():
        wanted["effective_dim"] = "lar"
    for name, form in wanted.items():
        with np.errstate(over="ignore"):  # values beyond the float range are not drawn
            k = np.asarray(drawn["n"], dtype=np.float64) ** (2 * (1 - drawn[form]))
        drawn[name] = _drawable("effective_dim", k)


def _add_drift_band(drawn: dict[str, Vector]) -> None:
    """Add two standard errors about the drift."""
    if "drift" in drawn and "drift_error" in drawn:
        width = SIGMAS * drawn["drift_error"]
        drawn["drift_low"], drawn["drift_high"] = drawn["drift"] - width, drawn["drift"] + width


def _add_baseline(drawn: dict[str, Vector], baseline: Baseline | None) -> None:
    """Add the baseline and the range in which it puts a healthy run's reading."""
    if baseline is None:
        return
    tokens = np.asarray(drawn.get("tokens_seen", np.array([np.nan])), dtype=np.float64)
    axis: Axis = baseline.axis_for(tokens=bool(np.isfinite(tokens).any()))
    x = tokens if axis == "tokens" else np.asarray(drawn["step"], dtype=np.float64)
    for form in DRAWN_BASELINES:
        curve = baseline.curve(form, axis)
        if curve is None:
            continue
        band = curve.at(x)
        assumed = OverfitThresholds().between_one_run if form != "loss" else 0.0
        between = np.where(np.isfinite(band.between), band.between, assumed)
        scatter = band.scatter if np.isfinite(band.scatter) else 0.0
        width = NOISE_SIGMAS * np.sqrt(between**2 + scatter**2)
        center = np.where(np.isfinite(band.center), band.center, np.nan)
        drawn[f"base_{form}"] = center
        drawn[f"base_{form}_low"], drawn[f"base_{form}_high"] = center - width, center + width


def _last(columns: Columns, name: str) -> int | None:
    known = columns[name][np.isfinite(columns[name])] if name in columns else np.array([])
    return int(known[-1]) if known.size else None
