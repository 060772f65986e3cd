"""History: keeps a series of any length in constant memory.

Method: a history of fixed size halves its resolution whenever it is full. The alternative, exponential smoothing, needs
less memory but cannot compare the last part of a run with an earlier one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from logalign.diagnosis.robust import Vector
from logalign.errors import InputError


class History:
    """A series of any length in constant memory, which merges neighbors to half the resolution when full.

    Below `capacity` readings it holds them unchanged. Then every two neighbors become one bin with their mean, and each
    new bin holds twice as many readings. This repeats whenever the history is full. It then holds between half of
    `capacity` and `capacity` bins of equal size over the whole past. Its content depends on the readings alone, not on
    when it was read or saved.

    Args:
        names: The values at each x. Means skip NaN, which marks unknown values.
        capacity: Even number of bins.

    Raises:
        InputError: the capacity cannot be halved.

    Example:
        >>> history = History(capacity=4)
        >>> for step in range(6):
        ...     _ = history.append(step, 10.0 * step)
        >>> history.x, history.y, history.stride
        (array([0.5, 2.5, 4.5]), array([ 5., 25., 45.]), 2)
    """

    def __init__(self, names: Sequence[str] = ("y",), *, capacity: int = 128) -> None:
        if capacity < 2 or capacity % 2:
            raise InputError(f"capacity: expected an even number from 2 on, found {capacity}")
        self.names = tuple(names)
        self.capacity = capacity
        self.stride = 1
        self.size = 0
        self._bins = np.full((capacity, 2 + len(self.names)), np.nan)  # mean x, last x, means of the values
        self._begin()

    @property
    def last_x(self) -> float | None:
        """The x of the last reading, including those in an open bin."""
        if self._filled:
            return self._last_x
        return float(self._bins[self.size - 1, 1]) if self.size else None

    @property
    def x(self) -> Vector:
        """The mean x of each full bin."""
        return self._bins[: self.size, 0]

    @property
    def y(self) -> Vector:
        """The first column."""
        return self.column(self.names[0])

    def column(self, name: str) -> Vector:
        """The mean of one value in each full bin, NaN where unknown."""
        return self._bins[: self.size, 2 + self.names.index(name)]

    def rows(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The full bins as rows: the last x, then the mean of each value."""
        return self._bins[: self.size, 1:].copy()

    def before(self, x: float) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The full bins whose last x is below this one, as rows: the mean x, then the mean of each value."""
        count = int(np.searchsorted(self._bins[: self.size, 1], x, side="left"))
        return np.delete(self._bins[:count], 1, axis=1)

    def append(self, x: float, *values: float) -> bool:
        """Add one reading, and return True where it fills a bin, so that `x` and `y` change.

        Raises:
            InputError: x is not above the last one. Call `truncate()` first after a resume.
        """
        last = self.last_x
        if last is not None and x <= last:
            raise InputError(f"x: expected more than the last one, {last:g}, found {x:g}")
        self._last_x = float(x)
        self._filled += 1
        for i, value in enumerate((x, *values)):
            if not math.isnan(value):
                self._counts[i] += 1
                self._means[i] += (float(value) - self._means[i]) / self._counts[i]
        if self._filled < self.stride:
            return False
        means = [mean if count else math.nan for mean, count in zip(self._means, self._counts, strict=True)]
        self._bins[self.size] = [means[0], self._last_x, *means[1:]]
        self.size += 1
        self._begin()
        if self.size == self.capacity:
            self._halve()
        return True

    def truncate(self, x: float) -> None:
        """Forget all readings from x on, and all earlier readings that share a bin with them."""
        if self._filled and self._last_x >= x:
            self._begin()
        self.size = int(np.searchsorted(self._bins[: self.size, 1], x, side="left"))

    def state(self) -> dict[str, Any]:
        """The whole state, as lists and numbers for strict JSON."""
        return {
            "names": list(self.names),
            "capacity": self.capacity,
            "stride": self.stride,
            "bins": [_nulls(row) for row in self._bins[: self.size].tolist()],
            "open": [self._filled, self._last_x, list(self._means), list(self._counts)],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> History:
        """The history that `state()` described."""
        history = cls(state["names"], capacity=state["capacity"])
        history.stride = state["stride"]
        history.size = len(state["bins"])
        for i, row in enumerate(state["bins"]):
            history._bins[i] = _nans(row)
        history._filled, history._last_x, means, counts = state["open"]
        history._means, history._counts = list(means), list(counts)
        return history

    def _begin(self) -> None:
        self._filled = 0
        self._last_x = 0.0
        self._means = [0.0] * (1 + len(self.names))
        self._counts = [0] * (1 + len(self.names))

    def _halve(self) -> None:
        earlier, later = self._bins[0::2], self._bins[1::2]
        merged = np.where(np.isnan(earlier), later, np.where(np.isnan(later), earlier, earlier / 2 + later / 2))
        merged[:, 1] = later[:, 1]
        self.size = self.capacity // 2
        self._bins[: self.size] = merged
        self.stride *= 2


def _nulls(row: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in row]


def _nans(row: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in row]
