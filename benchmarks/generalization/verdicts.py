"""What logalign's own detectors say of the runs, reading by reading, as `logalign diagnose` would."""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache

from benchmarks.generalization.signals import Context
from benchmarks.generalization.store import Made
from logalign.diagnosis.baseline import Baseline
from logalign.diagnosis.detector import Detector
from logalign.diagnosis.drops import LossThresholds
from logalign.diagnosis.outcome import Outcome
from logalign.diagnosis.overfit_rule import OverfitThresholds
from logalign.errors import InputError
from logalign.runs.reading import Reading

FIELDS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered", "epoch", "loss", "lr")
REVISITS = ("drift", "drift_error", "gain", "gain_error", "passes")
SPECTRAL = ("weight_participation", "input_participation", "coherence")
WHOLE = ("step", "n", "m", "tokens", "tokens_seen")
ALARMS = ("approaching", "overfitting")
UNDEFINED = "weight, inputs or outputs hold a NaN or an infinity, or nothing but zeros"


@cache
def readings_of(run: Made) -> tuple[Reading, ...]:
    """The run's readings, as a monitor would have recorded them: nothing of the truth is in them."""
    length = len(run.columns["step"])
    found = []
    for i in range(length):
        values = {
            name: _number(run.columns[name][i]) for name in (*FIELDS, *REVISITS, *SPECTRAL) if name in run.columns
        }
        whole = {name: int(run.columns[name][i]) for name in WHOLE if math.isfinite(run.columns[name][i])}
        names = [name for name in ("weight", "input", "output") if f"energy_{name}" in run.columns]
        energies = {name: _number(run.columns[f"energy_{name}"][i]) for name in names}
        mean = _number(run.columns["train_loss"][i])
        reason = UNDEFINED if values["lar"] is None else None
        found.append(Reading(**whole, **values, energies=energies, loss_mean=mean, reason=reason))
    return tuple(found)


def baseline_of(context: Context) -> Baseline | None:
    """The baseline that the library makes of the recipe's baseline runs."""
    if not context.baselines:
        return None
    return Baseline.from_readings(*(readings_of(run) for run in context.baselines))


@dataclass(frozen=True, eq=False)
class Said:
    """What a detector said after every reading of a run."""

    outcomes: tuple[Outcome, ...]
    rests_on: tuple[str, ...] = ()


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
    found, rests_on = [], []
    for reading in readings_of(context.run):
        try:
            verdict = detector.update(reading)
        except InputError as error:
            raise RuntimeError(f"{context.run.name}: {error}") from error
        found.append(verdict.outcome)
        rests_on.append(detector.decline.rests_on if verdict.regime == "decline" else verdict.regime)
    return Said(tuple(found), tuple(rests_on))


def first_of(said: Sequence[Outcome], sought: Sequence[str] = ALARMS) -> int | None:
    """The first reading after which the outcome is one of these."""
    return next((i for i, outcome in enumerate(said) if outcome in sought), None)


@dataclass(frozen=True)
class Variant:
    """The rule without one kind of evidence."""

    revisits: bool = True
    thresholds: OverfitThresholds = field(default_factory=OverfitThresholds)


VARIANTS = {
    "without revisits": Variant(revisits=False),
    "without strain (LAR)": Variant(thresholds=OverfitThresholds(strain=math.inf)),
    "without drops of the loss": Variant(thresholds=OverfitThresholds(drops=LossThresholds(memorized=math.inf))),
    "without the growth of k (LAR)": Variant(thresholds=OverfitThresholds(spread=math.inf, spread_alarm=math.inf)),
    "revisits alone": Variant(
        thresholds=OverfitThresholds(
            strain=math.inf, drops=LossThresholds(memorized=math.inf), spread=math.inf, spread_alarm=math.inf
        )
    ),
}


def varied(run: Made, variant: Variant) -> tuple[Outcome, ...]:
    """The outcome of such a rule after every reading."""
    detector = Detector(decline=variant.thresholds)
    without = dict.fromkeys(() if variant.revisits else ("drift", "drift_error", "gain", "gain_error"))
    return tuple(detector.update(replace(reading, **without)).outcome for reading in readings_of(run))


def changes_back(said: Sequence[Outcome]) -> int:
    """How often an alarm was followed by something else."""
    return sum(before in ALARMS and after not in ALARMS for before, after in itertools.pairwise(said))


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
