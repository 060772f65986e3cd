"""OverfitDetector on recorded runs of a small GPT whose held-out loss is known, and on series made by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from logalign import Baseline, Reading, open_run
from logalign.diagnosis.overfitting import OverfitDetector, OverfitThresholds, decide
from logalign.errors import InputError

DATA = Path(__file__).parents[1] / "data"
FRESH, REPEATED = DATA / "lm_fresh.jsonl", DATA / "lm_repeat200k.jsonl"
SCATTER = 0.004


def recorded(path, **without):
    return [replace(reading, **without) for reading in open_run(path).readings]


def outcomes(readings, detector=None, **given):
    """(step, outcome) wherever the outcome changes, and the detector."""
    detector = OverfitDetector(**given) if detector is None else detector
    changes = []
    for reading in readings:
        verdict = detector.update(reading)
        if not changes or changes[-1][1] != verdict.outcome:
            changes.append((verdict.step, verdict.outcome))
    return changes, detector


def healthy(x):
    return 0.9 - 0.05 * np.log(x + 10.0)


def by_hand(curve=healthy, *, count=200, seed=0, every=10, **fields):
    rng = np.random.default_rng(seed)
    given = {"m": 512, "n": 64, "lr": 1e-3, "epoch": 5.0, "loss": 3.0} | fields
    for name, value in given.items():
        given[name] = value if callable(value) else lambda _, value=value: value
    return [
        Reading(
            step=step,
            lar=float(curve(step) + SCATTER * rng.standard_normal()),
            **{name: value(step) for name, value in given.items()},
        )
        for step in range(0, every * count, every)
    ]


def baseline(**fields):
    return Baseline.from_readings(by_hand(seed=99, **fields))


# Recorded runs -----------------------------------------------------------------------------------------------------


def test_a_run_that_repeats_its_text_against_one_on_fresh_text():
    changes, detector = outcomes(recorded(REPEATED), baseline=Baseline.from_run(FRESH))
    assert [outcome for _, outcome in changes] == ["healthy", "undecidable", "healthy", "approaching", "overfitting"]
    first = {outcome: step for step, outcome in reversed(changes)}
    assert 200 <= first["approaching"] <= 400
    assert 400 <= first["overfitting"] <= 700
    verdict = detector.verdict
    assert verdict.since_step == first["overfitting"]
    assert verdict.evidence["deviation"] == pytest.approx(0.067, abs=2e-3)
    assert verdict.evidence["deviation_loss"] == pytest.approx(1.75, abs=0.02)
    assert verdict.evidence["epoch"] == pytest.approx(15.37, abs=0.01)
    assert "against the baseline run" in verdict.basis[0]
    assert "the baseline is one run" in verdict.limits[0]


def test_without_a_baseline_its_passes_over_the_text_tell_the_same():
    changes, detector = outcomes(recorded(REPEATED))
    first = {outcome: step for step, outcome in reversed(changes)}
    assert 200 <= first["approaching"] <= 650
    assert 400 <= first["overfitting"] <= 900
    verdict = detector.verdict
    assert verdict.outcome == "overfitting"
    assert "from seeing the same samples again" in verdict.reason
    assert verdict.evidence["memorization"] > 0
    assert verdict.evidence["lar_decline"] > 0


def test_without_a_baseline_and_without_epoch_or_loss_the_same_run_cannot_be_decided():
    changes, detector = outcomes(recorded(REPEATED, epoch=None))
    assert [outcome for _, outcome in changes] == ["undecidable"]
    assert detector.verdict.reason.startswith("there is no baseline, and LAR's decline does not speed up")
    changes, detector = outcomes(recorded(REPEATED, loss=None))
    assert [outcome for _, outcome in changes] == ["healthy", "undecidable"]
    assert "expected a first epoch that outlasts the warm-up" in detector.verdict.reason


@pytest.mark.parametrize("without", [{}, {"epoch": None}, {"lr": None, "loss": None, "tokens_seen": None, "n": None}])
@pytest.mark.parametrize("given", [{}, {"baseline": Baseline.from_run(FRESH)}])
def test_fresh_text_is_never_an_alarm(without, given):
    changes, _ = outcomes(recorded(FRESH, **without), **given)
    assert {outcome for _, outcome in changes} <= {"healthy", "undecidable"}


def test_a_held_out_loss_is_not_looked_at():
    readings = recorded(REPEATED)
    one = outcomes(readings, baseline=Baseline.from_run(FRESH))[1].verdict
    other = outcomes(
        [replace(reading, extra={"val_loss": 0.0}) for reading in readings], baseline=Baseline.from_run(FRESH)
    )[1].verdict
    assert one == other


# Against a baseline ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_in_band_is_healthy_and_below_it_is_not(seed):
    assert outcomes(by_hand(seed=seed), baseline=baseline())[0][-1][1] == "healthy"
    changes, _ = outcomes(
        by_hand(lambda x: healthy(x) - 0.05 * np.clip((x - 800) / 800, 0, 1), seed=seed), baseline=baseline()
    )
    assert [outcome for _, outcome in changes] == ["undecidable", "healthy", "approaching", "overfitting"]
    assert changes[2][0] > 800 + 0.015 / 0.05 * 800


def test_an_outcome_stands_until_it_is_clearly_over():
    def fallen_and_back(x):
        return healthy(x) - 0.06 * np.interp(x, [500, 800, 1200, 1600], [0, 1, 1, 0])

    changes, _ = outcomes(by_hand(fallen_and_back, count=250), baseline=baseline(count=250))
    assert [outcome for _, outcome in changes] == [
        "undecidable", "healthy", "approaching", "overfitting", "approaching", "healthy",
    ]  # fmt: skip


def test_runs_that_lie_apart_widen_the_band():
    runs = [by_hand(lambda x, i=i: healthy(x) + 0.04 * i, seed=10 + i) for i in (-1, 0, 1)]
    curves = Baseline.from_readings(runs[1])
    assert outcomes(by_hand(lambda x: healthy(x) - 0.03), baseline=curves)[0][-1][1] == "approaching"
    wide = Baseline.from_readings(*runs)
    changes, detector = outcomes(by_hand(lambda x: healthy(x) - 0.03), baseline=wide)
    assert {outcome for _, outcome in changes} == {"undecidable"}
    assert "within the baseline's band, which is too wide to tell: 0.09" in detector.verdict.reason


def test_another_schedule_is_said_and_widens_the_band():
    readings = by_hand(lambda x: healthy(x) - 0.024, lr=2e-3)
    changes, detector = outcomes(readings, baseline=baseline())
    assert changes[-1][1] == "healthy"
    assert "the learning rate is 2 times the baseline's: the band is 2 times as wide" in detector.verdict.limits[0]
    assert outcomes([replace(reading, lr=1e-3) for reading in readings], baseline=baseline())[0][-1][1] == "approaching"


def test_a_baseline_of_another_model_is_one_clear_error():
    detector = OverfitDetector(baseline=baseline())
    with pytest.raises(InputError) as caught:
        detector.update(Reading(step=30, lar=0.5, m=512, n=128))
    assert str(caught.value) == (
        "step 30: expected a layer of the baseline's shape (m, n) = (512, 64), found (512, 128); "
        "LARs compare only at equal shape"
    )
    assert detector.series.taken == 0


def test_beyond_the_baselines_end_an_outcome_stands_and_nothing_new_is_said():
    overfits = by_hand(lambda x: healthy(x) - 0.06 * (x > 500), count=200)
    changes, detector = outcomes(overfits, baseline=baseline(count=120))
    assert changes[-1][1] == "overfitting"
    assert detector.verdict.reason == "the baseline ends before this step, and so it was when it did."
    changes, detector = outcomes(by_hand(count=200), baseline=baseline(count=120))
    assert changes[-1] == (1200, "undecidable")
    assert detector.verdict.reason == "the baseline has no value at this step."


def test_a_baseline_with_too_few_readings_or_of_another_layer():
    short = Baseline.from_readings([Reading(step=0, lar=0.8), Reading(step=5000, lar=0.5)])
    assert {outcome for _, outcome in outcomes(by_hand(), baseline=short)[0]} == {"undecidable"}
    other = Baseline.from_readings([replace(reading, site="head") for reading in by_hand(seed=99)])
    verdict = outcomes(by_hand(), baseline=other)[1].verdict
    assert "the baseline is of the layer 'head', the run of 'unembedding'" in verdict.limits
    repeats = baseline(epoch=lambda x: x / 500)
    assert "the baseline itself repeats its data (epoch 4.0)" in outcomes(by_hand(), baseline=repeats)[1].verdict.limits


def test_while_no_data_has_repeated_it_is_healthy_and_a_deviation_is_only_told():
    verdict = outcomes(by_hand(lambda x: healthy(x) - 0.06, epoch=0.5), baseline=baseline())[1].verdict
    assert verdict.outcome == "healthy"
    assert verdict.reason.startswith("no data has repeated so far (epoch 0.50), though LAR is 0.06")


# Without a baseline ------------------------------------------------------------------------------------------------


def epochs(length):
    return {"epoch": lambda x: x / length}


def test_the_first_epoch_stands_for_a_baseline():
    changes, detector = outcomes(by_hand(count=150, **epochs(800)))
    assert [outcome for _, outcome in changes] == ["healthy"]
    assert "its first epoch" in detector.verdict.reason
    assert "extrapolated from this run's first epoch" in detector.verdict.limits[0]
    falls = by_hand(lambda x: healthy(x) - 0.06 * np.clip((x - 900) / 400, 0, 1), count=150, **epochs(800))
    changes, _ = outcomes(falls)
    assert [outcome for _, outcome in changes] == ["healthy", "approaching", "overfitting"]


def test_far_beyond_the_first_epoch_the_band_is_too_wide_to_call_anything_healthy():
    changes, detector = outcomes(by_hand(count=1500, loss=None, **epochs(800)))
    assert changes[-1][1] == "undecidable"
    assert "too wide to tell" in detector.verdict.reason


def test_a_learning_rate_step_after_the_first_epoch_is_not_taken_for_onset():
    def dropped(x):
        return healthy(x) - 0.024 * (x > 1000)

    readings = by_hand(dropped, count=115, lr=lambda x: 1e-3 if x <= 1000 else 1e-4, **epochs(800))
    changes, detector = outcomes(readings)
    assert {outcome for _, outcome in changes} <= {"healthy", "undecidable"}
    assert "the learning rate is 0.1 times that of the first epoch's end" in detector.verdict.limits[0]
    unchanged = [replace(reading, lr=1e-3) for reading in readings]
    assert "approaching" in {outcome for _, outcome in outcomes(unchanged)[0]}


def speeding_up(x):
    return 0.8 - 0.02 * np.log(x + 10.0) - 0.12 * np.log(np.maximum(x, 1000) / 1000)


def test_a_decline_that_speeds_up():
    changes, detector = outcomes(by_hand(speeding_up, count=250))
    assert [outcome for _, outcome in changes] == ["undecidable", "approaching", "overfitting"]
    assert changes[1][0] > 1000
    assert detector.verdict.evidence["acceleration"] == pytest.approx(-0.1, abs=0.05)
    assert "at an unchanged learning rate" in detector.verdict.reason


def test_without_a_learning_rate_it_is_no_alarm_and_after_a_change_nothing_is_said():
    assert outcomes(by_hand(speeding_up, count=250, lr=None))[0][-1][1] == "approaching"
    changes, detector = outcomes(by_hand(speeding_up, count=250, lr=lambda x: 1e-3 if x < 2000 else 5e-4))
    assert changes[-1][1] == "undecidable"
    assert "but the learning rate changed at step 2,0" in detector.verdict.reason


def test_a_rise_that_slows_down_is_no_decline():
    changes, _ = outcomes(recorded(DATA / "modadd67_wd1.jsonl"))
    assert {outcome for _, outcome in changes} <= {"healthy", "undecidable"}


# The rule and bad input --------------------------------------------------------------------------------------------


def test_the_rule_is_a_function_of_signals_and_stands_by_what_it_said():
    detector = outcomes(recorded(REPEATED), baseline=Baseline.from_run(FRESH))[1]
    signals, thresholds = detector.signals, detector.thresholds
    for previous in (None, "healthy", "approaching", "overfitting", "undecidable"):
        outcome, _, rests_on = decide(signals, thresholds, previous)
        assert (outcome, rests_on) == ("overfitting", "baseline")
    signals = replace(signals, repetition=None)
    shallow = replace(signals, deviation=replace(signals.deviation, now=0.03, low=0.029, high=0.031))
    assert decide(shallow, thresholds, None)[0] == "approaching"
    assert decide(shallow, thresholds, "overfitting")[0] == "overfitting"
    lenient = OverfitThresholds(approaching=0.1, overfitting=0.2)
    assert decide(signals, lenient, None)[0] == "healthy"
    assert signals.numbers(thresholds).keys() == detector.verdict.evidence.keys()


def test_another_form_can_be_judged():
    thresholds = OverfitThresholds(form="lar_vocab_centered")
    detector = outcomes(recorded(REPEATED), baseline=Baseline.from_run(FRESH), thresholds=thresholds)[1]
    assert detector.verdict.outcome == "overfitting"
    assert detector.verdict.evidence["deviation"] == detector.verdict.evidence["deviation_vocab_centered"]
    assert detector.verdict.basis[0].startswith("vocabulary-centered LAR against")


def test_little_or_no_data():
    detector = OverfitDetector()
    assert (detector.verdict.outcome, detector.verdict.step) == ("undecidable", None)
    with pytest.raises(InputError, match="signals: expected at least one reading with a defined LAR, found none"):
        detector.signals  # noqa: B018
    verdict = detector.update(Reading(step=0, lar=None))
    assert (verdict.outcome, verdict.step, verdict.since_step) == ("undecidable", None, None)
    assert verdict.reason == "none of 1 readings has a defined LAR."
    for step, lar in ((10, 0.8), (20, 0.7), (30, 0.6)):
        verdict = detector.update(Reading(step=step, lar=lar))
    assert (verdict.outcome, verdict.since_step) == ("undecidable", 10)
    assert verdict.limits[0] == "1 readings have no defined LAR and were passed over"


def test_a_constant_series_is_no_measurement():
    for given in ({}, {"baseline": baseline()}):
        readings = [Reading(step=step, lar=0.5, epoch=3.0) for step in range(0, 3000, 10)]
        changes, detector = outcomes(readings, **given)
        assert {outcome for _, outcome in changes} == {"undecidable"}
        assert detector.verdict.reason == "LAR has had the very same value in all of the last readings."


def test_a_resume_takes_back_what_was_concluded_after_it():
    fell = by_hand(lambda x: healthy(x) - 0.06 * (x > 900), count=150, **epochs(800))
    detector = outcomes(fell)[1]
    assert detector.verdict.outcome == "overfitting"
    good = [reading for reading in by_hand(count=150, **epochs(800)) if reading.step >= 500]
    changes, _ = outcomes(good, detector)
    assert changes == [(500, "healthy")]
    assert detector.verdict.since_step == 0
