import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logalign.diagnosis.history import History
from logalign.diagnosis.robust import noise, running_median
from logalign.diagnosis.warm_up import MAX_WARM_UP_READINGS, warm_up_end
from logalign.errors import InputError

RNG = np.random.default_rng(0)

# Scatter and medians -----------------------------------------------------------------------------------------------


def test_noise_is_the_scatter_of_a_reading_whatever_the_trend():
    x = np.arange(5000)
    scatter = 0.006 * RNG.standard_normal(x.size)
    for trend in (0 * x, 1e-3 * x, np.log(x + 1), 1e-7 * x**2):
        assert noise(trend + scatter) == pytest.approx(0.006, rel=0.05)
    outliers = scatter.copy()
    outliers[::50] += 1.0
    assert noise(outliers) == pytest.approx(0.006, rel=0.15)


def test_noise_of_little():
    assert noise([1.0, 1.0, 1.0]) == 0
    assert math.isnan(noise([1.0, 2.0]))
    assert math.isnan(noise([]))


def test_running_median():
    assert running_median([1, 9, 2, 3, 4], 3).tolist() == [2, 3, 3]
    assert running_median([1, 2], 3).size == 0


# Warm-up and learning rate -----------------------------------------------------------------------------------------


def test_warm_up_ends_where_the_learning_rate_no_longer_rises():
    x = 10 * np.arange(50)
    lr = np.minimum(1.0, (x + 1) / 200)
    falling = -0.001 * x
    assert warm_up_end(x, falling, lr) == 200
    assert warm_up_end(x[:20], falling[:20], lr[:20]) is None
    sparse = lr.copy()
    sparse[1::2] = np.nan
    assert warm_up_end(x, falling, sparse) == 200


def test_without_a_learning_rate_warm_up_ends_at_the_first_maximum_and_not_before_ten_readings():
    x = 10 * np.arange(60)
    rise_and_fall = 0.5 + 0.3 * np.exp(-(((x - 200) / 80) ** 2)) + 1e-4 * RNG.standard_normal(x.size)
    assert warm_up_end(x, rise_and_fall) == pytest.approx(200, abs=20)
    assert warm_up_end(x[:21], rise_and_fall[:21]) is None
    assert warm_up_end(x, -0.001 * x) == 90
    assert warm_up_end(x[:9], -0.001 * x[:9]) is None


def test_warm_up_is_over_after_a_hundred_readings_at_the_latest():
    x = np.arange(150)
    assert warm_up_end(x[:99], 0.001 * x[:99]) is None
    assert warm_up_end(x, 0.001 * x) == MAX_WARM_UP_READINGS - 1
    assert warm_up_end(x, np.full(x.shape, 0.5)) == MAX_WARM_UP_READINGS - 1


# History -----------------------------------------------------------------------------------------------------------


def filled(count, *, capacity=16):
    history = History(("a", "b"), capacity=capacity)
    for i in range(count):
        history.append(i, 2.0 * i, math.nan if i % 2 else 1.0 * i)
    return history


def test_below_its_capacity_a_history_keeps_readings_as_they_are():
    history = filled(15)
    assert history.x.tolist() == list(range(15))
    assert history.y.tolist() == [2.0 * i for i in range(15)]
    assert np.isnan(history.column("b")[1::2]).all()


@pytest.mark.parametrize("count", [16, 17, 100, 1000, 4097])
def test_a_full_history_holds_means_of_equal_bins_over_the_whole_past(count):
    history = filled(count)
    assert 8 <= history.size < 16
    whole = count // history.stride * history.stride
    bins = np.arange(whole).reshape(-1, history.stride)
    assert history.x == pytest.approx(bins.mean(1))
    assert history.y == pytest.approx(2 * bins.mean(1))
    even = np.where(bins % 2, np.nan, bins)
    assert history.column("b") == pytest.approx(np.nanmean(even, axis=1))
    assert history.last_x == count - 1


def test_x_has_to_rise():
    history = History()
    history.append(5, 0.5)
    for x in (5, 4.5):
        with pytest.raises(InputError, match=rf"x: expected more than the last one, 5, found {x:g}"):
            history.append(x, 0.5)
    history.truncate(5)
    assert history.last_x is None
    assert history.append(5, 0.7)


def test_capacity_has_to_be_even():
    for capacity in (0, 3):
        with pytest.raises(InputError, match=rf"capacity: expected an even number from 2 on, found {capacity}"):
            History(capacity=capacity)


@given(count=st.integers(0, 80), x=st.integers(-1, 90))
def test_after_truncation_nothing_is_left_at_or_beyond(count, x):
    history = filled(count)
    history.truncate(x)
    assert history.last_x is None or history.last_x < x
    if count < 16:
        assert history.x.tolist() == list(range(max(0, min(count, x))))
    history.append(max(x, 0), 1.0, 1.0)


@given(before=st.integers(0, 70), after=st.integers(0, 70))
def test_state_goes_through_json_and_goes_on_as_if_nothing_had_happened(before, after):
    history = filled(before)
    resumed = History.from_state(json.loads(json.dumps(history.state(), allow_nan=False)))
    for i in range(before, before + after):
        closed = history.append(i, 2.0 * i, math.nan)
        assert resumed.append(i, 2.0 * i, math.nan) == closed
    assert resumed.state() == history.state()
    assert np.array_equal(resumed.column("b"), history.column("b"), equal_nan=True)
