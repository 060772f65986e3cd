"""Accelerate: the trackers of `accelerator.init_trackers()` get every reading, by `accelerator.log()`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from logalign.diagnosis.verdict import Verdict
from logalign.errors import InputError
from logalign.trackers.tracker import Tracker


def wrap(tracker: object) -> Tracker | None:
    """Return a tracker for an Accelerator, or None for any other object.

    Raises:
        InputError: the Accelerator's trackers have not begun yet.
    """
    accelerate = sys.modules.get("accelerate")  # an Accelerator implies a loaded package
    if accelerate is None or not isinstance(tracker, accelerate.Accelerator):
        return None
    if not tracker.trackers:
        raise InputError(
            "trackers: expected an Accelerator whose trackers have begun, found none: make it with "
            'Accelerator(log_with="tensorboard"), or another, and call accelerator.init_trackers("project") before '
            "watch()"
        )
    return AcceleratorTracker(tracker)


class AcceleratorTracker:
    """Hands readings to an Accelerator's own trackers, which log from the main process only."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Log one step's numbers."""
        self._accelerator.log(dict(values), step=step)

    def tell(self, verdict: Verdict) -> None:
        """Do nothing: Accelerate takes numbers, and `logalign/verdict` is one of them."""

    def close(self) -> None:
        """Do nothing: the user calls `accelerator.end_training()`."""
