"""The curves of a growing run: one column a number, and how to fit them to a screen of some width."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from logalign.runs.reading import Reading

Vector = np.ndarray[Any, Any]

CURVES = ("lar", "lar_centered", "k", "k_centered", "loss", "held_out", "drift")
PACE = 20
"""Last readings that give the pace."""


class DrawnHistory:
    """Numbers by step, where a step that is not above the one before means that training resumed there.

    Args:
        names: The columns beside `step` and `time`.

    Example:
        >>> history = DrawnHistory(["lar"])
        >>> for step, lar in [(0, 0.5), (10, 0.6), (20, 0.7), (10, 0.9)]:
        ...     history.add(step, None, {"lar": lar})
        >>> history.column("step").tolist(), history.column("lar").tolist()
        ([0.0, 10.0], [0.5, 0.9])
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._columns = {name: array("d") for name in ("step", "time", *names)}

    def __len__(self) -> int:
        return len(self._columns["step"])

    def add(self, step: int, time: float | None, values: Mapping[str, float | None]) -> None:
        """Add one reading's numbers, with NaN for None and for missing names."""
        steps = self._columns["step"]
        if steps and step <= steps[-1]:
            keep = int(np.searchsorted(np.array(steps), step))
            for column in self._columns.values():
                del column[keep:]
        for name, column in self._columns.items():
            value = step if name == "step" else time if name == "time" else values.get(name)
            column.append(math.nan if value is None else value)

    def column(self, name: str, last: int | None = None) -> Vector:
        """Return one column, or only its `last` rows."""
        column = self._columns[name]
        return np.array(column[-last:] if last else column, dtype=np.float64)

    def last(self, name: str) -> float | None:
        """Return the last known value among the readings that give the pace."""
        known = [value for value in self._columns[name][-PACE:] if value == value]
        return known[-1] if known else None

    def pace(self) -> tuple[float | None, float | None]:
        """Return seconds a reading (the median of the last ones) and steps a second, None where not recorded."""
        times, steps = self.column("time", PACE), self.column("step", PACE)
        known = np.isfinite(times)
        times, steps = times[known], steps[known]
        if times.size < 2 or times[-1] <= times[0]:
            return None, None
        return float(np.median(np.diff(times))), float((steps[-1] - steps[0]) / (times[-1] - times[0]))


def curves_of(reading: Reading) -> dict[str, float | None]:
    """Select the numbers of a reading to draw."""
    n, centered = reading.n, reading.lar_centered
    k = reading.effective_dim
    return {
        "lar": reading.lar,
        "lar_centered": centered,
        "k": _dimension(n, reading.lar) if k is None else k,
        "k_centered": _dimension(n, centered),
        "loss": reading.loss if reading.loss_mean is None else reading.loss_mean,
        "held_out": reading.extra.get("val_loss"),
        "drift": reading.drift,
    }


def _dimension(n: int | None, lar: float | None) -> float | None:
    """Compute k = n^(2 (1 - LAR))."""
    if n is None or lar is None or n < 2:
        return None
    power = 2 * (1 - lar) * math.log(n)
    return math.exp(power) if abs(power) < 700 else None
