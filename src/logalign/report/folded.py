"""Fold a detector over a recorded run, and keep its outcome and signals at every reading, for the signal curves.

A reading costs the detector about 0.6 ms. It reads all of up to 10,000 readings, with the verdict of `logalign
diagnose`. For a longer run it reads 2,000 evenly chosen ones, each with the mean loss since the one before. The verdict
may then differ from the one over all readings, and the page says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from logalign.diagnosis.baseline import Baseline
from logalign.diagnosis.detector import Detector
from logalign.diagnosis.outcome import Outcome
from logalign.diagnosis.verdict import Verdict, no_verdict
from logalign.errors import InputError
from logalign.runs.columns import Columns
from logalign.runs.reading import ENERGY_NAMES, FORMS, INTEGER_FIELDS, REVISIT_FIELDS, TEXT_FIELDS, Reading

ALL_UP_TO = 10_000
THINNED_TO = 2_000
RECORDED = 2_000

Vector = np.ndarray[Any, Any]

SIGNALS = (
    "revisited_share",
    "deviation",
    "band",
    "strain",
    "spread",
    "loss_below",
)
"""Names in the decline logic's evidence."""
GROKKING_SIGNALS = ("k_ratio",)
LOSS_SIGNALS = ("memorized_share_low",)
"""Names for logs without LAR."""
OF_REVISITS = tuple(name for name in REVISIT_FIELDS if name not in TEXT_FIELDS)
HELD_OUT = "val_loss"
NUMBERS = ("tokens_seen", "n", "m", "epoch", "loss", "loss_mean", "lr", *FORMS)


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A detector's outcome and signals over a run.

    Attributes:
        verdict: The verdict after the last reading.
        folded: Readings that the detector read.
        of: Readings in the run.
        rows: Rows at which outcome and signals were recorded.
        outcomes: The outcome at each of these rows.
        signals: By name, the value at each of these rows, NaN where unknown.
        baseline: The reference of the run, or None.
    """

    verdict: Verdict
    folded: int
    of: int
    rows: Vector
    outcomes: list[Outcome]
    signals: Mapping[str, Vector] = field(repr=False)
    baseline: Baseline | None = field(repr=False)

    @property
    def thinned(self) -> bool:
        """True where the detector read only some of the readings."""
        return self.folded < self.of


def fold(
    columns: Columns,
    site: str,
    *,
    baseline: Baseline | None = None,
    all_up_to: int = ALL_UP_TO,
    thinned_to: int = THINNED_TO,
    recorded: int = RECORDED,
) -> Folded:
    """Fold a detector over the readings of one layer.

    Args:
        columns: Columns from `site_columns`.
        site: The layer.
        baseline: The decline logic's reference.
        all_up_to: The most readings that are all read.
        thinned_to: Number of readings chosen from a longer run.
        recorded: About how many evenly chosen readings are recorded. Changes of the outcome always are.

    Raises:
        InputError: the baseline has another shape, or compares along tokens that were not recorded.
    """
    of = len(columns["step"])
    rows = np.arange(of) if of <= all_up_to else np.unique(np.linspace(0, of - 1, thinned_to).round().astype(np.int64))
    detector = Detector(baseline=baseline)
    stride = max(1, -(-len(rows) // recorded))
    kept: list[int] = []
    outcomes: list[Outcome] = []
    taken: list[list[float]] = []
    verdict = detector.verdict
    names = (*SIGNALS, *GROKKING_SIGNALS, *LOSS_SIGNALS)
    for i, reading in enumerate(_readings(columns, site, rows)):
        before = verdict.outcome
        try:
            verdict = detector.update(reading)
        except InputError as error:
            if baseline is not None:
                raise
            verdict = no_verdict(reading.step, error)
            kept.append(int(rows[i]))
            outcomes.append(verdict.outcome)
            taken.append([np.nan] * len(names))
            break
        if i % stride == 0 or i == len(rows) - 1 or verdict.outcome != before:
            kept.append(int(rows[i]))
            outcomes.append(verdict.outcome)
            without_lar = {} if detector.without_lar is None else detector.without_lar.verdict.evidence
            taken.append(
                [_number(detector.decline.verdict.evidence.get(name)) for name in SIGNALS]
                + [_number(detector.grokking.verdict.evidence.get(name)) for name in GROKKING_SIGNALS]
                + [_number(without_lar.get(name)) for name in LOSS_SIGNALS]
            )
    table = np.array(taken, dtype=np.float64).reshape(len(taken), len(names))
    return Folded(
        verdict=verdict,
        folded=len(rows),
        of=of,
        rows=np.array(kept, dtype=np.int64),
        outcomes=outcomes,
        signals={name: table[:, i] for i, name in enumerate(names)},
        baseline=detector.decline.baseline,
    )


def _readings(columns: Columns, site: str, rows: Vector) -> list[Reading]:
    """Build the readings at these rows, with the fields a detector uses."""
    values = {name: columns[name][rows] for name in NUMBERS if name in columns}
    values |= {name: columns[name][rows] for name in OF_REVISITS if name in columns}
    if len(rows) < len(columns["step"]):
        for name in ("loss_mean", "loss"):
            if name in columns and np.isfinite(columns[name]).any():
                values["loss_mean"] = _means_between(columns[name], rows)
                break
    lists: dict[str, list[Any]] = {}
    for name, column in values.items():
        numbers = column.tolist()
        lists[name] = [
            None if value != value else (int(value) if name in INTEGER_FIELDS else value) for value in numbers
        ]
    energies = {name: columns[f"energy_{name}"][rows] for name in ENERGY_NAMES if f"energy_{name}" in columns}
    weights = energies.get("weight", np.full(len(rows), np.nan)).tolist()
    if "drift_reason" in columns:
        lists["drift_reason"] = [reason or None for reason in columns["drift_reason"][rows].tolist()]
    lars = lists.pop("lar")
    lists["reason"] = [reason or None for reason in columns["reason"][rows].tolist()]
    held_out = columns.get(HELD_OUT, np.full(len(columns["step"]), np.nan))[rows].tolist()
    return [
        Reading(
            step=step,
            site=site,
            lar=lars[i],
            extra={} if held_out[i] != held_out[i] else {HELD_OUT: held_out[i]},
            energies=None if weights[i] != weights[i] else {"weight": weights[i], "input": None, "output": None},
            **{name: column[i] for name, column in lists.items()},
        )
        for i, step in enumerate(columns["step"][rows].tolist())
    ]


def _means_between(values: Vector, rows: Vector) -> Vector:
    """Average over the rows after the one before, up to and including each, NaN where no value is known."""
    known = np.isfinite(values)
    totals, counts = np.cumsum(np.where(known, values, 0.0)), np.cumsum(known)
    total, count = np.diff(totals[rows], prepend=0.0), np.diff(counts[rows], prepend=0)
    means: Vector = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return means


def _number(value: float | int | None) -> float:
    return np.nan if value is None else float(value)
