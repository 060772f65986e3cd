"""Comparable: select the runs that compare and the point of comparison; name each run left out.

Method: align the runs along steps, tokens or passes, and judge them at the last point that all of them reach. Leave out
a run that would spoil the comparison for the others. The alternative, to reject all runs, loses a whole sweep to one
killed run.

`parts` maps each run's path to its columns, as `columns_of` returns them. A run left out moves from `parts` to
`left_out`, with the reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from statistics import median_low
from typing import Literal

import numpy as np

from logalign.diagnosis.epochs import MIN_READINGS
from logalign.diagnosis.robust import Vector
from logalign.errors import InputError
from logalign.runs.run import Run
from logalign.samples.passes import passes_of
from logalign.samples.visits import NOTHING_CAME_BACK

SHORT = 1 / 3
"""A run is short if it ends before this share of what half of the runs reach."""

Align = Literal["step", "tokens", "epoch"]
ALIGNMENTS: Mapping[str, str] = {"step": "step", "tokens": "tokens_seen", "epoch": "epoch"}
"""Column per alignment."""

Columns = Mapping[str, Vector]


def columns_of(run: Run, site: str | None = None) -> Columns:
    """The columns of a run's layer, with passes as the epoch and mean losses as the loss where recorded."""
    columns = run.columns(site or run.main)
    epochs = passes_of(columns["step"], columns["passes"], columns["epoch"])
    if epochs.size and np.isnan(epochs).all() and columns["drift_reason"][-1] == NOTHING_CAME_BACK:
        epochs = columns["step"] / (columns["step"][-1] + 1)  # the first pass still runs
    means = columns["loss_mean"]
    losses = np.where(np.isfinite(means), means, columns["loss"])
    return {**columns, "epoch": epochs, "loss": losses}


def aligned(parts: dict[str, Columns], left_out: dict[str, str], align: Align) -> tuple[dict[str, Columns], float]:
    """The readings up to the last point that all runs reach, and that point.

    Raises:
        InputError: fewer than two runs compare.
    """
    leave_out(parts, left_out, {name: why for name, part in parts.items() if (why := _fault(part, align))})
    axis = ALIGNMENTS[align]
    reached = {name: float(np.nanmax(part[axis])) for name, part in parts.items()}
    usual = median_low(reached.values())
    short = {
        name: f"short: it ends at {position(align, end)}, where half of the runs reach {position(align, usual)}"
        for name, end in reached.items()
        if end < SHORT * usual
    }
    leave_out(parts, left_out, short)
    while True:
        at = min(reached[name] for name in parts)
        kept = {name: _until(part, axis, at) for name, part in parts.items()}
        few = {
            name: f"short: {part['step'].size} readings up to {position(align, at)}, fewer than {MIN_READINGS}"
            for name, part in kept.items()
            if part["step"].size < MIN_READINGS
        }
        if not few:
            return kept, at
        leave_out(parts, left_out, few)


def leave_out(parts: dict[str, Columns], left_out: dict[str, str], reasons: Mapping[str, str]) -> None:
    """Leave out runs, and raise where fewer than two remain."""
    left_out.update(reasons)
    for name in reasons:
        del parts[name]
    if len(parts) < 2:
        whys = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise InputError(f"expected at least two runs that compare, found {len(parts)} ({whys})")


def keep_equal(parts: dict[str, Columns], left_out: dict[str, str], name: str) -> None:
    """Leave out runs whose layer size differs from the most common."""
    sizes = {run: size for run, part in parts.items() if math.isfinite(size := first(part[name]))}
    usual = Counter(sizes.values()).most_common(1)[0][0] if sizes else math.nan
    leave_out(
        parts,
        left_out,
        {run: f"{name} = {size:.0f}, others have {usual:.0f}" for run, size in sizes.items() if size != usual},
    )


def position(align: Align, at: float) -> str:
    """A point of the alignment axis, in words.

    Example:
        >>> position("step", 1200.0), position("tokens", 5e6), position("epoch", 1.5)
        ('step 1,200', '5,000,000 tokens', 'epoch 1.5')
    """
    if align == "epoch":
        return f"epoch {at:.4g}"
    return f"step {at:,.0f}" if align == "step" else f"{at:,.0f} tokens"


def first(values: Vector) -> float:
    """The first defined value, NaN where there is none."""
    known = values[np.isfinite(values)]
    return float(known[0]) if known.size else math.nan


def _fault(columns: Columns, align: Align) -> str | None:
    """The reason why a run does not compare, if any."""
    if columns["step"].size < MIN_READINGS:
        return f"short: {columns['step'].size} readings of the layer, fewer than {MIN_READINGS}"
    if columns["nonfinite"][-1] > 0:
        return f"diverged: NaN or infinite values at step {columns['step'][-1]:,}"
    known = np.flatnonzero(np.isfinite(columns["loss"]))
    if known.size and columns["loss"].size - 1 - known[-1] >= MIN_READINGS:
        return f"diverged: no finite loss after step {columns['step'][known[-1]]:,}"
    if not np.isfinite(columns[ALIGNMENTS[align]]).any():
        return f"no {ALIGNMENTS[align]} recorded to align it on"
    return None


def _until(columns: Columns, axis: str, last: float) -> Columns:
    kept = columns[axis] <= last
    return {name: values[kept] for name, values in columns.items()}
