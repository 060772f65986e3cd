"""Verdicts without LAR on the benchmark's runs: what is scored, and that nothing of LAR or of the truth is in it."""

import pytest

from benchmarks.generalization.loss_only import loss_only, outcomes_without_lar, without_lar
from benchmarks.generalization.store import load
from benchmarks.generalization.truth import outcome


@pytest.fixture(scope="module")
def runs():
    every = [run for run in load() if run.config.family == "language"]
    return [next(run for run in every if outcome(run) == truth) for truth in ("overfit", "healthy")]


def test_the_readings_hold_loss_and_epoch_alone(runs):
    for single in (False, True):
        for reading in without_lar(runs[0], single_batches=single):
            assert (reading.lar, reading.n, reading.energies, dict(reading.extra)) == (None, None, None, {})
            assert (reading.loss_mean is None) == single


def test_the_scores_of_two_runs(runs):
    family, everything = loss_only(runs)
    assert (family.family, everything.family) == ("language", "all")
    assert (family.overfit, family.healthy, family.runs) == (1, 1, 2)
    alarmed = "approaching" in outcomes_without_lar(runs[0])
    assert family.alarmed == alarmed
    assert 0 <= family.regret <= family.regret_without
