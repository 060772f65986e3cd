"""What trackers are given at a reading: plain numbers under names that are the same everywhere.

docs/trackers.md lists them. What is undefined at a reading is left out, never made a zero or NaN: a gap in the curve.
"""

from __future__ import annotations

from collections.abc import Mapping

from logalign.diagnosis.verdict import Outcome, Verdict
from logalign.readings import SPECTRAL_FIELDS, Reading, Readings

PREFIX = "logalign/"
LAYER = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered", "effective_dim", *SPECTRAL_FIELDS)
"""What is given of every layer."""
TRAINING = ("loss", "loss_mean", "lr", "epoch", "tokens_seen", "kept", "nonfinite")
"""What is given once, with the main layer."""
JUDGED = ("deviation", "decline_rate", "strain", "memorization")
"""Numbers of the verdict's evidence."""

VERDICT_CODES: Mapping[Outcome, int] = {
    "undecidable": -1,
    "generalizing": 0,
    "healthy": 1,
    "approaching": 2,
    "memorizing": 3,
    "overfitting": 4,
}
"""Trackers draw numbers, not words: the higher the worse, 3 and 4 are alarms."""


def metrics(readings: Readings, verdict: Verdict) -> dict[str, float]:
    """All numbers of one step by name: the main layer's under `logalign/`, the others' under `logalign/SITE/`.

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
    found: dict[str, float | None] = _of(main, (*LAYER, *TRAINING), PREFIX)
    found |= {PREFIX + name: value for name, value in main.extra.items()}
    found |= {PREFIX + name: verdict.evidence.get(name) for name in JUDGED}
    found[PREFIX + "verdict"] = VERDICT_CODES[verdict.outcome]
    for site, reading in readings.items():
        if site != main.site:
            found |= _of(reading, LAYER, f"{PREFIX}{site}/")
    return {name: value for name, value in found.items() if value is not None}


def _of(reading: Reading, names: tuple[str, ...], prefix: str) -> dict[str, float | None]:
    return {prefix + name: getattr(reading, name) for name in names}
