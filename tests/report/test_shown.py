import json
from pathlib import Path

import numpy as np
import pytest

from logalign import Baseline, open_run
from logalign.errors import InputError
from logalign.report.shown import CURVES, axis_values, noise_band, shown_run
from logalign.report.thin import kept_rows
from tests.drifts import write_log

DATA = Path(__file__).parent.parent / "data"


def test_noise_band_holds_ninety_five_readings_in_a_hundred_and_a_trend_does_not_widen_it():
    noise = np.random.default_rng(0).normal(0, 0.01, 20_000)
    rows = np.arange(20_000)
    low, high = noise_band(noise, rows)
    known = np.isfinite(low)
    assert known.sum() == 20_000 - 20
    assert 0.9 < ((low <= noise) & (noise <= high))[known].mean() < 0.99
    assert np.median((high - low)[known]) == pytest.approx(0.04, rel=0.1)
    low, high = noise_band(noise + 0.05 * rows, rows)
    assert np.median((high - low)[known]) == pytest.approx(0.04, rel=0.1)


def test_smooth_curve_has_no_noise_and_a_short_one_no_band():
    values = np.linspace(0.5, 0.7, 100)
    low, high = noise_band(values, np.arange(100))
    assert np.nanmax(high - low) < 1e-12
    assert np.isnan(noise_band(values[:20], np.arange(20))[0]).all()


def test_undefined_readings_leave_the_band_undefined_around_them():
    values = np.random.default_rng(0).normal(size=100)
    values[50] = np.nan
    low, _ = noise_band(values, np.arange(100))
    assert np.isnan(low[40:61]).all()
    assert np.isfinite(low[[39, 61]]).all()


def test_baseline_is_where_the_baseline_is():
    baseline = Baseline.from_run(DATA / "lm_fresh.jsonl")
    run = shown_run(open_run(DATA / "lm_repeat200k.jsonl"), "run", baseline=baseline)
    band = baseline.band(run.drawn["tokens_seen"], form="lar", axis="tokens")
    np.testing.assert_array_equal(run.drawn["base_lar"], band.center)
    width = run.drawn["base_lar_high"] - run.drawn["base_lar"]
    np.testing.assert_allclose(width[np.isfinite(width)], 2 * np.hypot(0.007, band.scatter))


def test_k_is_made_from_lar_where_it_was_not_recorded():
    run = shown_run(open_run(DATA / "lm_repeat200k.jsonl"), "run")
    np.testing.assert_allclose(run.drawn["effective_dim"], 128.0 ** (2 * (1 - run.drawn["lar"])))
    np.testing.assert_allclose(run.drawn["k_centered"], 128.0 ** (2 * (1 - run.drawn["lar_centered"])))


def test_a_thinned_run_keeps_the_extremes_of_drift(tmp_path):
    log = write_log(tmp_path / "run.jsonl", of=2000)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    records[1234]["drift"] = 0.75
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    run = shown_run(open_run(log), "run", rows=100)
    assert run.thinned
    assert 1234 in run.rows
    assert np.nanmax(run.drawn["drift"]) == 0.75


def test_a_run_without_drift_is_thinned_as_ever(tmp_path):
    bare = tmp_path / "bare.jsonl"
    rng = np.random.default_rng(0)
    bare.write_text("".join(json.dumps({"step": i, "lar": rng.normal(0.5, 0.1)}) + "\n" for i in range(2000)))
    run = shown_run(open_run(bare), "run", rows=100)
    curves = [run.columns[name].astype(float) for name in CURVES if name in run.columns]
    np.testing.assert_array_equal(run.rows, kept_rows(curves, most=100))


def test_axes_are_those_that_were_recorded(write_run):
    run = shown_run(write_run(), "run")
    assert list(axis_values(run.drawn)) == ["step", "tokens", "epoch"]
    bare = shown_run(write_run("bare", tokens_seen=None, epoch=None), "bare")
    assert list(axis_values(bare.drawn)) == ["step"]


def test_a_run_without_readings_is_an_error(write_run):
    with pytest.raises(InputError, match="at least one reading"):
        shown_run(write_run(lars=[]), "run")
