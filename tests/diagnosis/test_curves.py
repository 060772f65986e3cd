"""Bands against simulated training: how far runs lie from a baseline is known there."""

import numpy as np
import pytest

from logalign.diagnosis.curves import BaselineCurve


def test_one_series_is_interpolated_and_ends_where_it_ends():
    curve = BaselineCurve.of([(np.array([0.0, 10, 20]), np.array([0.5, 0.7, 0.6]))])
    band = curve.at(np.array([-1.0, 0, 4, 15, 20, 21]))
    assert band.center == pytest.approx([np.nan, 0.5, 0.58, 0.65, 0.6, np.nan], nan_ok=True)
    assert np.isnan(band.between).all()
    assert band.spacing == 10


def test_several_series_are_averaged_over_what_they_share():
    x = np.arange(0.0, 100, 10)
    curve = BaselineCurve.of([(x, x), (x[2:] + 5, 2 * (x[2:] + 5))])
    assert (curve.x[0], curve.x[-1]) == (25, 90)
    assert curve.mean == pytest.approx(1.5 * curve.x)
    assert BaselineCurve.of([(x, x), (x + 500, x)]) is None
    assert BaselineCurve.of([(x, x), (x[:0], x[:0])]) is None


def test_scatter_and_the_distance_between_runs_are_told_apart():
    rng = np.random.default_rng(0)
    x = np.arange(0.0, 3000, 10)
    levels = 0.02 * rng.standard_normal(40)
    runs = [(x, 0.7 + level + 0.006 * rng.standard_normal(x.size)) for level in levels]
    curve = BaselineCurve.of(runs)
    assert np.median(curve.between) == pytest.approx(levels.std(ddof=1) * np.sqrt(1 + 1 / 40), rel=0.05)
    assert curve.scatter == pytest.approx(0.006 / np.sqrt(40), rel=0.1)
    alike = BaselineCurve.of([(x, 0.7 + 0.006 * rng.standard_normal(x.size)) for _ in range(2)])
    assert np.median(alike.between) < 0.003


def test_a_few_readings_of_two_runs():
    x = np.array([0.0, 10, 20])
    curve = BaselineCurve.of([(x, np.array([0.5, 0.5, 0.5])), (x, np.array([0.6, 0.6, 0.6]))])
    assert curve.between == pytest.approx(np.sqrt(0.005 * 1.5))
