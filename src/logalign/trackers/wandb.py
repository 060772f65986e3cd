"""W&B: every reading over `logalign/step`, the verdict in the run's summary.

W&B keeps rows: a value per name, at a step of its own that must not go back. A row of our own would move that step on,
and the user's next `run.log(..., step=...)` might then be dropped. So a reading goes into the row that is under way,
which the user's own `run.log` completes, and is drawn over its own step. The price: where the user logs less often than
readings come, only the last of them is in the row. Whoever logs nothing else can have rows of our own.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logalign.common.extras import load
from logalign.diagnosis.verdict import Verdict
from logalign.errors import InputError
from logalign.trackers.metrics import PREFIX, STEP, VERDICT_TEXT

REPLACED = 2
"""Readings that are replaced by the next one before the user is told. The first may be: where `run.log(..., step=...)`
follows `step()`, the first row is still under way at the second reading."""
SPARSE = (
    "readings come more often than W&B's run.log() is called, and each of its rows takes one: the last before the call "
    "is kept. Where you log nothing else, or log without step=, "
    "watch(trackers=logalign.trackers.wandb.WandbTracker(run, own_rows=True)) keeps all"
)


def open_tracker(folder: Path | None) -> WandbTracker:
    """A tracker that logs to the run under way in this process.

    Raises:
        MissingExtraError: wandb is not installed.
        InputError: there is no run.
    """
    run = load("wandb", extra="wandb", purpose='trackers="wandb"').run
    if run is None:
        raise InputError(
            'trackers="wandb": expected a W&B run in this process, found none; '
            "call wandb.init() before, or pass the run"
        )
    return WandbTracker(run)


def wrap(tracker: object) -> WandbTracker | None:
    """A tracker that logs to a W&B run; None for an object of another kind."""
    runs = sys.modules.get("wandb.sdk.wandb_run")
    return WandbTracker(tracker) if runs is not None and isinstance(tracker, runs.Run) else None


class WandbTracker:
    """Logs to a W&B run of the user's, which stays open.

    Args:
        run: What `wandb.init()` returned.
        own_rows: Give every reading a row of its own, which moves W&B's step on by one. For runs to which nothing else
            is logged, or only without `step=`.
    """

    def __init__(self, run: Any, *, own_rows: bool = False) -> None:
        self._run = run
        self._own_rows = own_rows
        self._row: int | None = None
        self._replaced = 0
        self.notice: str | None = None
        run.define_metric(STEP, hidden=True)
        run.define_metric(f"{PREFIX}*", step_metric=STEP)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Put one step's numbers into the row under way."""
        self._run.log({**values, STEP: step}, commit=self._own_rows)
        if self._own_rows or self._run.disabled:
            return
        row = self._run.step
        self._replaced += row == self._row
        self._row = row
        if self._replaced >= REPLACED:
            self.notice = SPARSE

    def tell(self, verdict: Verdict) -> None:
        """Put the verdict into the run's summary."""
        self._run.summary[VERDICT_TEXT] = str(verdict)

    def close(self) -> None:
        """Nothing: the run is the user's, and finishing it completes its last row."""
