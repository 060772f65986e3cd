"""Series: turns incoming readings into clean columns by rule, and keeps them in constant memory.

The rules give all contents of a log a defined meaning:

- The series skips and counts a reading without a defined LAR or with an impossible one (above 1, or below what a
  float64 overlap allows).
- A step that was there already, or an earlier one, means that training resumed there. The series forgets that step and
  all later ones. So the last version replaces a duplicate.
- Gaps stay gaps. A missing field, or a number beyond 1e100, is unknown at that reading.
- A reading of another layer or of another shape is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from logalign.diagnosis.epochs import Passes, completed_passes, passes
from logalign.diagnosis.history import History
from logalign.diagnosis.robust import Vector
from logalign.errors import InputError
from logalign.runs.reading import FORMS, Reading
from logalign.samples.passes import GivenEpochs

FORM_NAMES = {
    "lar": "plain LAR",
    "lar_vocab_centered": "vocabulary-centered LAR",
    "lar_token_centered": "token-centered LAR",
    "lar_centered": "centered LAR",
}
COLUMNS = (*FORMS, "loss", "lr", "epoch", "completed", "tokens_seen", "drift", "drift_error", "gain", "gain_error")
"""Kept columns of a reading. `loss` is the mean since the reading before, where recorded. `epoch` is the passes over
the data so far. `completed` is the number of them that its samples have completed. `drift`, `gain` and their errors
come from returning samples."""
STATE_VERSION = 1
POSSIBLE_LAR = (-2000.0, 1.01)
"""LAR is at most 1, up to rounding. An overlap above the smallest float64 keeps it above 1 - 1075 / log2(n)."""
LARGEST = 1e100


class Series:
    """Keeps the last readings exactly and the whole past at a coarser resolution.

    Args:
        recent: Number of last readings to keep.
        capacity: Bins of the history of the whole past.
        needs_lar: True to skip a reading without a defined LAR.

    Attributes:
        site: Layer of the readings, None before the first.
        m: Its fan-out, where recorded.
        n: Its fan-in, where recorded.
        taken: Accepted readings.
        skipped: Skipped readings, with an undefined or impossible LAR.
        resumes: Number of steps not above the one before.
        history: The whole past: `COLUMNS` by step.
        filled: True if the last reading filled a bin of the history.
        first_loss: Step and value of the first training loss, or None.
    """

    def __init__(self, *, recent: int = 64, capacity: int = 128, needs_lar: bool = True) -> None:
        self.needs_lar = needs_lar
        self.site: str | None = None
        self.m: int | None = None
        self.n: int | None = None
        self.taken = self.skipped = self.resumes = 0
        self.history = History(COLUMNS, capacity=capacity)
        self.filled = False
        self.first_loss: tuple[int, float] | None = None
        self._rows = np.full((recent, 1 + len(COLUMNS)), np.nan)  # step and COLUMNS, the latest last
        self._size = 0
        self._epochs = GivenEpochs()
        # Each holds the number of readings and resumes that it belongs to.
        self._passes: tuple[tuple[int, int], Passes | None] | None = None
        self._past: tuple[tuple[int, int], np.ndarray[Any, np.dtype[np.float64]]] | None = None

    @property
    def capacity(self) -> int:
        """The number of last readings that are kept exactly."""
        return len(self._rows)

    @property
    def last_step(self) -> int | None:
        """The step of the last accepted reading."""
        return int(self._rows[-1, 0]) if self._size else None

    @property
    def steps(self) -> Vector:
        """The steps of the last readings."""
        return self._rows[len(self._rows) - self._size :, 0]

    def recent(self, name: str, count: int | None = None) -> Vector:
        """Return one column of the last readings, at most `count`, NaN where unknown."""
        first = len(self._rows) - min(self._size, self._size if count is None else count)
        return self._rows[first:, 1 + COLUMNS.index(name)]

    def past(self, *names: str) -> tuple[Vector, ...]:
        """Return steps and columns of the whole past: the last readings exactly, earlier ones in coarser bins."""
        key = (self.taken, self.resumes)
        if self._past is None or self._past[0] != key:
            own = self._rows[len(self._rows) - self._size :]
            self._past = key, np.concatenate([self.history.before(self.steps[0] if self._size else math.inf), own])
        whole = self._past[1]
        return whole[:, 0], *(whole[:, 1 + COLUMNS.index(name)] for name in names)

    @property
    def passes(self) -> Passes | None:
        """Training loss inside the last passes and between them, computed once a reading."""
        key = (self.taken, self.resumes)
        if self._passes is None or self._passes[0] != key:
            self._passes = key, passes(*self.past("epoch", "completed", "loss"))
        return self._passes[1]

    def last(self, name: str) -> float | None:
        """Return one number of the last reading, or None if unknown."""
        value = float(self._rows[-1, 1 + COLUMNS.index(name)]) if self._size else math.nan
        return None if math.isnan(value) else value

    def check(self, reading: Reading) -> None:
        """Reject a reading of another series.

        Raises:
            InputError: if it is of another layer, or of another shape of layer.
        """
        if self.site is not None and reading.site != self.site:
            raise InputError(
                f"step {reading.step}: expected a reading of {self.site!r}, found one of {reading.site!r}; "
                "give each layer a detector of its own"
            )
        for name, known, found in (("m", self.m, reading.m), ("n", self.n, reading.n)):
            if known is not None and found is not None and known != found:
                raise InputError(
                    f"step {reading.step}: expected readings of one layer, with {name} = {known}, "
                    f"found {name} = {found}; diagnose runs of different models one by one"
                )

    def goes_back(self, reading: Reading) -> bool:
        """Return whether training resumed: the step is not above the last reading's."""
        return self._size > 0 and reading.step <= self._rows[-1, 0]

    def rewind(self, step: int) -> None:
        """Forget this step and later ones, and restore older readings at the resolution of the history."""
        self.resumes += 1
        if self.first_loss is not None and self.first_loss[0] >= step:
            self.first_loss = None
        self.history.truncate(step)
        kept = self._rows[len(self._rows) - self._size :][self.steps < step]
        older = self.history.rows()
        if len(kept):
            older = older[older[:, 0] < kept[0, 0]]
        kept = np.concatenate([older, kept])[-len(self._rows) :]
        self._size = len(kept)
        self._rows[len(self._rows) - self._size :] = kept
        self._epochs.resume(self.last("epoch") or 0.0)

    def add(self, reading: Reading) -> bool:
        """Take a checked reading with a step above the last, or return False to skip it."""
        self.site = reading.site
        if reading.m is not None and reading.m > 0:
            self.m = reading.m
        if reading.n is not None and reading.n > 0:
            self.n = reading.n
        if self.needs_lar and (reading.lar is None or not _possible(reading.lar)):
            self.skipped += 1
            return False
        row = self._row(reading)
        self._rows[:-1] = self._rows[1:]
        self._rows[-1] = row
        self._size = min(self._size + 1, len(self._rows))
        if self.first_loss is None and math.isfinite(loss := row[1 + COLUMNS.index("loss")]):
            self.first_loss = (reading.step, loss)
        self.filled = self.history.append(*row)
        self.taken += 1
        return True

    def _row(self, reading: Reading) -> list[float]:
        """Return step and `COLUMNS` of a reading, NaN where unknown."""
        values = {name: known(reading, name) for name in COLUMNS if name != "completed"}
        if reading.passes is None:
            values["epoch"] = self._epochs.passes(reading.step, values["epoch"])
        values["completed"] = self._completed(reading, values["epoch"])
        row = [float(reading.step)]
        for name in COLUMNS:
            value = values[name]
            row.append(math.nan if value is None else value)
        return row

    def _completed(self, reading: Reading, epoch: float | None) -> float | None:
        """Average completed passes over the steps of the reading's loss."""
        before, step = self.last("epoch"), self.last_step
        if epoch is None:
            return None
        if reading.loss_mean is None or before is None or step is None or epoch < before:
            return float(math.floor(epoch))
        a_step = (epoch - before) / (reading.step - step)
        return completed_passes(before + a_step, epoch + a_step)

    def state(self) -> dict[str, Any]:
        """Return the state as lists and numbers for strict JSON."""
        rows = self._rows[len(self._rows) - self._size :].tolist()
        return {
            "needs_lar": self.needs_lar,
            "site": self.site,
            "m": self.m,
            "n": self.n,
            "taken": self.taken,
            "skipped": self.skipped,
            "resumes": self.resumes,
            "recent": len(self._rows),
            "rows": [[None if math.isnan(value) else value for value in row] for row in rows],
            "history": self.history.state(),
            "epochs": self._epochs.state(),
            "first_loss": None if self.first_loss is None else list(self.first_loss),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Series:
        """Restore a series from `state()`."""
        series = cls(recent=state["recent"], needs_lar=state.get("needs_lar", True))
        for name in ("site", "m", "n", "taken", "skipped", "resumes"):
            setattr(series, name, state[name])
        series._size = len(state["rows"])
        for i, row in enumerate(reversed(state["rows"]), 1):
            series._rows[-i] = [math.nan if value is None else value for value in row]
        series.history = History.from_state(state["history"])
        if "epochs" in state:  # checkpoints from before 0.2 have none
            series._epochs = GivenEpochs.from_state(state["epochs"])
        first = state.get("first_loss")
        series.first_loss = None if first is None else (int(first[0]), float(first[1]))
        return series


def known(reading: Reading, name: str) -> float | None:
    """Return one of `COLUMNS` except `completed`, None if missing, beyond 1e100 or an impossible LAR."""
    value = getattr(reading, name)
    if name == "epoch" and reading.passes is not None:
        value = reading.passes
    if name == "loss" and reading.loss_mean is not None:
        value = reading.loss_mean
    if value is None or not abs(value) <= LARGEST or (name in FORMS and not _possible(value)):
        return None
    return float(value)


def _possible(lar: float) -> bool:
    return POSSIBLE_LAR[0] <= lar <= POSSIBLE_LAR[1]
