"""The signals of a decline that need no baseline: closed forms, where nothing can be told, and whatever a log holds."""

import math
import warnings
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logalign import Reading
from logalign.diagnosis.decline import spread
from logalign.diagnosis.repetition import RepetitionMemory
from logalign.diagnosis.series import Series

EVERY = 10
HOLD = 3


def series_of(readings):
    series = Series()
    for reading in readings:
        series.check(reading)
        if series.goes_back(reading):
            series.rewind(reading.step)
        series.add(reading)
    return series


def remembered(readings, form):
    """What is remembered of readings, warm-up and all."""
    series, memory = Series(), RepetitionMemory()
    for reading in readings:
        if series.goes_back(reading):
            series.rewind(reading.step)
            memory.rewind(reading.step)
        if series.add(reading):
            memory.follow(series, form, counts=True)
    return memory


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
        found = remembered(readings, "lar").held(hold)
        grown = spread(series, "lar_vocab_centered", hold=hold)
    if found is not None:
        assert all(map(math.isfinite, asdict(found).values()))
    assert grown is None or 1 <= grown < math.inf
