"""W&B: every reading over `logalign/step`, the verdict in the run's summary.

W&B keeps rows: one value for each name, at a step of its own that must not go back. A row of our own would advance that
step, and W&B might then drop the user's next `run.log(..., step=...)`. A reading goes into the open row instead, which
the user's own `run.log` completes, and is drawn over its own step. The price: where the user logs less often than
readings come, the row holds only the last of them. Users who log nothing else can choose rows of our own.
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
"""Replaced readings before the user gets a warning. The next reading may replace the first one: where
`run.log(..., step=...)` follows `step()`, the first row is still open at the second reading."""
SPARSE = (
    "readings come more often than W&B's run.log() is called, and each of its rows takes one: the last before the call "
    "is kept. Where you log nothing else, or log without step=, "
    "watch(trackers=logalign.trackers.wandb.WandbTracker(run, own_rows=True)) keeps all"
)


def open_tracker(folder: Path | None) -> WandbTracker:
    """Return a tracker that logs to this process's open run.

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
    """Return a tracker that logs to a W&B run, or None for any other object."""
    runs = sys.modules.get("wandb.sdk.wandb_run")
    return WandbTracker(tracker) if runs is not None and isinstance(tracker, runs.Run) else None


class WandbTracker:
    """Logs to the user's W&B run, which stays open.

    Args:
        run: The result of `wandb.init()`.
        own_rows: Give every reading a row of its own, which advances W&B's step by one. For runs without other logs,
            or with logs only without `step=`.
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
        """Put one step's numbers into the open row."""
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
        """Do nothing: the run is the user's, and finishing it completes its last row."""
