"""The metrics that trackers get at a reading: plain numbers under names that are the same everywhere.

docs/trackers.md lists them. A metric that is undefined at a reading is left out, never a zero or NaN: a gap in the
curve.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from logalign.diagnosis.outcome import SHOWN
from logalign.diagnosis.verdict import Verdict
from logalign.runs.foreign import rows
from logalign.runs.reading import Reading, Readings

PREFIX: str = rows.PREFIX
STEP: str = PREFIX + rows.STEP
"""The reading's step, for trackers with a step count of their own."""
VERDICT_TEXT: str = PREFIX + "verdict_text"
"""The verdict in words, where a tracker takes text."""
LAYER: tuple[str, ...] = rows.OF_A_LAYER
"""Metrics of every layer."""
TRAINING = ("loss", "loss_mean", "lr", "epoch", "tokens_seen", "kept", "nonfinite")
"""Metrics given once, with the main layer."""
REVISITS = ("drift", "drift_error", "gain", "gain_error", "revisited", "passes")
"""Metrics of samples that training meets again, given once, with the main layer."""
JUDGED = ("deviation", "revisited_share", "strain")
"""Numbers of the verdict's evidence."""


def metrics(readings: Readings, verdict: Verdict) -> dict[str, float]:
    """Return all numbers of a step by name: `logalign/` for the main layer, `logalign/SITE/` for the others.

    Example:
        >>> taken = Readings({"unembedding": Reading(step=20, lar=0.61, loss=2.5)}, main="unembedding")
        >>> verdict = Verdict(
        ...     outcome="healthy",
        ...     regime="decline",
        ...     step=20,
        ...     since_step=0,
        ...     reason="",
        ...     suggestion="",
        ...     evidence={"deviation": 0.002},
        ... )
        >>> metrics(taken, verdict)
        {'logalign/lar': 0.61, 'logalign/loss': 2.5, 'logalign/deviation': 0.002, 'logalign/verdict': 1}
    """
    main = readings.main
    found = _of(main, (*LAYER, *TRAINING, *REVISITS), PREFIX)
    found |= {PREFIX + name: value for name, value in main.extra.items()}
    found |= {PREFIX + name: verdict.evidence.get(name) for name in JUDGED}
    found[PREFIX + "verdict"] = SHOWN[verdict.outcome].code
    for site, reading in readings.items():
        if site != main.site:
            found |= _of(reading, LAYER, f"{PREFIX}{site}/")
    return {name: value for name, value in found.items() if value is not None}


def _of(reading: Reading, names: Iterable[str], prefix: str) -> dict[str, float | None]:
    return {prefix + name: _norm(reading) if name == rows.WEIGHT_NORM else getattr(reading, name) for name in names}


def _norm(reading: Reading) -> float | None:
    energy = reading.energies["weight"] if reading.energies is not None else None
    return None if energy is None else math.sqrt(energy)
