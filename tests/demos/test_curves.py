"""The rules by which the demos say that a curve fell, turned up, or goes with another."""

import numpy as np
import pytest

from logalign.demos.curves import first_fall, rank_correlation, turning_point, value_at

STEPS = np.arange(0, 100, 10)


def test_a_fall_is_known_at_the_third_reading_below():
    values = [0.5, 0.7, 0.8, 0.79, 0.77, 0.77, 0.77, 0.6, 0.6, 0.6]
    assert first_fall(STEPS, values) == 60


def test_two_low_readings_are_no_fall():
    assert first_fall(STEPS, [0.8, 0.7, 0.7, 0.8, 0.7, 0.7, 0.8, 0.7, 0.7, 0.8]) is None


def test_a_rising_or_flat_curve_does_not_fall():
    assert first_fall(STEPS, np.linspace(0.5, 0.8, 10)) is None
    assert first_fall(STEPS, np.full(10, 0.8) - 0.015 * (STEPS > 30)) is None


def test_a_fall_uses_the_past_only():
    values = np.array([0.5, 0.7, 0.8, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7])
    known = first_fall(STEPS, values)
    assert known == 50
    later = values.copy()
    later[6:] = 0.9
    assert first_fall(STEPS, later) == known


def test_undefined_readings_are_passed_over():
    assert first_fall(STEPS, [0.8, np.nan, 0.7, np.nan, 0.7, 0.7, np.nan, 0.7, 0.7, 0.7]) == 50
    assert first_fall(STEPS, np.full(10, np.nan)) is None


def test_the_turning_point_is_within_a_reading_of_the_lowest_value_and_an_outlier_does_not_move_it():
    steps = np.arange(0, 210, 10)
    values = 1.0 + ((steps - 80.0) / 100) ** 2
    turn = turning_point(steps, values)
    assert turn == pytest.approx(80, abs=10)
    values[2] = 0.1
    assert turning_point(steps, values) == turn


@pytest.mark.parametrize("values", [np.linspace(2, 1, 10), np.full(10, 1.0), [2, 1, 1, 1, 1, 1, 1, 1.04, 1.04, 1.04]])
def test_a_curve_that_does_not_rise_has_no_turning_point(values):
    assert turning_point(STEPS, values) is None


def test_rank_correlation_against_hand_ranks():
    assert rank_correlation([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    # Ranks 1 2 3 against 2 1 3: 1 - 6 * 2 / (3 * 8) = 1/2.
    assert rank_correlation([1, 2, 3, np.nan], [20, 10, 30, 0]) == pytest.approx(0.5)


def test_rank_correlation_is_undefined_without_variation_or_data():
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert rank_correlation([1, 2], [1, 2]) is None


def test_value_at_the_nearest_reading():
    assert value_at(STEPS, STEPS * 2.0, 44) == 80.0
