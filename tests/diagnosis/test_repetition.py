"""What passes make of a run: closed forms, where nothing can be told, and what is remembered over a resume."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from logalign import Reading
from logalign.diagnosis.repetition import REMEMBERED, RepetitionMemory, lately
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


def follow(readings, form="lar", *, series=None, memory=None, counts=True):
    """The series and the memory of readings, gone back where these do."""
    series, memory = series or Series(), memory or RepetitionMemory()
    for reading in readings:
        if series.goes_back(reading):
            series.rewind(reading.step)
            memory.rewind(reading.step)
        if series.add(reading):
            memory.follow(series, form, counts=counts)
    return series, memory


def held(readings, form):
    return follow(readings, form)[1].held(HOLD)


@pytest.mark.parametrize("count", [60, 300, 2000])
def test_learning_memorizing_and_decline_have_closed_forms(count):
    found = held(passing(count), "lar")
    first, last = EVERY * (count - HOLD), EVERY * (count - 1)
    assert found is not None
    # Memorization grows with the step here, so the least of the last readings is the first of them.
    assert found.memorization == pytest.approx(0.2 / STEPS_PER_PASS * first, rel=1e-6)
    assert found.learning == pytest.approx(0.001 * last, rel=1e-6)
    assert found.decline == pytest.approx(0.05, rel=1e-2)


def test_learning_is_negative_where_the_loss_rises_inside_passes():
    found = held(passing(inside=0.002), "lar")
    assert found is not None
    # The largest of the last readings: the first, for a rise grows with the step.
    assert found.learning == pytest.approx(-0.002 * EVERY * (60 - HOLD), rel=1e-6)


def test_one_reading_alone_moves_nothing_for_the_least_of_the_last_ones_counts():
    readings = passing(rate=0.0)
    steady = held(readings, "lar")
    readings[-1] = Reading(step=readings[-1].step, lar=0.1, loss=0.0, epoch=readings[-1].epoch, n=64, m=512)
    jumped = held(readings, "lar")
    assert steady is not None
    assert jumped is not None
    assert jumped.decline == pytest.approx(steady.decline, abs=1e-9)


def test_a_reading_is_seen_only_with_those_before_it_held():
    first = {}
    for hold in (1, HOLD):
        series, memory = Series(), RepetitionMemory()
        for reading in passing():
            follow([reading], series=series, memory=memory)
            if memory.held(hold) is not None:
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
    assert held(readings, "lar") is None


def test_of_a_form_that_is_not_recorded_there_is_no_repetition():
    assert held(passing(), "lar_centered") is None


# Strain ------------------------------------------------------------------------------------------------------------


def test_strain_is_the_sum_of_memorization_times_decline_over_log_step():
    # Memorization is 0.2 / 100 * step, the decline 0.05: their integral over log(step) grows with the step.
    _, memory = follow(passing(60))
    start = memory.strain
    series, later = follow(passing(160))
    assert later.strain - start == pytest.approx(0.2 / STEPS_PER_PASS * 0.05 * 1000, rel=0.01)
    assert later.held(HOLD).strain == later.strain
    assert series.taken == 160


def test_strain_is_summed_only_where_it_counts_and_a_rising_lar_undoes_none():
    assert follow(passing(100), counts=False)[1].strain == 0
    series, memory = follow(passing(100))
    before = memory.strain
    rises = [replace(each, lar=0.3 + 0.05 * math.log(each.step)) for each in passing(250) if each.step >= 1000]
    follow(rises[:90], series=series, memory=memory)
    at_rest = memory.strain  # the last factor of 1.8 in steps is all rising
    assert at_rest >= before > 0
    follow(rises[90:], series=series, memory=memory)
    assert memory.strain == at_rest


@pytest.mark.parametrize("back", [1, 10, REMEMBERED - 1])
def test_a_resume_takes_back_what_was_summed_after_it(back):
    readings = passing(120)
    series, memory = follow(readings)
    again = readings[-back:]
    follow(again, series=series, memory=memory)
    assert memory.strain == pytest.approx(follow(readings)[1].strain, rel=1e-12)
    assert memory.held(HOLD) == follow(readings)[1].held(HOLD)


def test_a_resume_from_long_before_takes_back_the_strain_as_finely_as_it_is_known():
    readings = passing(1000)
    series, memory = follow(readings)
    follow(readings[300:], series=series, memory=memory)
    assert memory.strain == pytest.approx(follow(readings)[1].strain, rel=0.05)


def test_a_state_goes_on_the_same_and_does_not_grow():
    readings = passing(600)
    series, memory = follow(readings[:500])
    restored = RepetitionMemory.from_state(json.loads(json.dumps(memory.state(), allow_nan=False)))
    for reading in readings[500:]:
        series.add(reading)
        memory.follow(series, "lar", counts=True)
        restored.follow(series, "lar", counts=True)
    assert restored.state() == memory.state()
    assert len(memory.state()["last"]) == REMEMBERED


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
