"""GrokDetector on recorded trainings of modular addition, whose held-out accuracy is known, and on series by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from logalign import Reading, open_run
from logalign.diagnosis.grokking import GrokDetector, GrokThresholds, decide
from logalign.diagnosis.judge import loss_limit
from logalign.diagnosis.series import Series
from logalign.errors import InputError

DATA = Path(__file__).parents[1] / "data"
SHAPE = {"m": 59, "n": 64}


def outcomes(readings, detector=None):
    """(step, outcome) wherever the outcome changes, and the detector; a series by hand begins inside a training."""
    if detector is None:
        detector = GrokDetector(any_loss=readings[0].loss is None or readings[0].loss < 1)
    changes = []
    for reading in readings:
        verdict = detector.update(reading)
        if not changes or changes[-1][1] != verdict.outcome:
            changes.append((verdict.step, verdict.outcome))
    return changes, detector


def recorded(name, **without):
    return [replace(reading, **without) for reading in open_run(DATA / f"{name}.jsonl").readings]


def accuracy(name, step):
    columns = open_run(DATA / f"{name}.jsonl").columns()
    return columns["val_acc"][columns["step"] == step][0]


def by_hand(lars, *, loss=0.01, **fields):
    given = SHAPE | {"epoch": 5.0, "lar_centered": None} | fields
    rng = np.random.default_rng(0)
    return [
        Reading(step=10 * i, lar=lar + 1e-7 * rng.standard_normal(), loss=loss, **given) for i, lar in enumerate(lars)
    ]


# Recorded trainings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "without"),
    [("modadd59_wd1", {}), ("modadd59_wd1", {"lar_centered": None}), ("modadd67_wd1", {})],
)
def test_memorizing_and_then_generalizing(name, without):
    changes, detector = outcomes(recorded(name, **without))
    assert [outcome for _, outcome in changes] == ["undecidable", "memorizing", "generalizing"]
    assert changes[1][0] < 100
    assert 0.05 < accuracy(name, changes[2][0]) < 0.9
    assert detector.verdict.since_step == changes[2][0]


def test_without_weight_decay_it_memorizes_throughout_slingshot_or_not():
    changes, detector = outcomes(recorded("modadd59_wd0"))
    assert [outcome for _, outcome in changes] == ["undecidable", "memorizing"]
    assert detector.verdict.evidence["rise"] < 0


def test_a_slingshot_does_not_read_as_generalization_where_only_plain_lar_is_known():
    changes, detector = outcomes(recorded("modadd59_wd0", lar_centered=None))
    assert [outcome for _, outcome in changes] == ["undecidable", "memorizing", "undecidable"]
    assert detector.verdict.reason == (
        "plain LAR has climbed, but the training loss jumped at step 1,140: an optimizer slingshot lifts plain LAR, "
        "too, and the centered form is not recorded."
    )
    assert any("only plain LAR is recorded" in limit for limit in detector.verdict.limits)


def test_evidence_of_the_generalized_dimension():
    verdict = outcomes(recorded("modadd59_wd1"))[1].verdict
    assert verdict.evidence["generalized_k"] == pytest.approx(9.9, abs=0.1)
    assert verdict.evidence["effective_dim"] == pytest.approx(10.66, abs=0.1)
    assert verdict.evidence["plateau"] == pytest.approx(0.557, abs=1e-3)
    assert verdict.evidence["rise"] == pytest.approx(0.167, abs=1e-3)
    assert set(verdict.evidence) == {
        "plateau", "rise", "level", "generalized_k", "k_ratio", "steepness", "effective_dim", "loss", "loss_limit",
        "epoch",
    }  # fmt: skip
    assert "scored on others: docs/benchmark.md" in verdict.basis[1]


def test_a_language_model_that_does_not_interpolate_is_not_judged():
    changes, detector = outcomes(recorded("lm_repeat200k"))
    assert [outcome for _, outcome in changes] == ["undecidable"]
    assert "does not interpolate" in detector.verdict.reason


# The rule ----------------------------------------------------------------------------------------------------------


def drifting(power, readings):
    """LAR of a network whose k falls with this power of the step from step 200 on."""
    steps = 10 * np.arange(readings)
    return 0.55 + power * np.log(np.maximum(steps, 200) / 200) / (2 * np.log(64))


def test_a_slow_rise_is_not_generalization_and_a_steep_one_is():
    changes, detector = outcomes(by_hand(drifting(0.2, 400)))
    assert [outcome for _, outcome in changes] == ["undecidable", "memorizing"]
    assert detector.verdict.evidence["k_ratio"] == pytest.approx(20**-0.2, abs=0.01)
    assert detector.verdict.evidence["steepness"] == pytest.approx(0.2, abs=0.01)
    assert detector.verdict.reason.endswith("a slow drift.")
    changes, _ = outcomes(by_hand(drifting(0.6, 100)))
    assert [outcome for _, outcome in changes] == ["undecidable", "memorizing", "generalizing"]
    assert 200 * 0.75 ** (-1 / 0.6) < changes[2][0] < 500


def test_where_k_has_fallen_to_half_no_steepness_is_asked_for():
    changes, _ = outcomes(by_hand(drifting(0.3, 400)))
    assert [outcome for _, outcome in changes] == ["undecidable", "memorizing", "generalizing"]
    assert changes[2][0] > 200 * 0.5 ** (-1 / 0.3)


def test_a_loss_that_leaps_now_and_then_is_still_interpolation():
    readings = by_hand(np.full(100, 0.55))
    readings[60:70] = [replace(reading, loss=2.0) for reading in readings[60:70]]
    assert [outcome for _, outcome in outcomes(readings)[0]] == ["undecidable", "memorizing"]
    readings[60:] = [replace(reading, loss=2.0) for reading in readings[60:]]
    assert [outcome for _, outcome in outcomes(readings)[0]] == ["undecidable", "memorizing", "undecidable"]


def test_a_rise_that_does_not_last_is_not_generalization():
    lars = np.full(100, 0.55)
    lars[50:56] = 0.8
    changes, _ = outcomes(by_hand(lars, lar_centered=None))
    assert [outcome for _, outcome in changes] == ["undecidable", "memorizing"]


def test_generalizing_stands_until_the_climb_is_lost():
    lars = np.concatenate([np.full(30, 0.55), np.full(30, 0.7), np.full(30, 0.58), np.full(30, 0.55)])
    changes, _ = outcomes(by_hand(lars))
    assert [outcome for _, outcome in changes] == ["undecidable", "memorizing", "generalizing", "memorizing"]
    assert 900 < changes[3][0] < 950  # k at 0.58 is 78 % of the plateau's, under 85 %


def test_a_network_that_fits_with_few_directions_never_memorized():
    changes, detector = outcomes(by_hand(np.full(50, 0.75)))
    assert changes == [(0, "undecidable")]
    assert "never sat on a memorization plateau near 1/2" in detector.verdict.reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"loss": None}, "the training loss is not known in all of the last 3 readings"),
        ({"m": None}, "the loss did not begin near log m"),
        ({"n": None}, "the layer's shape (m, n) is not recorded"),
        ({"loss": 0.3}, "the training loss, 0.3, is not under 0.204 (5 % of log m)"),
        ({"epoch": 0.5}, "no data has repeated so far"),
    ],
)
def test_what_cannot_be_decided(fields, reason):
    changes, detector = outcomes(by_hand(np.full(50, 0.55), **fields))
    assert changes == [(0, "undecidable")]
    assert reason in detector.verdict.reason


def test_without_an_epoch_data_is_taken_to_repeat_and_that_is_said():
    changes, detector = outcomes(by_hand(np.full(50, 0.55), epoch=None))
    assert changes[-1][1] == "memorizing"
    assert "no epoch is recorded: data is taken to repeat" in detector.verdict.basis


def test_a_constant_series_is_no_measurement():
    detector = GrokDetector(any_loss=True)
    for step in range(100):
        verdict = detector.update(Reading(step=step, lar=0.55, lar_centered=0.55, loss=0.0, epoch=9.0, **SHAPE))
        assert not verdict.is_alarm
    assert verdict.reason == "LAR has had the very same value in all of the last readings."


def test_the_rule_is_a_function_of_signals_and_stands_by_what_it_said():
    detector = outcomes(recorded("modadd59_wd1"))[1]
    signals, thresholds = detector.signals, detector.thresholds
    for previous in (None, "memorizing", "generalizing"):
        assert decide(signals, thresholds, previous)[0] == "generalizing"
    between = replace(signals, k_ratio=0.8, k_ratio_held=0.8)
    assert decide(between, thresholds, "generalizing")[0] == "generalizing"
    assert decide(between, thresholds, "memorizing")[0] == "memorizing"
    strict = GrokThresholds(fall_of_k=0.1, fall_alone=0.1)
    assert outcomes(recorded("modadd59_wd1"), GrokDetector(thresholds=strict))[0][-1][1] == "memorizing"


@pytest.mark.parametrize(
    ("m", "first", "limit"),
    [
        (59, np.log(59), 0.05 * np.log(59)),  # an untrained classifier
        (59, 1.3 * np.log(59), 0.05 * np.log(59)),
        (59, 0.9 * np.log(59), 0.045 * np.log(59)),
        (59, 0.81 * np.log(59), None),  # focal loss
        (100, np.log(2), None),  # a hundred labels, each yes or no
        (10, 1.0, None),  # squares of ten outputs
        (10, 100 * np.log(10), None),  # a loss times a hundred
        (1024, 3.0, None),  # fine-tuning
        (None, 4.0, None),
        (1, 0.7, None),
        (59, None, None),
    ],
)
def test_a_network_interpolates_only_where_its_loss_is_a_cross_entropy(m, first, limit):
    series = Series()
    series.add(Reading(step=0, lar=0.5, loss=first, m=m, n=64))
    series.add(Reading(step=10, lar=0.5, loss=0.001, m=m, n=64))
    assert loss_limit(series) == (None if limit is None else pytest.approx(limit))
    assert loss_limit(series, any_loss=True) == (pytest.approx(0.05 * np.log(m)) if m not in (None, 1) else None)


# Resumed and damaged series ----------------------------------------------------------------------------------------


def test_a_resume_before_the_plateau_forgets_it():
    readings = by_hand(np.full(40, 0.55))
    detector = outcomes(readings)[1]
    assert detector.verdict.outcome == "memorizing"
    verdict = detector.update(replace(readings[3], step=30))
    assert verdict.outcome == "undecidable"
    assert "1 times a step was not above the one before" in verdict.limits[-3]
    changes, _ = outcomes([replace(reading, step=reading.step + 31) for reading in readings], detector)
    assert changes[-1][1] == "memorizing"


def test_a_resume_takes_the_outcome_back_and_the_run_goes_on_as_the_first_time():
    readings = recorded("modadd59_wd1")
    detector = outcomes(readings)[1]
    again = [reading for reading in readings if reading.step >= 200]
    first = GrokDetector()
    for reading in [reading for reading in readings if reading.step < 200]:
        first.update(reading)
    for reading in again:
        resumed, plain = detector.update(reading), first.update(reading)
        assert (resumed.outcome, resumed.since_step) == (plain.outcome, plain.since_step)


def test_readings_of_another_layer_are_refused():
    detector = GrokDetector()
    detector.update(Reading(step=0, lar=0.5))
    with pytest.raises(InputError, match="expected a reading of 'unembedding', found one of 'body'"):
        detector.update(Reading(step=1, lar=0.5, site="body"))


def test_a_state_of_something_else_is_refused():
    with pytest.raises(InputError) as caught:
        GrokDetector().load_state_dict({"version": 1, "regime": "decline"})
    assert str(caught.value) == (
        "state: expected what GrokDetector.state_dict() gives (version 4), found version 1, regime 'decline'"
    )
