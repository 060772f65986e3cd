import numpy as np
import pytest

from benchmarks.generalization import subset
from benchmarks.generalization.configs import all_configs


def test_runs_are_held_against_those_of_their_name(make_run):
    first, second = all_configs()[:2]
    stored = [make_run(second, seed=1), make_run(first, seed=2)]
    here = make_run(first, seed=2)
    here.columns["lar"][7] += 0.25
    here.columns["val_loss"][3] -= 0.5
    (found,) = subset.compare([here], stored)
    assert found.run == first.name
    assert found.lar == pytest.approx(0.25)
    assert found.held_out == pytest.approx(0.5)
    assert found.here == found.stored == "healthy"
    assert "2.5e-01" in subset.rows([found])[0].values()


def test_another_truth_is_told(make_run, overfits):
    config = all_configs()[0]
    (found,) = subset.compare([make_run(config, held_out=overfits)], [make_run(config)])
    assert (found.here, found.stored) == ("overfit", "healthy")


def test_an_algorithmic_run_generalizes_or_does_not(make_run):
    config = next(config for config in all_configs() if config.family == "algorithmic")
    solved = np.concatenate([np.zeros(20), np.ones(20)])
    assert subset.truth_of(make_run(config, val_acc=solved)) == "generalizes"
    assert subset.truth_of(make_run(config, val_acc=np.zeros(40))) == "never generalizes"


def test_a_reading_that_is_undefined_on_one_side_is_a_difference(make_run):
    config = all_configs()[0]
    here = make_run(config)
    here.columns["lar"][7] = np.nan
    assert subset.compare([here], [make_run(config)])[0].lar == np.inf


def test_a_run_that_is_not_stored_cannot_be_compared(make_run):
    with pytest.raises(SystemExit, match="not among the 0 stored runs"):
        subset.compare([make_run()], [])
