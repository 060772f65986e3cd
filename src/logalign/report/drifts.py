"""Drift in words and at a place, for terminals, tables and pages.

Drift is the change of a sample's loss while the network trains on other samples, in nats for one pass over the data.
Above zero, training on other samples raises a sample's loss. Below zero, that training still carries over to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from logalign.common.markup import measured
from logalign.diagnosis.comparable import ALIGNMENTS
from logalign.diagnosis.ranking import Ranking
from logalign.runs.reading import Reading
from logalign.runs.run import Run

SIGMAS = 2.0
"""Standard errors on either side within which drift is indistinguishable from zero."""
RISES = "other samples raise a sample's loss"
FALLS = "other samples still lower a sample's loss"
LEVEL = "within two errors of zero"
UNIT = "nats a pass"


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The drift of one reading.

    Attributes:
        value: Nats for one pass over the data.
        error: Its standard error, or None where not recorded.
    """

    value: float
    error: float | None = None

    @classmethod
    def of(cls, reading: Reading | None) -> Drift | None:
        """Return the drift of a reading, or None."""
        return None if reading is None or reading.drift is None else cls(value=reading.drift, error=reading.drift_error)

    @property
    def direction(self) -> str:
        """The meaning in words.

        Example:
            >>> Drift(value=0.03, error=0.01).direction
            "other samples raise a sample's loss"
            >>> Drift(value=0.03, error=0.02).direction
            'within two errors of zero'
        """
        if self.error is not None and abs(self.value) <= SIGMAS * self.error:
            return LEVEL
        return RISES if self.value > 0 else FALLS

    def __str__(self) -> str:
        return measured(self.value, self.error)


def drifts_of(ranking: Ranking) -> list[Drift | None]:
    """Return each run's drift at its last reading up to the place where the runs were compared.

    Returns:
        One drift for each run, or None where that reading has none.
    """
    return [Drift.of(_reading_at(ranking.opened[each.run], ranking)) for each in ranking.runs]


def drift_records(drifts: Sequence[Drift | None]) -> list[dict[str, float | None]]:
    """Convert each run's drift and error to objects for strict JSON, empty where no run has drift.

    Example:
        >>> drift_records([Drift(value=0.25), None]), drift_records([None])
        ([{'drift': 0.25, 'drift_error': None}, {'drift': None, 'drift_error': None}], [{}])
    """
    if all(drift is None for drift in drifts):
        return [{} for _ in drifts]
    return [
        {"drift": None, "drift_error": None} if drift is None else {"drift": drift.value, "drift_error": drift.error}
        for drift in drifts
    ]


def _reading_at(run: Run, ranking: Ranking) -> Reading | None:
    site, column = run.main, ALIGNMENTS[ranking.align]
    reached = [
        reading
        for reading in run.readings
        if reading.site == site and (place := getattr(reading, column)) is not None and place <= ranking.at
    ]
    return reached[-1] if reached else None
