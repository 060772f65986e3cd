import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logalign.report.thin import kept_rows

VALUES = st.one_of(st.floats(-1e6, 1e6), st.just(np.nan))


@given(
    st.integers(1, 400).flatmap(lambda n: st.lists(st.lists(VALUES, min_size=n, max_size=n), min_size=1, max_size=4)),
    st.integers(1, 120),
)
def test_no_extreme_of_any_curve_is_lost_and_no_row_is_made_up(curves, most):
    curves = [np.array(curve) for curve in curves]
    rows = kept_rows(curves, most=most)
    assert (np.diff(rows) > 0).all()
    assert rows[0] == 0
    assert rows[-1] == len(curves[0]) - 1
    assert len(rows) <= max(most, 3 * len(curves) + 2)
    for curve in curves:
        if np.isfinite(curve).any():
            assert np.nanmax(curve[rows]) == np.nanmax(curve)
            assert np.nanmin(curve[rows]) == np.nanmin(curve)
        # A run that is undefined somewhere is drawn so.
        assert np.isnan(curve[rows]).any() == np.isnan(curve).any() or np.isnan(curve).all()


def test_every_bucket_keeps_its_own_extremes():
    noise = np.random.default_rng(0).normal(size=(2, 100_000))
    rows = kept_rows(list(noise), most=4_000)
    edges = np.linspace(0, 100_000, 4_000 // 8 + 1).astype(int)
    kept = np.zeros(100_000, dtype=bool)
    kept[rows] = True
    for start, end in itertools.pairwise(edges):
        for curve in noise:
            assert kept[start + curve[start:end].argmax()]
            assert kept[start + curve[start:end].argmin()]


@pytest.mark.parametrize("spike", [0, 1, 333_333, 999_998, 999_999])
def test_one_spike_in_a_million_is_kept(spike):
    curve = np.full(1_000_000, 0.5)
    curve[spike] = 0.9
    assert spike in kept_rows([curve, np.zeros(1_000_000)], most=6_000)
