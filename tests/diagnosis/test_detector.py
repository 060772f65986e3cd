"""The detector as a whole: regimes, online against offline, states, and whatever a log may hold."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logalign import Baseline, Reading, Readings, open_run
from logalign.diagnosis.detector import Detector, diagnose
from logalign.diagnosis.grokking import GrokDetector
from logalign.diagnosis.overfit_rule import OverfitThresholds
from logalign.diagnosis.overfitting import OverfitDetector
from logalign.errors import InputError, LogAlignError, RunError

DATA = Path(__file__).parents[1] / "data"
NAMES = ["ft_prose_to_python", "lm_fresh", "lm_repeat200k", "modadd59_wd0", "modadd59_wd1", "modadd67_wd1"]


def recorded(name):
    return open_run(DATA / f"{name}.jsonl").readings


def baseline_for(name):
    return Baseline.from_run(DATA / "lm_fresh.jsonl") if name.startswith("lm") else None


# Recorded runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "baseline", "outcome", "regime"),
    [
        ("lm_repeat200k", "lm_fresh", "overfitting", "decline"),
        ("lm_repeat200k", None, "overfitting", "decline"),
        ("ft_prose_to_python", None, "memorizing", "grokking"),
        ("lm_fresh", None, "healthy", "decline"),
        ("lm_fresh", "lm_fresh", "healthy", "decline"),
        ("modadd59_wd1", None, "generalizing", "grokking"),
        ("modadd67_wd1", None, "generalizing", "grokking"),
        ("modadd59_wd0", None, "memorizing", "grokking"),
    ],
)
def test_verdicts_on_recorded_runs(name, baseline, outcome, regime):
    verdict = diagnose(DATA / f"{name}.jsonl", baseline=None if baseline is None else DATA / f"{baseline}.jsonl")
    assert (verdict.outcome, verdict.regime) == (outcome, regime)
    json.dumps(verdict.record(), allow_nan=False)


@pytest.mark.parametrize("regime", ["auto", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_online_and_offline_agree_at_every_step_and_a_state_goes_on_the_same(name, regime):
    baseline, readings = baseline_for(name), recorded(name)
    online, carried = (Detector(baseline=baseline, regime=regime) for _ in range(2))
    for i, reading in enumerate(readings):
        verdict = online.update(reading)
        fresh = Detector(baseline=baseline, regime=regime)
        fresh.load_state_dict(json.loads(json.dumps(carried.state_dict(), allow_nan=False)))
        assert fresh.verdict == carried.verdict
        carried = fresh
        assert carried.update(reading) == verdict
        if i % 7 == 0 or i == len(readings) - 1:
            assert diagnose(readings[: i + 1], baseline=baseline, regime=regime) == verdict


@pytest.mark.parametrize("name", NAMES)
def test_judges_that_share_their_readings_say_what_each_says_alone(name):
    baseline, readings = baseline_for(name), recorded(name)
    readings = [*readings[:80], *readings[60:]]  # a resume
    detector = Detector(baseline=baseline)
    decline, grokking = OverfitDetector(baseline=baseline), GrokDetector()
    for reading in readings:
        detector.update(reading)
        assert detector.decline.verdict == decline.update(reading)
        assert detector.grokking.verdict == grokking.update(reading)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_offline_says_at_every_step_what_online_said(name):
    baseline, readings = baseline_for(name), recorded(name)
    online = Detector(baseline=baseline)
    for i, reading in enumerate(readings):
        assert online.update(reading) == diagnose(readings[: i + 1], baseline=baseline)


def test_thresholds_may_be_given():
    readings = recorded("ft_prose_to_python")[:60]
    assert diagnose(readings).outcome == "overfitting"
    cautious = OverfitThresholds(memorized=0.99)
    assert diagnose(readings, thresholds=cautious).outcome == "healthy"


# Regimes -----------------------------------------------------------------------------------------------------------


def test_the_regime_follows_the_training():
    detector = Detector()
    regimes = [detector.update(reading).regime for reading in recorded("modadd59_wd1")]
    first = regimes.index("grokking")
    assert set(regimes[:first]) == {"decline"}
    assert set(regimes[first:]) == {"grokking"}


def test_one_regime_only():
    assert diagnose(DATA / "modadd59_wd1.jsonl", regime="decline").regime == "decline"
    assert diagnose(DATA / "lm_repeat200k.jsonl", regime="grokking").outcome == "undecidable"
    assert diagnose([], regime="both").outcome == "undecidable"


def test_both_regimes():
    readings = recorded("modadd59_wd0")
    before_the_slingshot = [reading for reading in readings if reading.step <= 1000]
    verdict = diagnose(before_the_slingshot, regime="both")
    assert (verdict.outcome, verdict.regime) == ("memorizing", "grokking")
    assert "The decline regime says undecidable: the training data were fitted within the first" in verdict.reason
    assert {"plateau", "strain"} <= verdict.evidence.keys()
    assert diagnose(readings, regime="both").is_alarm


def interpolating(lar, *, epoch=5.0):
    """A classifier that has fitted its data by its second reading."""
    rng = np.random.default_rng(0)
    return [
        Reading(
            step=step,
            lar=lar + 1e-4 * rng.standard_normal(),
            loss=0.01 if step else math.log(59),
            m=59,
            n=64,
            epoch=epoch,
        )
        for step in range(0, 1000, 10)
    ]


def test_where_grokking_logic_has_nothing_to_say_decline_logic_speaks():
    few_directions = interpolating(0.8)
    assert diagnose(few_directions, baseline=Baseline.from_readings(few_directions)).outcome == "healthy"
    verdict = diagnose(few_directions)
    assert (verdict.outcome, verdict.regime) == ("undecidable", "grokking")
    assert "never sat on a memorization plateau" in verdict.reason
    assert "And: the training data were fitted within the first" in verdict.reason
    assert diagnose(interpolating(0.55, epoch=0.5)).outcome == "healthy"


def test_unknown_regime():
    for call in (lambda: Detector(regime="none"), lambda: diagnose([], regime="none")):
        with pytest.raises(InputError, match="regime: expected one of auto, grokking, decline, both, found 'none'"):
            call()


# What may be diagnosed ---------------------------------------------------------------------------------------------


def test_a_path_a_run_readings_and_what_a_monitor_holds():
    path = DATA / "modadd59_wd1.jsonl"
    verdict = diagnose(path)
    assert diagnose(str(path)) == diagnose(open_run(path)) == diagnose(iter(recorded("modadd59_wd1"))) == verdict
    many = [
        Readings({"unembedding": reading, "body": replace(reading, site="body", lar=0.1)}, main="unembedding")
        for reading in recorded("modadd59_wd1")
    ]
    assert diagnose(many) == verdict


def test_the_main_layer_is_judged(write_run):
    run = write_run(sites=("unembedding", "body"), epoch=0.5)
    assert diagnose(run).outcome == "healthy"
    assert diagnose(write_run("one", sites=("body",), epoch=0.5)).outcome == "healthy"
    with pytest.raises(InputError, match="expected readings of one layer or of 'unembedding', found a, b"):
        diagnose([Reading(step=0, lar=0.5, site="a"), Reading(step=0, lar=0.5, site="b")])


def test_nothing_to_diagnose(tmp_path):
    assert diagnose([]).reason == "no reading has been taken yet."
    with pytest.raises(RunError, match="found nothing there"):
        diagnose(tmp_path / "nowhere")


def test_a_baseline_may_be_several_runs():
    runs = [DATA / "lm_fresh.jsonl", DATA / "lm_repeat200k.jsonl"]
    of_paths = diagnose(recorded("lm_repeat200k"), baseline=runs)
    assert of_paths == diagnose(recorded("lm_repeat200k"), baseline=Baseline.from_run(*runs))
    assert of_paths != diagnose(recorded("lm_repeat200k"), baseline=runs[0])


def test_a_baseline_may_be_a_path_and_must_fit(write_run):
    run = write_run(epoch=3.0)
    assert diagnose(run, baseline=run.path) == diagnose(run, baseline=Baseline.from_run(run))
    with pytest.raises(InputError, match=r"expected a layer of the baseline's shape \(m, n\) = \(512, 128\)"):
        diagnose(run, baseline=write_run("wider", n=128))


def test_a_state_of_something_else_is_refused():
    with pytest.raises(InputError, match=r"expected what Detector.state_dict\(\) gives \(version 3\), found version 2"):
        Detector().load_state_dict({"version": 2})


def test_a_resumed_log_is_judged_as_if_it_had_not_been_interrupted():
    readings = recorded("modadd67_wd1")[:100]
    interrupted = [*readings[:60], *readings[50:]]
    plain, resumed = diagnose(readings), diagnose(interrupted)
    assert (resumed.outcome, resumed.since_step, resumed.evidence) == (
        plain.outcome,
        plain.since_step,
        plain.evidence,
    )
    assert any("taken as a resume" in limit for limit in resumed.limits)


# Whatever a log may hold -------------------------------------------------------------------------------------------

NUMBERS = st.none() | st.floats() | st.floats(-1, 2)
READINGS = st.builds(
    Reading,
    step=st.integers(0, 400) | st.integers(0, 10**15),
    lar=NUMBERS,
    lar_vocab_centered=NUMBERS,
    lar_centered=NUMBERS,
    loss=NUMBERS,
    lr=NUMBERS,
    epoch=NUMBERS,
    tokens_seen=st.none() | st.integers(0, 10**18),
    m=st.none() | st.just(59),
    n=st.none() | st.just(64),
    energies=st.none() | st.fixed_dictionaries({"weight": NUMBERS}),
)
QUIET = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@QUIET
@given(readings=st.lists(READINGS, max_size=60), regime=st.sampled_from(["auto", "both"]), based=st.booleans())
def test_junk_gives_a_verdict_or_one_clear_error_and_a_state_goes_on_the_same(readings, regime, based):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            baseline = Baseline.from_readings(readings) if based else None
        except LogAlignError:
            baseline = None
        detector, other = (Detector(baseline=baseline, regime=regime) for _ in range(2))
        for reading in readings:
            try:
                verdict = detector.update(reading)
            except LogAlignError:
                return
            json.dumps(verdict.record(), allow_nan=False)
            state = json.loads(json.dumps(other.state_dict(), allow_nan=False))
            other = Detector(baseline=baseline, regime=regime)
            other.load_state_dict(state)
            assert other.update(reading) == verdict


@QUIET
@given(
    lar=st.floats(-3, 1),
    loss=st.none() | st.floats(0, 10),
    epoch=st.none() | st.floats(0, 100),
    count=st.integers(1, 150),
    every=st.integers(1, 100),
    regime=st.sampled_from(["auto", "both", "grokking", "decline"]),
)
def test_a_constant_series_is_never_an_alarm(lar, loss, epoch, count, every, regime):
    detector = Detector(regime=regime)
    for i in range(count):
        reading = Reading(step=every * i, lar=lar, lar_centered=lar, loss=loss, epoch=epoch, m=59, n=64, lr=1e-3)
        assert not detector.update(reading).is_alarm


def test_three_readings():
    for lars in ([0.5, 0.5, 0.5], [0.9, 0.5, 0.1], [None, 0.5, None]):
        verdict = diagnose([Reading(step=step, lar=lar, loss=0.0, epoch=2.0) for step, lar in enumerate(lars)])
        assert verdict.outcome == "undecidable"
