"""Guarded: a detector beside a training, which reports its own faults without stopping the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from logalign.diagnosis.baseline import Baseline
from logalign.diagnosis.detector import AskedRegime, Detector
from logalign.diagnosis.overfit_rule import OverfitThresholds
from logalign.diagnosis.verdict import Verdict, no_verdict
from logalign.runs.reading import Reading


class GuardedDetector:
    """A `Detector` that takes readings while a network trains.

    An error inside it warns once and becomes the verdict ("undecidable", with the error as its reason). It ends the
    diagnosis, not the training.

    Args:
        baseline: See `Detector`.
        regime: See `Detector`.
        thresholds: See `diagnose`.
        warn: Called with one sentence after an error.
    """

    def __init__(
        self,
        *,
        baseline: Baseline | None,
        regime: AskedRegime,
        warn: Callable[[str], None],
        thresholds: OverfitThresholds | None = None,
    ) -> None:
        self._new = partial(Detector, baseline=baseline, regime=regime, decline=thresholds)
        self._warn = warn
        self._pending: Callable[[], Iterable[Reading]] | None = None
        self._fault: Exception | None = None
        self._detector = self._new()

    @property
    def verdict(self) -> Verdict:
        """The verdict after the last reading."""
        self._catch_up()
        return (
            self._detector.verdict
            if self._fault is None
            else no_verdict(self._detector.decline.series.last_step, self._fault)
        )

    def update(self, reading: Reading) -> None:
        """Add one reading."""
        self._catch_up()
        self._take([reading])

    def restart(self, readings: Callable[[], Iterable[Reading]]) -> None:
        """Restart with these readings as the past, and read them only when needed."""
        self._detector = self._new()
        self._fault = None
        self._pending = readings

    def state_dict(self) -> dict[str, Any] | None:
        """The detector's state, None after an error."""
        self._catch_up()
        return self._detector.state_dict() if self._fault is None else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict()` returned.

        Raises:
            InputError: it is not the state of a detector.
        """
        self.restart(tuple)
        self._detector.load_state_dict(state)

    def _catch_up(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._take(pending())

    def _take(self, readings: Iterable[Reading]) -> None:
        if self._fault is not None:
            return
        try:
            for reading in readings:
                self._detector.update(reading)
        except Exception as error:
            self._fault = error
            why = f"{type(error).__name__}: {error}"
            self._warn(f"there will be no more verdicts, for the detector failed ({why}); training goes on")
