"""MLflow: every reading as metrics of a run, the verdict as a tag.

Readings are sent one batch at a time and waited for: nothing is lost when the process is killed. Names may not hold all
characters there: another one than letters, digits, `_ - . : /` and spaces becomes `_`.
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
"""As many metrics as MLflow takes at once."""
TAG = 5000
"""As many characters as every release takes in a tag."""


def open_tracker(folder: Path | None) -> MlflowTracker:
    """A tracker that logs to the active run.

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
    """A tracker that logs to an MLflow run, active or not; None for an object of another kind."""
    entities = sys.modules.get("mlflow.entities")
    return MlflowTracker(tracker) if entities is not None and isinstance(tracker, entities.Run) else None


class MlflowTracker:
    """Logs to an MLflow run of the user's, which stays open.

    Args:
        run: What `mlflow.start_run()` or `MlflowClient().create_run()` returned.
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
        """Nothing: the run is the user's."""
