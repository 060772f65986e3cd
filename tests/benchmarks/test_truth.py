import numpy as np
import pytest

from benchmarks.generalization.configs import all_configs
from benchmarks.generalization.recorder import truth
from benchmarks.generalization.store import Made
from benchmarks.generalization.truth import Phases, epoch_of_minimum, outcome, phases


@pytest.mark.parametrize(
    ("rise", "error", "expected"),
    [
        (0.0, 0.0, "healthy"),
        (0.0199, 0.1, "healthy"),
        (0.02, 0.0, "between"),
        (0.05, 0.0, "between"),
        (0.0501, 0.0, "overfit"),
        (0.3, 0.101, "between"),
        (0.3, 0.099, "overfit"),
    ],
)
def test_overfit_is_a_rise_beyond_a_twentieth_of_a_nat_and_three_standard_errors(rise, error, expected):
    assert outcome(Made(all_configs()[0], {}, {"truth": {"rise": rise, "rise_se": error}})) == expected


def test_the_truth_is_of_the_smoothed_held_out_loss():
    curve = np.abs(np.arange(41.0) - 20) / 10
    units = np.stack([curve + 0.5, curve - 0.5], axis=1)
    units[5] -= 10  # one evaluation alone, far down
    found = truth(range(0, 410, 10), list(units))
    assert found["val_min_step"] in range(30, 80)
    smooth = truth(range(0, 410, 10), list(np.stack([curve + 0.5, curve - 0.5], axis=1)))
    assert smooth["val_min_step"] == 200
    assert smooth["val_min"] == pytest.approx(np.mean([0.2, 0.1, 0, 0.1, 0.2]))
    assert smooth["val_final"] == pytest.approx(np.mean([1.8, 1.9, 2.0]))
    assert smooth["rise"] == pytest.approx(1.9 - 0.12)
    assert smooth["rise_se"] == pytest.approx(0, abs=1e-12), "all units rise alike"


def test_the_standard_error_is_that_of_the_units_differences():
    rise = np.array([0.0, 1.0, 2.0, 5.0])
    units = [np.zeros(4)] * 10 + [rise] * 10
    found = truth(range(20), units)
    assert found["rise"] == pytest.approx(2.0)
    assert found["rise_se"] == pytest.approx(rise.std(ddof=1) / 2)


def test_the_minimum_has_an_epoch(make_run, overfits):
    assert epoch_of_minimum(make_run(held_out=overfits, epochs=8)) == pytest.approx(4.0)


def phases_of(make_run, held_out_accuracy, training_accuracy=None):
    training = np.ones(40) if training_accuracy is None else training_accuracy
    return phases(make_run(val_acc=held_out_accuracy, train_acc=training))


def test_phases_of_a_run_that_generalizes(make_run):
    accuracy = np.concatenate([np.zeros(10), np.linspace(0.1, 0.8, 10), np.full(20, 0.95)])
    training = np.concatenate([np.zeros(3), np.ones(37)])
    assert phases_of(make_run, accuracy, training) == Phases(memorized=30, begins=100, solved=200)


def test_a_run_that_never_generalizes_has_no_such_steps(make_run):
    assert phases_of(make_run, np.full(40, 0.02)) == Phases(memorized=0, begins=None, solved=None)


def test_a_spike_is_no_phase(make_run):
    accuracy = np.zeros(40)
    accuracy[12] = 0.95
    assert phases_of(make_run, accuracy) == Phases(memorized=0, begins=None, solved=None)


def test_a_short_setback_leaves_a_phase_where_it_began(make_run):
    accuracy = np.concatenate([np.zeros(10), np.full(30, 0.95)])
    accuracy[25] = 0.0
    assert phases_of(make_run, accuracy).solved == 100
