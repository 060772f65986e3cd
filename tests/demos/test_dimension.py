"""The independent dimension, against logits whose number of frequencies is known by construction."""

from __future__ import annotations

import numpy as np
import pytest

from logalign.demos.dimension import frequency_planes, function_dimension, mean_margin
from logalign.errors import InputError

P = 59


def answers(amplitudes: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Logits that answer every c with a sum of waves: z[c, c'] = sum_f a_f cos(2 pi f (c - c') / P)."""
    labels = np.arange(P)
    difference = labels[:, None] - labels[None, :]
    logits = np.zeros((P, P))
    for frequency, amplitude in amplitudes.items():
        logits += amplitude * np.cos(2 * np.pi * frequency * difference / P)
    return logits, labels


def test_planes_and_constant_are_an_orthonormal_basis():
    basis = np.concatenate([frequency_planes(P).reshape(P - 1, P), np.full((1, P), P**-0.5)])
    np.testing.assert_allclose(basis @ basis.T, np.eye(P), atol=1e-12)


def test_mean_margin_by_hand():
    logits = np.array([[3.0, 1.0, 2.0], [0.0, 5.0, 6.0]])
    assert mean_margin(logits, np.array([0, 1])) == pytest.approx((1.0 - 1.0) / 2)
    assert logits[0, 0] == 3.0


@pytest.mark.parametrize("frequencies", [(1,), (3, 17), (2, 9, 20, 29)])
def test_counts_the_frequencies_that_were_put_in(frequencies):
    found = function_dimension(*answers(dict.fromkeys(frequencies, 1.0)))
    assert found.frequencies == frequencies
    assert found.dimension == found.additive_dimension == found.energy_dimension == 2 * len(frequencies)


def test_additive_count_sees_a_wave_that_leaves_the_nearest_competitor_alone():
    found = function_dimension(*answers(dict.fromkeys((2, 9, 11, 20, 29), 1.0)))
    assert found.frequencies == (2, 9, 11, 29)
    assert found.additive_dimension == 10
    np.testing.assert_allclose(found.additive_share[[1, 8, 10, 19, 28]], 0.2, rtol=1e-9)


def test_a_constant_and_a_faint_wave_do_not_count():
    logits, labels = answers({4: 1.0, 7: 1.0, 12: 0.005})
    found = function_dimension(logits + 100.0, labels)
    assert found.frequencies == (4, 7)
    assert found.energy_dimension == 4
    assert found.energy_share.sum() == pytest.approx(1.0)


def test_energy_that_no_answer_rests_on_counts_for_energy_only():
    """A wave whose phase is random from pair to pair carries energy, but removing it helps the margin."""
    logits, labels = answers({4: 2.0, 7: 2.0, 15: 2.0})
    phases = np.random.default_rng(0).uniform(0, 2 * np.pi, P)
    classes = np.arange(P)
    logits += 0.5 * np.cos(2 * np.pi * 21 * classes[None, :] / P + phases[:, None])
    found = function_dimension(logits, labels)
    assert found.frequencies == (4, 7, 15)
    assert found.additive_dimension == 6
    assert found.energy_dimension == 8
    assert found.margin_drop[20] < 0


def test_removing_a_plane_from_the_logits_is_removing_it_from_the_weight():
    generator = np.random.default_rng(1)
    weight, inputs = generator.normal(size=(P, 16)), generator.normal(size=(200, 16))
    logits = inputs @ weight.T
    labels = logits.argmax(axis=1)
    found = function_dimension(logits, labels)
    plane = frequency_planes(P)[4]
    shorter = inputs @ (weight - plane.T @ (plane @ weight)).T
    expected = 1 - mean_margin(shorter, labels) / mean_margin(logits, labels)
    assert found.margin_drop[4] == pytest.approx(expected, rel=1e-9)


def test_undefined_where_nothing_generalizes():
    logits, labels = answers({4: 1.0})
    found = function_dimension(logits, np.roll(labels, 20))
    assert found.margin < 0
    assert found.dimension is None
    assert found.frequencies == ()
    assert found.energy_dimension == 2


def test_constant_logits_have_no_dimension():
    found = function_dimension(np.full((4, 7), 3.0), np.arange(4))
    assert found.dimension is None
    assert found.additive_dimension is None
    assert found.energy_dimension is None


@pytest.mark.parametrize("p", [-1, 0, 3, 4, 58])
def test_refuses_even_and_small_p(p):
    with pytest.raises(InputError, match=f"odd number of at least 5, found {p}"):
        frequency_planes(p)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [(np.zeros((0, 7)), np.zeros(0)), (np.zeros((3, 7)), np.zeros(4)), (np.full((3, 7), np.nan), np.zeros(3))],
)
def test_refuses_logits_it_cannot_judge(logits, labels):
    with pytest.raises(InputError, match=r"expected logits|not finite"):
        function_dimension(logits, labels.astype(np.int64))
