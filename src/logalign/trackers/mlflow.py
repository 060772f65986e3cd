"""MLflow: every reading as metrics of a run, the verdict as a tag.

The tracker sends one batch at a time and waits for it, so that a killed process loses nothing. MLflow limits the
characters of names: any other than letters, digits, `_ - . : /` and spaces becomes `_`.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logalign.common.extras import load
from logalign.diagnosis.verdict import Verdict
from logalign.errors import InputError
from logalign.trackers.metrics import VERDICT_TEXT

REFUSED = re.compile(r"[^\w\-. :/]")
BATCH = 1000
"""Most metrics that MLflow takes at once."""
TAG = 5000
"""Maximum length of a tag that every release takes."""


def open_tracker(folder: Path | None) -> MlflowTracker:
    """Return a tracker that logs to the active run.

    Raises:
        MissingExtraError: mlflow is not installed.
        InputError: there is no active run.
    """
    run = load("mlflow", extra="mlflow", purpose='trackers="mlflow"', package="mlflow-skinny").active_run()
    if run is None:
        raise InputError(
            'trackers="mlflow": expected an active MLflow run, found none; '
            "call mlflow.start_run() before, or pass the run"
        )
    return MlflowTracker(run)


def wrap(tracker: object) -> MlflowTracker | None:
    """Return a tracker that logs to an MLflow run, active or not, or None for any other object."""
    entities = sys.modules.get("mlflow.entities")
    return MlflowTracker(tracker) if entities is not None and isinstance(tracker, entities.Run) else None


class MlflowTracker:
    """Logs to the user's MLflow run, which stays open.

    Args:
        run: The result of `mlflow.start_run()` or `MlflowClient().create_run()`.
    """

    def __init__(self, run: Any) -> None:
        mlflow = load("mlflow", extra="mlflow", purpose="MlflowTracker")
        self._run_id = run.info.run_id
        self._client = mlflow.MlflowClient()
        self._metric = load("mlflow.entities", extra="mlflow", purpose="MlflowTracker").Metric

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Send one step's numbers."""
        renamed = {REFUSED.sub("_", name): value for name, value in values.items()}
        if len(renamed) < len(values):
            raise InputError(f"expected names that differ in what MLflow takes, found {', '.join(sorted(values))}")
        now = int(time.time() * 1000)
        batch = [self._metric(name, value, now, step) for name, value in renamed.items()]
        for first in range(0, len(batch), BATCH):
            self._client.log_batch(self._run_id, metrics=batch[first : first + BATCH])

    def tell(self, verdict: Verdict) -> None:
        """Set the verdict as a tag."""
        self._client.set_tag(self._run_id, VERDICT_TEXT, str(verdict)[:TAG])

    def close(self) -> None:
        """Do nothing: the run is the user's."""
