"""Drift and gain against a slow reference on recorded runs, and against visits whose truth is known."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logalign import revisits
from logalign.errors import InputError
from logalign.samples.drift import MIN_PAIRS, SAME_ORDER, TOO_FEW_PASSES, UNEVEN


def slow_reference(samples, times, losses, now):
    """Drift, its error, gain, its error, pairs: sample by sample, and with a QR decomposition and a pseudo-inverse."""
    visits = {}
    for sample, time, loss in sorted(zip(samples, times, losses, strict=True), key=lambda each: each[1]):
        if time <= now + 1e-9:
            visits.setdefault(sample, []).append((time - now, loss))
    rows, changes = [], []
    knots = [-2.0, -1.5, -1.0, -0.5, 0.0]
    for each in visits.values():
        for (t1, l1), (t2, l2) in itertools.pairwise(each):
            if t1 > -2 + 1e-9 and t2 > -1 + 1e-9:
                row = [np.interp(t2, knots, unit) - np.interp(t1, knots, unit) for unit in np.eye(5)[1:]]
                rows.append([*row, -1.0])
                changes.append(l2 - l1)
    design, changes = np.array(rows), np.array(changes)
    weights = np.ones(len(changes))
    for _ in range(4):
        q, r = np.linalg.qr(design * np.sqrt(weights)[:, None])
        found = np.linalg.solve(r, q.T @ (changes * np.sqrt(weights)))
        rest = np.abs(changes - design @ found)
        weights = np.minimum(1.0, 2 * 1.4826 * np.median(rest) / np.maximum(rest, 1e-9))
    covariance = np.linalg.pinv(design.T @ np.diag(weights) @ design)
    covariance *= sum(weights * rest**2) / (sum(weights) - 5)
    last_pass = np.array([0.0, -1.0, 0.0, 1.0, 0.0])  # of F(-1.5), F(-1), F(-0.5), F(0), gain
    drift_error = np.sqrt(last_pass @ covariance @ last_pass)
    return last_pass @ found, drift_error, found[-1], np.sqrt(covariance[-1, -1]), len(changes)


def shuffled(passes, samples=200, seed=0):
    """Samples of passes in a new order each, and their times in passes."""
    generator = np.random.default_rng(seed)
    order = np.concatenate([generator.permutation(samples) for _ in range(passes)])
    return order, np.arange(passes * samples) / samples


def losses_of(order, times, *, slope, gain, forget=0.0, noise=0.0, seed=1):
    """Losses that move by `slope` a pass for all, and by `gain` for a sample that is visited."""
    generator = np.random.default_rng(seed)
    own, losses = {}, []
    for sample, time in zip(order, times, strict=True):
        losses.append(5 + sample * 0.01 + slope * time - own.get(sample, 0.0) + noise * generator.standard_normal())
        own[sample] = own.get(sample, 0.0) + gain
    return np.array(losses)


def test_recorded_runs_give_what_the_slow_reference_gives(recorded):
    times = recorded.steps / recorded.steps_per_pass
    for now in np.arange(2.0, times[-1], 0.7):
        found = revisits(recorded.samples, times, recorded.losses, now=now)
        *expected, pairs = slow_reference(recorded.samples, times, recorded.losses, now)
        assert (found.drift, found.drift_error, found.gain, found.gain_error) == pytest.approx(expected, abs=1e-6)
        assert found.pairs == pairs


@pytest.mark.parametrize("slope", [-0.3, 0.0, 0.07])
@pytest.mark.parametrize("gain", [0.0, 0.4])
def test_what_all_samples_share_is_drift_and_what_a_visit_buys_is_gain(slope, gain):
    order, times = shuffled(5)
    found = revisits(order, times, losses_of(order, times, slope=slope, gain=gain))
    assert found.drift == pytest.approx(slope, abs=1e-9)
    assert found.gain == pytest.approx(gain, abs=1e-9)
    assert found.reason is None


def test_the_standard_errors_hold():
    """Of 200 draws 95 % should lie within two standard errors: between 88 and 99.5 % of them do."""
    within = []
    order, times = shuffled(3, samples=150)
    for seed in range(200):
        found = revisits(order, times, losses_of(order, times, slope=0.05, gain=0.2, noise=0.1, seed=seed))
        within.append([abs(found.drift - 0.05) < 2 * found.drift_error, abs(found.gain - 0.2) < 2 * found.gain_error])
    for share in np.mean(within, axis=0):
        assert 0.88 < share < 0.995


def test_a_few_wild_samples_do_not_decide():
    order, times = shuffled(4)
    losses = losses_of(order, times, slope=-0.1, gain=0.2, noise=0.02)
    wild = losses.copy()
    wild[::37] += 40.0
    assert revisits(order, times, wild).drift == pytest.approx(revisits(order, times, losses).drift, abs=0.05)


@given(st.permutations(range(70)), st.floats(-3, 3), st.floats(0.5, 2))
def test_the_order_of_the_visits_and_the_level_of_the_losses_do_not_matter(names, level, scale):
    order, times = shuffled(4, samples=70, seed=3)
    losses = losses_of(order, times, slope=0.1, gain=0.3, noise=0.05)
    found = revisits(order, times, losses)
    mixed = np.random.default_rng(0).permutation(len(order))
    other = revisits(np.array(names)[order[mixed]], times[mixed], level + scale * losses[mixed], now=times[-1])
    assert found.pairs == other.pairs
    if found.drift is None:
        assert other.drift is None
        return
    assert other.drift == pytest.approx(scale * found.drift, rel=1e-6, abs=1e-9)
    assert other.drift_error == pytest.approx(scale * found.drift_error, rel=1e-6)


def test_one_order_for_every_pass_cannot_tell():
    order = np.tile(np.random.default_rng(0).permutation(200), 5)
    found = revisits(order, np.arange(1000) / 200, np.linspace(3, 2, 1000))
    assert (found.drift, found.gain, found.reason) == (None, None, SAME_ORDER)
    assert found.pairs == 200


def test_too_few_pairs_or_passes_cannot_tell():
    order, times = shuffled(5, samples=MIN_PAIRS - 1)
    found = revisits(order, times, np.zeros(len(order)))
    assert found.drift is None
    assert found.reason == f"{MIN_PAIRS - 1} pairs of visits in the last pass, fewer than {MIN_PAIRS}"
    order, times = shuffled(5)
    assert revisits(order, times, np.zeros(1000), now=1.99).reason == TOO_FEW_PASSES
    assert revisits(order, times, np.zeros(1000), now=1.995).drift == pytest.approx(0, abs=1e-9)  # the last of pass two
    assert revisits(order, times, np.zeros(1000), now=2.0).drift == pytest.approx(0, abs=1e-9)
    assert revisits([], [], []).reason == TOO_FEW_PASSES


def test_losses_that_are_not_finite_are_left_out():
    order, times = shuffled(4)
    losses = losses_of(order, times, slope=-0.1, gain=0.2)
    losses[::9], losses[1::50] = np.nan, np.inf
    found = revisits(order, times, losses)
    assert found.drift == pytest.approx(-0.1, abs=1e-9)
    assert revisits(order, times, np.full(800, np.nan)).drift is None


def test_changes_without_bound_have_no_fit():
    order, times = shuffled(4)
    losses = losses_of(order, times, slope=0.0, gain=0.0)
    losses[1::2] *= 1e300
    found = revisits(order, times, losses)
    assert found.drift is None or np.isfinite([found.drift, found.drift_error]).all()
    assert found.reason in (None, UNEVEN)


@pytest.mark.parametrize(
    ("samples", "times", "losses", "message"),
    [
        ([1, 2], [0.0], [1.0, 2.0], r"of one axis and one length, found shapes \(2,\), \(1,\) and \(2,\)"),
        ([[1, 2]], [[0.0, 1.0]], [[1.0, 2.0]], "one axis"),
        ([1], [np.nan], [1.0], "times: expected finite numbers of passes"),
    ],
)
def test_wrong_arrays_are_refused(samples, times, losses, message):
    with pytest.raises(InputError, match=message):
        revisits(samples, times, losses)
