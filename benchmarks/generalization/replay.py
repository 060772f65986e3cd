"""Replay: what the library makes today of the visits of samples that a run has kept, without training anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.generalization.recorder import REVISITS
from logalign.samples.record import SampleRecord


def replayed(columns: dict[str, NDArray[np.float64]], visits: Path) -> dict[str, NDArray[np.float64]]:
    """The columns of revisits at every reading of a run; those that it has where it kept no visits."""
    if not visits.exists():
        return {name: columns[name] for name in REVISITS if name in columns}
    with np.load(visits) as kept:
        steps, samples, losses = kept["step"], kept["sample"], kept["loss"].astype(np.float64)
    record = SampleRecord()
    found: dict[str, list[float]] = {name: [] for name in REVISITS}
    at = 0
    for step, epoch in zip(columns["step"], columns["epoch"], strict=True):
        end = int(np.searchsorted(steps, step, side="right"))
        for each in np.unique(steps[at:end]):
            first, last = np.searchsorted(steps, each, side="left"), np.searchsorted(steps, each, side="right")
            record.add(float(each), samples[first:last], losses[first:last])
        at = end
        fields = record.fields(int(step), float(epoch))
        for name, values in found.items():
            value = fields[name]
            values.append(np.nan if value is None else float(value))
    return {name: np.array(values, dtype=np.float64) for name, values in found.items()}
