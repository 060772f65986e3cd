"""What logalign's own detectors say of the runs, reading by reading, as `logalign diagnose` would."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from benchmarks.generalization.levels import levels
from benchmarks.generalization.score import Context, Detected, judge
from benchmarks.generalization.store import Made
from logalign.diagnosis.baseline import Baseline
from logalign.diagnosis.detector import Detector
from logalign.diagnosis.verdict import Outcome
from logalign.errors import InputError
from logalign.readings import Reading

FIELDS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered", "epoch", "loss", "lr")
REVISITS = ("drift", "drift_error", "gain", "gain_error", "passes")
SPECTRAL = ("weight_participation", "input_participation", "coherence")
WHOLE = ("step", "n", "m", "tokens", "tokens_seen")
ALARMS = ("approaching", "overfitting")


@cache
def readings_of(run: Made) -> tuple[Reading, ...]:
    """The run's readings, as a monitor would have recorded them: nothing of the truth is in them."""
    length = len(run.columns["step"])
    found = []
    for i in range(length):
        values = {
            name: _number(run.columns[name][i]) for name in (*FIELDS, *REVISITS, *SPECTRAL) if name in run.columns
        }
        whole = {name: int(run.columns[name][i]) for name in WHOLE}
        energies = {name: _number(run.columns[f"energy_{name}"][i]) for name in ("weight", "input", "output")}
        mean = _number(run.columns["train_loss"][i])
        found.append(Reading(**whole, **values, energies=energies, loss_mean=mean))
    return tuple(found)


def baseline_of(context: Context) -> Baseline | None:
    """The baseline that the library makes of the recipe's baseline runs."""
    if not context.baselines:
        return None
    return Baseline.from_readings(*(readings_of(run) for run in context.baselines))


@dataclass(frozen=True, eq=False)
class Said:
    """What a detector said after every reading of a run, and what it held against its thresholds."""

    outcomes: tuple[Outcome, ...]
    levels: Mapping[str, NDArray[np.float64]]


Judged = tuple[Made, tuple[Made, ...]]
_said: dict[Judged, Said] = {}


def said(context: Context, *, with_baseline: bool) -> Said:
    """What `logalign diagnose` says after every reading; a run and its baselines are judged once in a process."""
    key = _key(context, with_baseline)
    if key not in _said:
        _said[key] = _judge(key)
    return _said[key]


def outcomes(context: Context, *, with_baseline: bool) -> tuple[Outcome, ...]:
    """The outcome after every reading."""
    return said(context, with_baseline=with_baseline).outcomes


def prepare(contexts: Sequence[Context], *, jobs: int) -> None:
    """Judge all runs with and without their baselines, several at a time, so that `said` knows them."""
    keys = {_key(context, with_baseline) for context in contexts for with_baseline in (False, True)}
    missing = sorted(keys - _said.keys(), key=lambda key: -len(key[0].columns["step"]))
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        _said.update(zip(missing, pool.map(_judge, missing, chunksize=4), strict=True))


def _key(context: Context, with_baseline: bool) -> Judged:
    return context.run, tuple(context.baselines) if with_baseline else ()


def _judge(key: Judged) -> Said:
    context = Context(*key)
    detector = Detector(baseline=baseline_of(context))
    found, held = [], []
    for reading in readings_of(context.run):
        try:
            found.append(detector.update(reading).outcome)
        except InputError as error:
            raise RuntimeError(f"{context.run.name}: {error}") from error
        held.append(levels(detector))
    return Said(tuple(found), {name: np.array([each[name] for each in held]) for name in held[0]})


def first_of(said: Sequence[Outcome], sought: Sequence[str] = ALARMS) -> int | None:
    """The first reading after which the outcome is one of these."""
    return next((i for i, outcome in enumerate(said) if outcome in sought), None)


def detection(contexts: Sequence[Context], *, with_baseline: bool) -> list[Detected]:
    """Hold the first "approaching" or "overfitting" of every run against the truth."""
    return [judge(context.run, first_of(outcomes(context, with_baseline=with_baseline))) for context in contexts]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
