"""What a log without LAR can tell: the runs without their LAR, judged as `logalign diagnose` judges such logs.

Scored by the regret of `regret.cost`. `python -m benchmarks.generalization.loss_only [--fitting]` prints the scores.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.generalization import configs
from benchmarks.generalization.configs import FAMILIES
from benchmarks.generalization.regret import cost
from benchmarks.generalization.store import Made, load
from benchmarks.generalization.truth import outcome
from benchmarks.generalization.verdicts import ALARMS, first_of, readings_of
from logalign.diagnosis.detector import Detector
from logalign.diagnosis.outcome import Outcome
from logalign.runs.reading import NO_LAR, Reading

OF_A_LOG = ("step", "epoch", "loss", "loss_mean", "lr")


@dataclass(frozen=True, kw_only=True)
class LossOnly:
    """Scores of verdicts without LAR, over the runs of a family or of all.

    Attributes:
        family: Of the runs; "all" for all.
        overfit: Runs that overfit.
        alarmed: How many of these had an alarm.
        regret: Mean regret over these, in nats, at the first "approaching" or "overfitting"; at the end without one.
        regret_median: The median.
        regret_of_overfitting: Mean regret at the first "overfitting".
        regret_without: Mean regret of training on to the end.
        healthy: Healthy runs.
        false_alarms: How many of these had an alarm.
        decided: How many of all runs had an outcome other than "undecidable" after data had repeated.
        runs: How many runs.
    """

    family: str
    overfit: int
    alarmed: int
    regret: float
    regret_median: float
    regret_of_overfitting: float
    regret_without: float
    healthy: int
    false_alarms: int
    decided: int
    runs: int


def without_lar(run: Made, *, single_batches: bool = False) -> list[Reading]:
    """The run's readings as a log without LAR has them.

    Args:
        run: A run.
        single_batches: Whether the loss is that of one batch, not the mean since the reading before.
    """
    found = []
    for reading in readings_of(run):
        values = {name: getattr(reading, name) for name in OF_A_LOG}
        if single_batches:
            values["loss_mean"] = None
        found.append(Reading(lar=None, reason=NO_LAR, **values))
    return found


def outcomes_without_lar(run: Made, *, single_batches: bool = False) -> tuple[Outcome, ...]:
    """The outcome after every reading."""
    detector = Detector()
    return tuple(detector.update(reading).outcome for reading in without_lar(run, single_batches=single_batches))


def loss_only(runs: Sequence[Made], *, single_batches: bool = False) -> list[LossOnly]:
    """Scores of each family and of all runs."""
    said = {run.name: outcomes_without_lar(run, single_batches=single_batches) for run in runs}
    families = [family for family in FAMILIES if any(run.config.family == family for run in runs)]
    return [
        _score(family, [run for run in runs if family in (run.config.family, "all")], said)
        for family in (*families, "all")
    ]


def _score(family: str, runs: Sequence[Made], said: dict[str, tuple[Outcome, ...]]) -> LossOnly:
    overfit = [run for run in runs if outcome(run) == "overfit"]
    healthy = [run for run in runs if outcome(run) == "healthy"]
    alarms = {run.name: first_of(said[run.name], ALARMS) for run in runs}
    regrets = [cost(run, alarms[run.name]).regret for run in overfit]
    later = [cost(run, first_of(said[run.name], ("overfitting",))).regret for run in overfit]
    return LossOnly(
        family=family,
        overfit=len(overfit),
        alarmed=sum(alarms[run.name] is not None for run in overfit),
        regret=_mean(regrets),
        regret_median=float(np.median(regrets)) if regrets else float("nan"),
        regret_of_overfitting=_mean(later),
        regret_without=_mean([cost(run, None).regret for run in overfit]),
        healthy=len(healthy),
        false_alarms=sum(alarms[run.name] is not None for run in healthy),
        decided=sum(_decided(run, said[run.name]) for run in runs),
        runs=len(runs),
    )


def _decided(run: Made, said: Sequence[Outcome]) -> bool:
    epochs = run.columns["epoch"]
    return any(each != "undecidable" and epoch >= 1 for each, epoch in zip(said, epochs, strict=True))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def main(arguments: Sequence[str]) -> None:
    """Print the scores of the scored half, or of the fitting half."""
    fitting = "--fitting" in arguments
    runs = [run for run in load() if configs.is_for_fitting(run.config) == fitting]
    for single_batches in (False, True):
        print("loss of single batches" if single_batches else "mean loss since the reading before")
        for each in loss_only(runs, single_batches=single_batches):
            print(
                f"  {each.family:12} {each.runs} runs, {each.decided} decided; overfit {each.overfit}, alarmed "
                f"{each.alarmed}, regret {each.regret:.3f} (median {each.regret_median:.3f}; at 'overfitting' "
                f"{each.regret_of_overfitting:.3f}; at the end {each.regret_without:.3f}); healthy {each.healthy}, "
                f"alarmed {each.false_alarms}"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
