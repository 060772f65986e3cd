"""Bands against simulated training: how far runs lie from a baseline is known there."""

from pathlib import Path

import numpy as np
import pytest

from logalign import open_run
from logalign.diagnosis.curves import DRIFT, Curve, LogTrend

DATA = Path(__file__).parents[1] / "data"


def test_one_series_is_interpolated_and_ends_where_it_ends():
    curve = Curve.of([(np.array([0.0, 10, 20]), np.array([0.5, 0.7, 0.6]))])
    band = curve.at(np.array([-1.0, 0, 4, 15, 20, 21]))
    assert band.center == pytest.approx([np.nan, 0.5, 0.58, 0.65, 0.6, np.nan], nan_ok=True)
    assert np.isnan(band.between).all()
    assert band.spacing == 10


def test_several_series_are_averaged_over_what_they_share():
    x = np.arange(0.0, 100, 10)
    curve = Curve.of([(x, x), (x[2:] + 5, 2 * (x[2:] + 5))])
    assert (curve.x[0], curve.x[-1]) == (25, 90)
    assert curve.mean == pytest.approx(1.5 * curve.x)
    assert Curve.of([(x, x), (x + 500, x)]) is None
    assert Curve.of([(x, x), (x[:0], x[:0])]) is None


def test_scatter_and_the_distance_between_runs_are_told_apart():
    rng = np.random.default_rng(0)
    x = np.arange(0.0, 3000, 10)
    levels = 0.02 * rng.standard_normal(40)
    runs = [(x, 0.7 + level + 0.006 * rng.standard_normal(x.size)) for level in levels]
    curve = Curve.of(runs)
    assert np.median(curve.between) == pytest.approx(levels.std(ddof=1) * np.sqrt(1 + 1 / 40), rel=0.05)
    assert curve.scatter == pytest.approx(0.006 / np.sqrt(40), rel=0.1)
    alike = Curve.of([(x, 0.7 + 0.006 * rng.standard_normal(x.size)) for _ in range(2)])
    assert np.median(alike.between) < 0.003


def test_a_few_readings_of_two_runs():
    x = np.array([0.0, 10, 20])
    curve = Curve.of([(x, np.array([0.5, 0.5, 0.5])), (x, np.array([0.6, 0.6, 0.6]))])
    assert curve.between == pytest.approx(np.sqrt(0.005 * 1.5))


def test_a_line_in_log_x_and_its_growing_uncertainty():
    rng = np.random.default_rng(1)
    x = np.arange(100.0, 400, 10)
    trend = LogTrend.of(x, 1.0 - 0.06 * np.log(x) + 0.005 * rng.standard_normal(x.size), drift=0.02)
    far = np.array([400.0, 800, 1600, 6400])
    band = trend.at(far)
    assert band.center == pytest.approx(1.0 - 0.06 * np.log(far), abs=0.02)
    assert np.all(np.diff(band.between) > 0)
    assert band.between[-1] > 0.02 * np.log(6400 / 390)
    assert np.isnan(trend.at(np.array([0.0, 99.0])).center).all()
    assert LogTrend.of(x[:4], x[:4], drift=0.0) is None


def test_without_drift_the_error_of_the_fit_is_that_of_repetitions():
    x = np.arange(100.0, 400, 10)
    found, errors = [], []
    for seed in range(200):
        noise = 0.005 * np.random.default_rng(seed).standard_normal(x.size)
        band = LogTrend.of(x, noise, drift=0.0).at(np.array([1000.0]))
        found.append(band.center[0])
        errors.append(band.between[0])
    assert np.median(errors) == pytest.approx(np.std(found), rel=0.25)


@pytest.mark.parametrize("form", DRIFT)
@pytest.mark.parametrize("end", [300, 400, 600, 800])
def test_drift_covers_what_a_healthy_run_did(form, end):
    columns = open_run(DATA / "lm_fresh.jsonl").columns()
    x, y = columns["step"].astype(float), columns[form]
    first = (x > 90) & (x <= end)
    trend = LogTrend.of(x[first], y[first], drift=DRIFT[form])
    later = x > 1.2 * end
    smooth = [np.median(y[later][i : i + 15] - trend.at(x[later][i : i + 15]).center) for i in range(later.sum() - 14)]
    band = trend.at(x[later][7 : 7 + len(smooth)])
    assert np.all(np.abs(smooth) < 2 * band.between)
