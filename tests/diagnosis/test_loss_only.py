"""Logs without LAR: the memorized share against sums known by construction, the rule, its state, and its bounds."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from logalign import diagnose, open_run
from logalign.diagnosis.detector import Detector
from logalign.diagnosis.drops import LossSignals, LossThresholds, shared
from logalign.diagnosis.loss_only import AFTERWARDS, LossDetector
from logalign.runs.reading import EPOCHS_AS_STEPS, NO_LAR, Reading


def staircase(*, passes=8, readings=20, drop=0.1, inside=0.0, start=2.0, noise=0.0, seed=0, lr=None):
    """A training loss that drops by `drop` where each pass begins, and changes by `inside` in a pass."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(passes * readings):
        epoch = (i + 0.5) / readings
        loss = start + inside * epoch - drop * int(epoch) + noise * rng.standard_normal()
        rate = None if lr is None else lr(epoch)
        made.append(Reading(step=10 * i, lar=None, reason=NO_LAR, epoch=epoch, loss=loss, lr=rate))
    return made


def judged(readings):
    detector = LossDetector()
    for reading in readings:
        detector.update(reading)
    return detector


@pytest.mark.parametrize("readings", [2, 3, 5, 20, 50])
def test_the_sum_of_drops_is_that_of_the_staircase(readings):
    evidence = judged(staircase(readings=readings)).verdict.evidence
    counted = evidence["memorized"]
    # The first and the last beginning of a pass need three readings on either side.
    assert counted == pytest.approx(0.7 if readings > 2 else 0.5)
    loss = np.mean([each.loss for each in staircase(readings=readings)[-6:]])
    assert evidence["memorized_share"] == pytest.approx(counted / (loss + counted))


def test_whole_epochs_are_as_good():
    """As Lightning logs them."""
    readings = [replace(each, epoch=float(int(each.epoch))) for each in staircase(drop=0.15, inside=0.02)]
    verdict = judged(readings).verdict
    assert verdict.evidence["memorized"] == pytest.approx(1.05, rel=0.03)
    assert verdict.outcome == "overfitting"


def test_the_rule_by_what_the_loss_does_inside_a_pass():
    outcomes = {
        inside: judged(staircase(drop=0.2, inside=inside, start=3.0)).verdict.outcome for inside in (-0.15, -0.02, 0.02)
    }
    assert outcomes == {-0.15: "healthy", -0.02: "approaching", 0.02: "overfitting"}
    assert judged(staircase(drop=0.02)).verdict.outcome == "healthy"
    assert judged(staircase(drop=0.0, inside=-0.1)).verdict.outcome == "healthy"


def test_an_alarm_stands_when_all_is_memorized():
    """The loss stays near zero, and no drop is left to be seen."""
    readings = staircase(drop=0.2, inside=0.02, passes=9)
    flat = [replace(readings[-1], step=readings[-1].step + 10 * i, epoch=9 + i / 20, loss=0.3) for i in range(1, 100)]
    assert judged([*readings, *flat]).verdict.outcome == "overfitting"


def test_drops_by_the_learning_rate_do_not_count():
    kept = judged(staircase(lr=lambda epoch: 1e-3)).verdict.evidence["memorized"]
    assert kept == pytest.approx(0.7)
    stepped = judged(staircase(lr=lambda epoch: 1e-3 * 0.5 ** int(epoch))).verdict
    assert stepped.evidence["memorized"] == 0
    assert stepped.outcome == "healthy"


def test_noise_is_taken_off():
    for seed in range(10):
        verdict = judged(staircase(drop=0.0, inside=0.0, noise=0.3, passes=20, readings=10, seed=seed)).verdict
        assert verdict.outcome == "healthy"
    noisy = judged(staircase(drop=0.15, inside=0.02, noise=0.02)).verdict
    assert noisy.outcome == "overfitting"
    assert noisy.evidence["memorized_share_low"] < noisy.evidence["memorized_share"]


def test_the_state_of_a_trainer(data):
    """The held-out loss, which is not used, was lowest at step 600."""
    verdict = diagnose(data / "without_lar" / "trainer_state.json")
    assert (verdict.outcome, verdict.regime, verdict.since_step) == ("approaching", "loss", 850)
    assert verdict.headline() == "approaching (without LAR) at step 2,000, since step 850"
    assert AFTERWARDS in verdict.limits
    assert verdict.held_out == ""
    assert json.loads(json.dumps(verdict.record(), allow_nan=False))["regime"] == "loss"


@pytest.mark.parametrize(
    ("readings", "outcome", "why"),
    [
        (lambda: staircase()[:10], "healthy", "no data has repeated so far (epoch 0.47)."),
        (lambda: [replace(each, epoch=None) for each in staircase()], "undecidable", "no epoch is recorded"),
        (lambda: [replace(each, loss=None) for each in staircase()], "undecidable", "no training loss is recorded."),
        (lambda: staircase(readings=1), "undecidable", "readings are about as far apart as the passes"),
        (lambda: staircase()[:22], "undecidable", "too little of the data has repeated so far"),
        (
            lambda: [replace(each, loss=each.loss - 5) for each in staircase()],
            "undecidable",
            "the loss is not above zero",
        ),
    ],
)
def test_what_cannot_be_told(readings, outcome, why):
    verdict = judged(readings()).verdict
    assert verdict.outcome == outcome
    assert why in verdict.reason


@pytest.mark.parametrize("seed", range(20))
def test_no_share_is_beyond_its_bounds(seed):
    """Losses near zero, rising, or jumping: shares stay within 0 and 1, and no percentage is negative or above 100."""
    rng = np.random.default_rng(seed)
    drop, inside, noise = rng.normal(0, 0.3), rng.normal(0, 0.3), rng.exponential(0.2)
    for reading in (detector := LossDetector()) and staircase(drop=drop, inside=inside, noise=noise, seed=seed):
        kept = replace(reading, loss=abs(reading.loss) * rng.choice([1e-9, 1.0], p=[0.1, 0.9]))
        verdict = detector.update(kept)
        for name in ("memorized_share", "memorized_share_low"):
            share = verdict.evidence[name]
            assert share is None or 0 <= share <= 1
        assert all(0 <= int(each) <= 100 for each in re.findall(r"(-?\d+)%", verdict.reason))


def test_a_share():
    assert shared(3.0, 1.0) == 0.75
    assert shared(-3.0, 1.0) == 0.0
    assert LossSignals(loss=1.0, drops=-3.0, share=0.0, share_low=0.0, inside=0.0).unseen == 1.0


def test_a_resume_and_a_saved_state():
    readings = staircase(drop=0.15, inside=0.02)
    once = judged(readings)
    again = judged([*readings[:100], *readings[60:]])
    assert again.verdict.evidence == once.verdict.evidence
    assert again.verdict.since_step == once.verdict.since_step
    halfway = judged(readings[:90])
    loaded = LossDetector()
    loaded.load_state_dict(json.loads(json.dumps(halfway.state_dict())))
    for reading in readings[90:]:
        loaded.update(reading)
    assert loaded.verdict == once.verdict


def test_epochs_that_stand_for_steps_are_named():
    readings = [Reading(step=i, lar=None, reason=EPOCHS_AS_STEPS, epoch=float(i), loss=2.0) for i in range(9)]
    verdict = diagnose(readings)
    assert verdict.outcome == "undecidable"
    assert verdict.limits[0] == EPOCHS_AS_STEPS


def test_a_detector_judges_without_lar_until_one_was_tried(data):
    readings = open_run(data / "lm_repeat200k.jsonl").readings
    bare = [replace(each, lar=None, reason=NO_LAR) for each in readings]
    detector = Detector()
    regimes = [detector.update(each).regime for each in bare[:20]]
    assert set(regimes) == {"loss"}
    after = [detector.update(each).regime for each in readings[20:]]
    assert "loss" not in after
    assert detector.without_lar is None
    undefined = Detector().update(replace(readings[0], lar=None, reason="a weight of zeros"))
    assert undefined.regime == "unknown"
    assert diagnose(bare, regime="decline").reason == f"none of {len(bare)} readings has a defined LAR."


def test_held_out_losses_of_logs_without_lar(data):
    readings = open_run(data / "without_lar" / "trainer_state.json").readings
    no_epoch = [replace(each, epoch=None) for each in readings]
    verdict = diagnose(no_epoch)
    assert verdict.outcome == "undecidable"
    assert "was lowest at step 600" in verdict.held_out


def test_thresholds_move_the_rule():
    strict = LossDetector(thresholds=LossThresholds(memorized=0.9))
    outcomes = [strict.update(each).outcome for each in staircase(drop=0.15, inside=0.02)]
    assert set(outcomes) <= {"healthy", "undecidable"}
    assert all(first != second for first, second in pairwise(dict.fromkeys(outcomes)))


def test_a_loss_that_is_no_number_any_more_has_diverged():
    readings = staircase()
    broken = [replace(each, loss=None) for each in readings[100:]]
    verdict = diagnose([*readings[:100], *broken])
    assert (verdict.outcome, verdict.since_step) == ("diverged", broken[2].step)
    held_out = [replace(each, loss=None, extra={"val_loss": 2.0}) for each in readings[100:]]
    assert diagnose([*readings[:100], *held_out]).outcome != "diverged"
