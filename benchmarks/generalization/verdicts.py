"""What logalign's own detectors say of the runs, reading by reading, as `logalign diagnose` would."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache

from benchmarks.generalization.score import Context, Detected, judge
from benchmarks.generalization.store import Made
from logalign.diagnosis.baseline import Baseline
from logalign.diagnosis.detector import Detector
from logalign.diagnosis.overfitting import OverfitDetector
from logalign.diagnosis.verdict import Outcome, Verdict
from logalign.errors import InputError
from logalign.readings import Reading

FIELDS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered", "epoch", "loss", "lr")
SPECTRAL = ("weight_participation", "input_participation", "coherence")
WHOLE = ("step", "n", "m", "tokens", "tokens_seen")
ALARMS = ("approaching", "overfitting")


@cache
def readings_of(run: Made) -> tuple[Reading, ...]:
    """The run's readings, as a monitor would have recorded them: nothing of the truth is in them."""
    length = len(run.columns["step"])
    found = []
    for i in range(length):
        values = {name: _number(run.columns[name][i]) for name in (*FIELDS, *SPECTRAL) if name in run.columns}
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


def verdicts(context: Context, *, with_baseline: bool, detector: type = Detector) -> list[Verdict]:
    """The verdict after every reading."""
    baseline = baseline_of(context) if with_baseline else None
    judge_ = OverfitDetector(baseline=baseline) if detector is OverfitDetector else Detector(baseline=baseline)
    try:
        return [judge_.update(reading) for reading in readings_of(context.run)]
    except InputError as error:
        raise RuntimeError(f"{context.run.name}: {error}") from error


Judged = tuple[Made, tuple[Made, ...]]
_outcomes: dict[Judged, tuple[Outcome, ...]] = {}


def outcomes(context: Context, *, with_baseline: bool) -> tuple[Outcome, ...]:
    """The outcome after every reading; a run and its baselines are judged once in a process."""
    key = _key(context, with_baseline)
    if key not in _outcomes:
        _outcomes[key] = _judge(key)
    return _outcomes[key]


def prepare(contexts: Sequence[Context], *, jobs: int) -> None:
    """Judge all runs with and without their baselines, several at a time, so that `outcomes` knows them."""
    keys = {_key(context, with_baseline) for context in contexts for with_baseline in (False, True)}
    missing = sorted(keys - _outcomes.keys(), key=lambda key: -len(key[0].columns["step"]))
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        _outcomes.update(zip(missing, pool.map(_judge, missing, chunksize=4), strict=True))


def _key(context: Context, with_baseline: bool) -> Judged:
    return context.run, tuple(context.baselines) if with_baseline else ()


def _judge(key: Judged) -> tuple[Outcome, ...]:
    said = verdicts(Context(*key), with_baseline=bool(key[1]))
    return tuple(verdict.outcome for verdict in said)


def first_of(said: Sequence[Outcome], sought: Sequence[str] = ALARMS) -> int | None:
    """The first reading after which the outcome is one of these."""
    return next((i for i, outcome in enumerate(said) if outcome in sought), None)


def detection(contexts: Sequence[Context], *, with_baseline: bool) -> list[Detected]:
    """Hold the first "approaching" or "overfitting" of every run against the truth."""
    return [judge(context.run, first_of(outcomes(context, with_baseline=with_baseline))) for context in contexts]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
