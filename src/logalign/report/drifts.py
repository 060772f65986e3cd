"""Drift in words and at a place: what terminals, tables and pages say of it.

Drift is by how much a sample's loss changes while the network trains on other samples, in nats for one pass over the
data. Above zero, training on other samples raises a sample's loss; below zero, it still carries over to it.
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
"""Standard errors on either side within which a drift is not told from zero."""
RISES = "other samples raise a sample's loss"
FALLS = "other samples still lower a sample's loss"
LEVEL = "within two errors of zero"
UNIT = "nats a pass"


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The drift of one reading.

    Attributes:
        value: In nats for one pass over the data.
        error: Its standard error; None where it was not recorded.
    """

    value: float
    error: float | None = None

    @classmethod
    def of(cls, reading: Reading | None) -> Drift | None:
        """The drift of a reading; None where there is none."""
        return None if reading is None or reading.drift is None else cls(value=reading.drift, error=reading.drift_error)

    @property
    def direction(self) -> str:
        """What it means, in words.

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
    """The drift of each run of an order, where the runs were compared: at its last reading up to that place.

    Returns:
        One for each run; None where that reading has no drift.
    """
    return [Drift.of(_reading_at(ranking.opened[each.run], ranking)) for each in ranking.runs]


def drift_records(drifts: Sequence[Drift | None]) -> list[dict[str, float | None]]:
    """Drift and error of each run as objects for strict JSON; empty ones where no run has a drift.

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
