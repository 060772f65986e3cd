"""The signals of a decline that need no baseline: closed forms, where nothing can be told, and whatever a log holds."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logalign import Reading
from logalign.diagnosis.decline import lately, repetition, spread
from logalign.diagnosis.series import Series

EVERY, STEPS_PER_PASS = 10, 100
HOLD = 3


def passing(count=60, *, inside=-0.001, drop=0.2, rate=0.05, steps_per_pass=STEPS_PER_PASS, **without):
    """Readings of a run whose loss changes by `inside` a step and drops with every pass, while LAR falls by `rate`."""
    found = []
    for step in range(0, EVERY * count, EVERY):
        given = {
            "epoch": step / steps_per_pass,
            "loss": 5 + inside * step - drop * math.floor(step / steps_per_pass),
        } | without
        found.append(Reading(step=step, lar=1.0 - rate * math.log(step + 1e-9) if step else 1.0, n=64, m=512, **given))
    return found


def series_of(readings):
    series = Series()
    for reading in readings:
        series.check(reading)
        if series.goes_back(reading):
            series.rewind(reading.step)
        series.add(reading)
    return series


# Repetition --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [60, 300, 2000])
def test_learning_memorizing_and_decline_have_closed_forms(count):
    found = repetition(series_of(passing(count)), "lar", hold=HOLD)
    first, last = EVERY * (count - HOLD), EVERY * (count - 1)
    assert found is not None
    # Memorization grows with the step here, so the least of the last readings is the first of them.
    assert found.memorization == pytest.approx(0.2 / STEPS_PER_PASS * first, rel=1e-6)
    assert found.learning == pytest.approx(0.001 * last, rel=1e-6)
    assert found.decline == pytest.approx(0.05, rel=1e-2)
    assert found.steps_per_pass == pytest.approx(STEPS_PER_PASS)


def test_learning_is_negative_where_the_loss_rises_inside_passes():
    found = repetition(series_of(passing(inside=0.002)), "lar", hold=HOLD)
    assert found is not None
    # The largest of the last readings: the first, for a rise grows with the step.
    assert found.learning == pytest.approx(-0.002 * EVERY * (60 - HOLD), rel=1e-6)


def test_one_reading_alone_moves_nothing_for_the_least_of_the_last_ones_counts():
    readings = passing(rate=0.0)
    steady = repetition(series_of(readings), "lar", hold=HOLD)
    readings[-1] = Reading(step=readings[-1].step, lar=0.1, loss=0.0, epoch=readings[-1].epoch, n=64, m=512)
    jumped = repetition(series_of(readings), "lar", hold=HOLD)
    assert steady is not None
    assert jumped is not None
    assert jumped.decline == pytest.approx(steady.decline, abs=1e-9)


def test_a_reading_is_seen_only_with_those_before_it_held():
    first = {}
    for hold in (1, HOLD):
        series = Series()
        for reading in passing():
            series.add(reading)
            if repetition(series, "lar", hold=hold) is not None:
                first[hold] = reading.step
                break
    assert first[HOLD] == first[1] + EVERY * (HOLD - 1)


@pytest.mark.parametrize(
    "readings",
    [
        [],
        passing(2),
        passing(epoch=None),
        passing(loss=None),
        passing(steps_per_pass=10_000),  # nothing has repeated
        passing(steps_per_pass=10),  # a pass is one reading long
        passing(epoch=7.0),  # time stands still
    ],
    ids=["empty", "two", "no epoch", "no loss", "first pass", "short passes", "constant epoch"],
)
def test_where_passes_cannot_be_seen_there_is_no_repetition(readings):
    assert repetition(series_of(readings), "lar", hold=HOLD) is None


def test_of_a_form_that_is_not_recorded_there_is_no_repetition():
    assert repetition(series_of(passing()), "lar_centered", hold=HOLD) is None


# The slope over the last factor of 1.8 -----------------------------------------------------------------------------


def test_the_slope_of_a_straight_line_in_log_step():
    steps = np.arange(0.0, 2000, 10)
    values = 0.8 - 0.07 * np.log(np.maximum(steps, 1))
    assert lately(steps, values) == pytest.approx(-0.07, rel=1e-9)


def test_only_the_last_factor_in_steps_counts_and_one_outlier_does_not():
    steps = np.arange(10.0, 2000, 10)
    values = np.where(steps < 1000, 5.0, 0.8 - 0.07 * np.log(steps))
    assert lately(steps, values) == pytest.approx(-0.07, rel=1e-9)
    values[150] = 0.0
    assert lately(steps, values) == pytest.approx(-0.07, rel=1e-3)
    values[160] = np.nan
    assert lately(steps, values) == pytest.approx(-0.07, rel=1e-2)


def test_where_there_is_no_slope():
    steps = np.arange(100.0, 200, 10)
    assert lately(np.empty(0), np.empty(0)) is None
    assert lately(np.zeros(1), np.zeros(1)) is None
    assert lately(steps[:6], steps[:6]) is None  # medians of three leave four
    assert lately(steps[:7], steps[:7]) is not None
    assert lately(steps, np.full(steps.size, np.nan)) is None


def test_very_large_steps_have_a_slope():
    steps = 2.0**53 + 2 * np.arange(20.0)  # their logarithms are all the same number
    assert lately(steps, steps) == pytest.approx(2.0**53, rel=0.2)  # a step has a few bits left


# Spread ------------------------------------------------------------------------------------------------------------


def classifying(lars, *, n=64):
    return [Reading(step=EVERY * i, lar=0.5, lar_vocab_centered=lar, n=n, m=10) for i, lar in enumerate(lars)]


def test_spread_is_the_growth_of_k():
    lars = [0.8] * 20 + [0.7] * 20
    assert spread(series_of(classifying(lars)), "lar_vocab_centered", hold=HOLD) == pytest.approx(64 ** (2 * 0.1))
    assert spread(series_of(classifying([0.7] * 40)), "lar_vocab_centered", hold=HOLD) == 1
    rising = series_of(classifying(np.linspace(0.5, 0.9, 40)))
    assert spread(rising, "lar_vocab_centered", hold=HOLD) == 1


def test_the_rise_from_the_initial_value_and_single_readings_are_not_the_lowest_k():
    lars = [0.99, 0.99] + [0.7] * 10 + [0.99, 0.99] + [0.7] * 20
    assert spread(series_of(classifying(lars)), "lar_vocab_centered", hold=HOLD) == 1


def test_spread_is_the_least_of_the_last_ones():
    fallen = [0.8] * 20 + [0.6] * 5
    assert spread(series_of(classifying(fallen[:-1])), "lar_vocab_centered", hold=HOLD) == 1
    # The last three medians: two of readings before the fall and one after it, then all after it.
    assert spread(series_of(classifying([*fallen, 0.6, 0.6])), "lar_vocab_centered", hold=HOLD) == pytest.approx(
        64 ** (2 * 0.2)
    )


def test_where_there_is_no_spread():
    lars = [0.8] * 20
    assert spread(series_of(classifying(lars, n=None)), "lar_vocab_centered", hold=HOLD) is None
    assert spread(series_of(classifying(lars)), "lar_centered", hold=HOLD) is None
    assert spread(series_of(classifying(lars[:8])), "lar_vocab_centered", hold=HOLD) is None
    assert spread(series_of(classifying(lars[:9])), "lar_vocab_centered", hold=HOLD) == 1
    assert spread(series_of([]), "lar_vocab_centered", hold=HOLD) is None
    beyond_floats = series_of(classifying([0.8] * 20 + [-500.0] * 20))
    assert spread(beyond_floats, "lar_vocab_centered", hold=HOLD) is None


# Whatever a log may hold -------------------------------------------------------------------------------------------

NUMBERS = st.none() | st.floats() | st.floats(-1, 2)
READINGS = st.builds(
    Reading,
    step=st.integers(0, 60) | st.integers(0, 10**18),
    lar=NUMBERS | st.floats(-2000, 1),
    lar_vocab_centered=NUMBERS | st.floats(-2000, 1),
    loss=NUMBERS,
    loss_mean=NUMBERS,
    epoch=NUMBERS | st.floats(0, 20),
    n=st.none() | st.just(64),
)


@settings(deadline=None, max_examples=150)
@given(readings=st.lists(READINGS, max_size=60), hold=st.integers(1, 4), ordered=st.booleans())
def test_junk_gives_finite_numbers_or_none(readings, hold, ordered):
    if ordered:
        readings = sorted(readings, key=lambda reading: (reading.step, reading.epoch or 0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        series = series_of(readings)
        found = repetition(series, "lar", hold=hold)
        grown = spread(series, "lar_vocab_centered", hold=hold)
    if found is not None:
        assert all(map(math.isfinite, (found.memorization, found.learning, found.decline, found.steps_per_pass)))
        assert found.steps_per_pass > 0
    assert grown is None or 1 <= grown < math.inf
