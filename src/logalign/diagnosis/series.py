"""Series: readings as they come, turned into clean columns by rule and kept in constant memory.

The rules, so that whatever a log holds has a defined meaning:

- A reading without a defined LAR is passed over and counted; so is one whose LAR cannot be (above 1, or below what a
  float64 overlap allows).
- A step that was there already, or an earlier one, means that training was resumed there: what stood at that step and
  beyond is forgotten. A duplicate is thereby replaced by its last version.
- Gaps stay gaps, and a field that is missing is unknown at that reading; so is a number beyond 1e100.
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
"""What is kept of a reading: `loss` is the mean since the reading before, where that was recorded, `epoch` the passes
over the data so far, `completed` how many of them its samples had been through; `drift`, `gain` and their errors are
those of the samples that come back."""
STATE_VERSION = 1
POSSIBLE_LAR = (-2000.0, 1.01)
"""LAR is at most 1 but for rounding; an overlap above the smallest float64 keeps it above 1 - 1075 / log2(n)."""
LARGEST = 1e100


class Series:
    """The last readings as they are, and the whole past at a coarser resolution.

    Args:
        recent: How many of the last readings to keep.
        capacity: Bins of the history of the whole past.
        needs_lar: Whether a reading without a defined LAR is passed over.

    Attributes:
        site: The layer that the readings are of; None before the first.
        m: Its fan-out, where recorded.
        n: Its fan-in, where recorded.
        taken: Readings taken in.
        skipped: Readings passed over, for their LAR is undefined or cannot be.
        resumes: How often a step was not above the one before.
        history: The whole past: `COLUMNS` by step.
        filled: Whether the last reading filled a bin of the history.
        first_loss: The first training loss, and its step; None before it.
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
        # Both with the number of readings and resumes that they are of.
        self._passes: tuple[tuple[int, int], Passes | None] | None = None
        self._past: tuple[tuple[int, int], np.ndarray[Any, np.dtype[np.float64]]] | None = None

    @property
    def capacity(self) -> int:
        """How many of the last readings are kept as they are."""
        return len(self._rows)

    @property
    def last_step(self) -> int | None:
        """The step of the last reading that was taken in."""
        return int(self._rows[-1, 0]) if self._size else None

    @property
    def steps(self) -> Vector:
        """The steps of the last readings."""
        return self._rows[len(self._rows) - self._size :, 0]

    def recent(self, name: str, count: int | None = None) -> Vector:
        """One column of the last readings, at most `count` of them; NaN where it is not known."""
        first = len(self._rows) - min(self._size, self._size if count is None else count)
        return self._rows[first:, 1 + COLUMNS.index(name)]

    def past(self, *names: str) -> tuple[Vector, ...]:
        """Steps and columns of the whole past: the last readings as they are, what was before them in coarser bins."""
        key = (self.taken, self.resumes)
        if self._past is None or self._past[0] != key:
            own = self._rows[len(self._rows) - self._size :]
            self._past = key, np.concatenate([self.history.before(self.steps[0] if self._size else math.inf), own])
        whole = self._past[1]
        return whole[:, 0], *(whole[:, 1 + COLUMNS.index(name)] for name in names)

    @property
    def passes(self) -> Passes | None:
        """What the training loss does inside the last passes and between them; found once a reading."""
        key = (self.taken, self.resumes)
        if self._passes is None or self._passes[0] != key:
            self._passes = key, passes(*self.past("epoch", "completed", "loss"))
        return self._passes[1]

    def last(self, name: str) -> float | None:
        """One number of the last reading; None where it is not known."""
        value = float(self._rows[-1, 1 + COLUMNS.index(name)]) if self._size else math.nan
        return None if math.isnan(value) else value

    def check(self, reading: Reading) -> None:
        """Refuse a reading that is not of this series.

        Raises:
            InputError: it is of another layer, or of a layer of another shape.
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
        """Whether training was resumed: the step is that of the last reading or an earlier one."""
        return self._size > 0 and reading.step <= self._rows[-1, 0]

    def rewind(self, step: int) -> None:
        """Forget what is at this step and beyond; older readings come back from the history, as fine as it has them."""
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
        """Take a checked reading in, whose step is above the last; False where it was passed over."""
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
        """Step and `COLUMNS` of a reading; NaN where a number is not known."""
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
        """Mean completed passes over the steps that the reading's loss is of."""
        before, step = self.last("epoch"), self.last_step
        if epoch is None:
            return None
        if reading.loss_mean is None or before is None or step is None or epoch < before:
            return float(math.floor(epoch))
        a_step = (epoch - before) / (reading.step - step)
        return completed_passes(before + a_step, epoch + a_step)

    def state(self) -> dict[str, Any]:
        """All of it, as lists and numbers that strict JSON can hold."""
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
        """The series that `state()` described."""
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
    """One of `COLUMNS` but `completed`; None where it is missing, beyond 1e100, or a LAR that cannot be."""
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
