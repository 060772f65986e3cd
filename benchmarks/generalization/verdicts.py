"""What logalign's own detectors say of the runs, reading by reading, as `logalign diagnose` would."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from benchmarks.generalization.score import Context, Detected, judge
from benchmarks.generalization.store import Made
from logalign.diagnosis.baseline import Baseline
from logalign.diagnosis.detector import Detector
from logalign.diagnosis.overfitting import OverfitDetector
from logalign.diagnosis.verdict import Verdict
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
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for i, run in enumerate(context.baselines):
            path = Path(folder) / f"{i}.jsonl"
            path.write_text("".join(reading.line() for reading in readings_of(run)))
            paths.append(path)
        return Baseline.from_run(*paths)


def verdicts(context: Context, *, with_baseline: bool, detector: type = Detector) -> list[Verdict]:
    """The verdict after every reading."""
    baseline = baseline_of(context) if with_baseline else None
    judge_ = OverfitDetector(baseline=baseline) if detector is OverfitDetector else Detector(baseline=baseline)
    try:
        return [judge_.update(reading) for reading in readings_of(context.run)]
    except InputError as error:
        raise RuntimeError(f"{context.run.name}: {error}") from error


def first_alarm(found: Sequence[Verdict], outcomes: Sequence[str] = ALARMS) -> int | None:
    """The first reading whose verdict is one of these."""
    return next((i for i, verdict in enumerate(found) if verdict.outcome in outcomes), None)


def detection(contexts: Sequence[Context], *, with_baseline: bool) -> list[Detected]:
    """Hold the first "approaching" or "overfitting" of every run against the truth."""
    return [judge(context.run, first_alarm(verdicts(context, with_baseline=with_baseline))) for context in contexts]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
