"""Inside and between passes: on losses whose parts are known, and where nothing can be told."""

import numpy as np
import pytest

from logalign.diagnosis.epochs import completed_passes, memorized, passes


def staircase(*, steps_per_pass=50, every=10, count=60, inside=-0.001, drop=0.2, scatter=0.0, seed=0):
    """Mean losses over `every` steps of a run that learns inside passes and memorizes from pass to pass."""
    all_steps = np.arange(count * every)
    exact = 5 + inside * all_steps - drop * (all_steps // steps_per_pass)
    losses = exact.reshape(count, every).mean(axis=1)
    losses += scatter * np.random.default_rng(seed).standard_normal(count)
    steps = every * np.arange(1, count + 1) - 1.0
    epochs = steps / steps_per_pass
    before = np.concatenate([[0.0], (steps[:-1] + 1) / steps_per_pass])
    completed = np.array([completed_passes(a, b) for a, b in zip(before, (steps + 1) / steps_per_pass, strict=True)])
    return steps, epochs, completed, losses


def test_learning_and_memorizing_are_told_apart():
    found = passes(*staircase())
    assert found is not None
    assert found.inside == pytest.approx(-0.001, rel=1e-6)
    assert found.between == pytest.approx(-0.2, rel=1e-6)
    assert found.steps_per_pass == pytest.approx(50)
    assert found.memorization == pytest.approx(0.2 / 50 * 599)
    assert found.learning == pytest.approx(0.001 * 599)


def test_a_reading_that_spans_the_end_of_a_pass_is_accounted_for():
    found = passes(*staircase(steps_per_pass=37, inside=0.002))
    assert found is not None
    assert (found.inside, found.between) == pytest.approx((0.002, -0.2), rel=1e-6)


def test_only_the_last_passes_count():
    steps, epochs, completed, losses = staircase()
    changed = losses + np.where(epochs < 5, 10.0, 0.0)
    assert passes(steps, epochs, completed, changed) == passes(steps, epochs, completed, losses)


@pytest.mark.parametrize("steps_per_pass", [5, 10, 14])
def test_a_pass_as_short_as_a_reading_cannot_be_seen_into(steps_per_pass):
    steps, epochs, completed, losses = staircase(steps_per_pass=steps_per_pass)
    assert passes(steps, epochs, completed, losses) is None
    assert memorized(epochs, losses) is None


def test_where_there_is_too_little_nothing_is_said():
    steps, epochs, completed, losses = staircase()
    assert passes(steps[:9], epochs[:9], completed[:9], losses[:9]) is None
    assert passes(steps, epochs / 100, completed, losses) is None  # no pass has ended
    assert passes(steps, np.full(60, np.nan), completed, losses) is None
    assert passes(steps, epochs[::-1], completed, losses) is None
    assert memorized(epochs[:9], losses[:9]) is None


def test_what_was_memorized_is_the_sum_of_the_drops():
    _, epochs, _, losses = staircase(inside=0.0, count=60)
    found = memorized(epochs, losses)
    assert found is not None
    assert found.drops == pytest.approx(0.2 * 11)
    assert found.held_out_loss == pytest.approx(losses[0], abs=0.05)


def test_the_error_covers_the_scatter_of_readings():
    estimates = []
    for seed in range(200):
        _, epochs, _, losses = staircase(inside=0.0, drop=1.0, scatter=0.05, seed=seed)
        found = memorized(epochs, losses)
        assert found is not None
        estimates.append((found.held_out_loss, found.error))
    values, errors = np.array(estimates).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.5)


def test_completed_passes():
    assert completed_passes(0.0, 0.9) == 0
    assert completed_passes(1.9, 2.1) == pytest.approx(1.5)
    assert completed_passes(3.2, 3.2) == 3
