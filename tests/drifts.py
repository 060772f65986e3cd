"""Readings with drift, as a training of several passes over its data records it."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from logalign.runs.reading import Reading

PASSES = 10.0
ERROR = 0.01
NO_DRIFT_YET = "fewer than two passes over the data"


def revisit_fields(i: int, of: int, *, epoch: float | None = None, seed: int = 0) -> dict[str, Any]:
    """The fields of reading i: no drift before the second pass ends, then from -0.4 above zero.

    Passes are the epoch; without one they are known from the second on.
    """
    passes = PASSES * i / (of - 1) if epoch is None else epoch
    if passes < 2:
        return {
            "revisited": 40 * i,
            "passes": passes if passes > 1 or epoch is not None else None,
            "drift_reason": NO_DRIFT_YET,
        }
    noise = random.Random(1_000_003 * seed + i)
    return {
        "drift": 0.02 - 0.42 * math.exp(2 - passes) + noise.gauss(0, ERROR / 2),
        "drift_error": ERROR * (1 + 0.1 * noise.random()),
        "gain": 0.3 * math.exp(-passes / 20) + noise.gauss(0, ERROR),
        "gain_error": ERROR,
        "revisited": 4096 + i,
        "passes": passes,
    }


def drifting(readings: Sequence[Reading], *, site: str = "unembedding", seed: int = 0) -> list[Reading]:
    """The readings with drift in those of one layer."""
    main = [reading for reading in readings if reading.site == site]
    places = {id(reading): i for i, reading in enumerate(main)}
    return [
        replace(reading, **revisit_fields(places[id(reading)], len(main), epoch=reading.epoch, seed=seed))
        if id(reading) in places
        else reading
        for reading in readings
    ]


def write_log(path: Path, *, of: int = 60, gaps: Sequence[int] = (), seed: int = 0) -> Path:
    """A JSONL log of one layer with drift, but for the readings in `gaps`."""
    readings = drifting([Reading(step=10 * i, lar=0.5 + i / 1000, n=64, m=512, loss=3.0) for i in range(of)], seed=seed)
    for i in gaps:
        readings[i] = replace(
            readings[i], drift=None, drift_error=None, gain=None, gain_error=None, drift_reason=NO_DRIFT_YET
        )
    path.write_text("".join(reading.line() for reading in readings), encoding="utf-8")
    return path
