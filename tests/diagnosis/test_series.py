import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logalign import Reading
from logalign.diagnosis.series import COLUMNS, Series
from logalign.errors import InputError


def row_of(reading):
    """Step and columns of a reading, as a series keeps them."""
    series = Series()
    assert series.add(reading)
    return [series.last_step, *(series.recent(name)[-1] for name in COLUMNS)]


def test_the_loss_is_the_mean_since_the_reading_before_and_so_are_the_passes():
    series = Series()
    for step, epoch in ((0, 0.0), (10, 0.5), (20, 1.0), (30, 1.5)):
        series.add(Reading(step=step, lar=0.5, epoch=epoch, loss=9.0, loss_mean=3.0))
    assert series.recent("loss").tolist() == [3.0] * 4
    # Of the ten steps up to step 20, with 20 steps a pass, one is of the second pass.
    assert series.recent("completed").tolist() == pytest.approx([0, 0, 0.1, 1])
    series.add(Reading(step=40, lar=0.5, epoch=2.0, loss=9.0))
    assert (series.last("loss"), series.last("completed")) == (9.0, 2.0)


def fed(*readings, recent=8, capacity=16):
    """The series of these readings, or of (step, lar) pairs."""
    series = Series(recent=recent, capacity=capacity)
    for each in readings:
        reading = each if isinstance(each, Reading) else Reading(step=each[0], lar=each[1])
        series.check(reading)
        if series.goes_back(reading):
            series.rewind(reading.step)
        series.add(reading)
    return series


def test_columns_of_a_reading():
    reading = Reading(
        step=3,
        lar=0.5,
        lar_centered=0.4,
        loss=2.0,
        epoch=1.5,
        lr=1e-3,
        tokens_seen=4096,
        extra={"val_loss": 9.0},
    )
    row = dict(zip(("step", *COLUMNS), row_of(reading), strict=True))
    assert math.isnan(row.pop("lar_vocab_centered"))
    assert math.isnan(row.pop("lar_token_centered"))
    for name in ("drift", "drift_error", "gain", "gain_error"):
        assert math.isnan(row.pop(name))
    assert row == {
        "step": 3, "lar": 0.5, "lar_centered": 0.4, "loss": 2.0, "epoch": 1.5, "completed": 1.0, "lr": 1e-3,
        "tokens_seen": 4096,
    }  # fmt: skip


def test_a_number_that_measures_nothing_is_unknown():
    row = row_of(Reading(step=0, lar=0.5, lar_centered=7.0, loss=1e200))
    assert [name for name, value in zip(("step", *COLUMNS), row, strict=True) if not math.isnan(value)] == [
        "step",
        "lar",
    ]


def test_what_has_no_possible_lar_is_passed_over_and_counted():
    series = fed((0, 0.5), (10, None), (20, 1.5), (30, -1e9), (40, 0.6))
    assert (series.taken, series.skipped, series.resumes) == (2, 3, 0)
    assert series.steps.tolist() == [0, 40]
    assert series.recent("lar").tolist() == [0.5, 0.6]
    assert series.last_step == 40


def test_a_step_that_was_there_is_replaced_and_a_step_back_forgets_what_came_after():
    assert fed((0, 0.5), (10, 0.6), (10, 0.7)).recent("lar").tolist() == [0.5, 0.7]
    series = fed((0, 0.5), (10, 0.6), (20, 0.7), (30, 0.8), (15, 0.9))
    assert series.steps.tolist() == [0, 10, 15]
    assert series.recent("lar").tolist() == [0.5, 0.6, 0.9]
    assert series.history.x.tolist() == [0, 10, 15]
    assert series.resumes == 1
    undefined = fed((0, 0.5), (10, 0.6), (0, None))
    assert undefined.last_step is None
    assert undefined.history.size == 0


def test_after_a_resume_far_back_older_readings_come_back_from_the_history():
    assert fed(*((step, step / 100) for step in range(12)), (4, 0.9)).steps.tolist() == [0, 1, 2, 3, 4]
    series = fed(*((step, step / 100) for step in range(50)), (30, 0.9))
    # By then four readings share a bin of the history.
    assert series.steps.tolist() == [3, 7, 11, 15, 19, 23, 27, 30]
    assert series.recent("lar", 2) == pytest.approx([0.255, 0.9])


def test_only_the_last_readings_are_kept_as_they_are():
    series = fed(*((step, step / 100) for step in range(50)))
    assert series.steps.tolist() == list(range(42, 50))
    assert series.recent("lar", 3).tolist() == [0.47, 0.48, 0.49]
    assert series.recent("lar", 99).size == 8
    assert series.history.size * series.history.stride == 48
    assert series.last("lar") == 0.49
    assert series.last("loss") is None
    assert Series().last("lar") is None


def test_the_whole_past_is_the_last_readings_and_coarser_bins_before_them():
    assert [each.tolist() for each in Series().past("lar")] == [[], []]
    steps, lar = fed(*((step, step / 100) for step in range(6))).past("lar")
    assert steps.tolist() == list(range(6))
    assert lar.tolist() == [step / 100 for step in range(6)]
    series = fed(*((step, step / 100) for step in range(50)))
    steps, lar, loss = series.past("lar", "loss")
    # Bins of four readings up to step 39, then the eight last readings; 40 and 41 share a bin with two of these.
    assert series.history.stride == 4
    assert steps.tolist() == [1.5 + 4 * i for i in range(10)] + list(range(42, 50))
    assert lar == pytest.approx(steps / 100)
    assert np.isnan(loss).all()


def test_the_whole_past_after_a_resume():
    near = fed(*((step, step / 100) for step in range(50)), (46, 0.9))
    # Rows that came back from the history stand at the last steps of their bins, with the bins' means.
    assert near.past("lar")[0].tolist() == [1.5 + 4 * i for i in range(7)] + [31, 35, 39, 42, 43, 44, 45, 46]
    assert near.past("lar")[1][-6:].tolist() == pytest.approx([0.375, 0.42, 0.43, 0.44, 0.45, 0.9])
    far = fed(*((step, step / 100) for step in range(50)), (30, 0.9))
    steps, lar = far.past("lar")
    assert steps.tolist() == [3, 7, 11, 15, 19, 23, 27, 30]
    assert lar.tolist() == pytest.approx([0.015, 0.055, 0.095, 0.135, 0.175, 0.215, 0.255, 0.9])
    assert Series.from_state(json.loads(json.dumps(far.state()))).past("lar")[1].tolist() == lar.tolist()


@settings(deadline=None)
@given(jumps=st.lists(st.integers(-12, 4), max_size=120))
def test_the_steps_of_the_whole_past_always_rise(jumps):
    series, step = Series(recent=8, capacity=16), 0
    for jump in jumps:
        step = max(0, step + jump)
        reading = Reading(step=step, lar=0.5, epoch=step / 7, loss=1.0, loss_mean=1.0)
        if series.goes_back(reading):
            series.rewind(step)
        series.add(reading)
        steps, completed = series.past("completed")
        assert np.all(np.diff(steps) > 0)
        assert steps[-1] == step
        assert np.isfinite(completed).all()
        back = Series.from_state(json.loads(json.dumps(series.state(), allow_nan=False)))
        assert all(
            np.array_equal(a, b, equal_nan=True)
            for a, b in zip(series.past(*COLUMNS), back.past(*COLUMNS), strict=True)
        )


def test_readings_of_another_layer_or_shape_are_refused():
    with pytest.raises(InputError) as caught:
        fed((0, 0.5), Reading(step=10, lar=0.5, site="body"))
    assert str(caught.value) == (
        "step 10: expected a reading of 'unembedding', found one of 'body'; give each layer a detector of its own"
    )
    with pytest.raises(InputError) as caught:
        fed(Reading(step=0, lar=0.5, n=64, m=512), Reading(step=5, lar=0.5), Reading(step=10, lar=0.5, n=64, m=500))
    assert str(caught.value) == (
        "step 10: expected readings of one layer, with m = 512, found m = 500; diagnose runs of different models "
        "one by one"
    )


@given(
    steps=st.lists(st.integers(0, 30), max_size=40),
    lars=st.lists(st.none() | st.floats(allow_nan=False), min_size=40, max_size=40),
)
def test_steps_always_rise_and_state_is_complete(steps, lars):
    series = Series(recent=8, capacity=16)
    for step, lar in zip(steps, lars, strict=False):
        reading = Reading(step=step, lar=lar, loss=lar)
        series.check(reading)
        if series.goes_back(reading):
            series.rewind(step)
        series.add(reading)
        assert np.all(np.diff(series.steps) > 0)
        assert np.all(np.diff(series.history.x) > 0)
        series = Series.from_state(json.loads(json.dumps(series.state(), allow_nan=False)))
    assert series.state() == Series.from_state(series.state()).state()
