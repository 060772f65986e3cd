"""OverfitDetector on recorded runs of a small GPT whose held-out loss is known, and on series made by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from logalign import Baseline, Reading, open_run
from logalign.diagnosis.decline import Deviation, Span
from logalign.diagnosis.drops import LossSignals
from logalign.diagnosis.outcome import OUTCOMES
from logalign.diagnosis.overfit_rule import TOLD, OverfitSignals, OverfitThresholds, decide
from logalign.diagnosis.overfitting import OverfitDetector
from logalign.diagnosis.repetition import Repetition
from logalign.diagnosis.revisited import Revisited
from logalign.errors import InputError

DATA = Path(__file__).parents[1] / "data"
FRESH, REPEATED = DATA / "lm_fresh.jsonl", DATA / "lm_repeat200k.jsonl"
SCATTER = 0.004
T = OverfitThresholds()
GIVEN = OverfitThresholds(
    form="lar", smoothing=15, hold=5, approaching=0.015, overfitting=0.035, keep=0.75, sigmas=2.0,
    between_one_run=0.007, schedule_factor=2.0,
)  # fmt: skip
"""What series made by hand are judged with, so that they test the rules and not what was fitted."""


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


def judged(readings, detector=None, **given):
    """The same with the thresholds that are given here."""
    return outcomes(readings, detector, thresholds=GIVEN, **given)


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


# Recorded runs -------------------------------------------------------------------------------------------------------


def test_a_run_that_repeats_its_text_against_one_on_fresh_text():
    changes, detector = outcomes(recorded(REPEATED), baseline=Baseline.from_run(FRESH))
    assert [outcome for _, outcome in changes] == ["healthy", "undecidable", "healthy", "approaching", "overfitting"]
    first = {outcome: step for step, outcome in reversed(changes)}
    assert 200 <= first["approaching"] <= 650
    assert 400 <= first["overfitting"] <= 900
    verdict = detector.verdict
    assert verdict.evidence["deviation_plain"] == pytest.approx(0.067, abs=5e-3)
    assert verdict.evidence["deviation_loss"] == pytest.approx(1.75, abs=0.1)
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
    assert (
        "the training loss has lost" in verdict.reason
        or "strain, the loss memorized times the LAR lost" in verdict.reason
    )
    assert verdict.evidence["memorization"] > 0
    assert verdict.evidence["lar_decline"] > 0
    assert verdict.evidence["strain"] > T.strain


def test_without_a_baseline_and_without_epoch_or_loss_the_same_run_cannot_be_decided():
    changes, detector = outcomes(recorded(REPEATED, epoch=None))
    assert [outcome for _, outcome in changes] == ["undecidable"]
    assert detector.verdict.reason.startswith("whether data has repeated is not known")
    assert detector.verdict.suggestion == "Pass epoch to step()."
    changes, detector = outcomes(recorded(REPEATED, loss=None))
    assert [outcome for _, outcome in changes] == ["healthy", "undecidable"]
    assert "samples that come back are not seen, nor passes in the loss" in detector.verdict.reason
    assert detector.verdict.suggestion == "Pass loss to step()."


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


# Against a baseline --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_in_band_is_healthy_and_below_it_is_not(seed):
    assert judged(by_hand(seed=seed), baseline=baseline())[0][-1][1] == "healthy"
    changes, _ = judged(
        by_hand(lambda x: healthy(x) - 0.05 * np.clip((x - 800) / 800, 0, 1), seed=seed), baseline=baseline()
    )
    assert [outcome for _, outcome in changes] == ["undecidable", "healthy", "approaching", "overfitting"]
    assert changes[2][0] > 800 + 0.015 / 0.05 * 800


def test_an_outcome_stands_until_it_is_clearly_over():
    def fallen_and_back(x):
        return healthy(x) - 0.06 * np.interp(x, [500, 800, 1200, 1600], [0, 1, 1, 0])

    changes, _ = judged(by_hand(fallen_and_back, count=250), baseline=baseline(count=250))
    assert [outcome for _, outcome in changes] == [
        "undecidable", "healthy", "approaching", "overfitting", "approaching", "healthy",
    ]  # fmt: skip


def test_runs_that_lie_apart_widen_the_band():
    runs = [by_hand(lambda x, i=i: healthy(x) + 0.04 * i, seed=10 + i) for i in (-1, 0, 1)]
    curves = Baseline.from_readings(runs[1])
    assert judged(by_hand(lambda x: healthy(x) - 0.03), baseline=curves)[0][-1][1] == "approaching"
    wide = Baseline.from_readings(*runs)
    changes, detector = judged(by_hand(lambda x: healthy(x) - 0.03), baseline=wide)
    assert {outcome for _, outcome in changes} == {"undecidable"}
    assert "within the baseline's band, which is too wide to tell: 0.09" in detector.verdict.reason


def test_another_schedule_is_said_and_widens_the_band():
    readings = by_hand(lambda x: healthy(x) - 0.024, lr=2e-3)
    changes, detector = judged(readings, baseline=baseline())
    assert changes[-1][1] == "healthy"
    assert "the learning rate is 2 times the baseline's: the band is 2 times as wide" in detector.verdict.limits[0]
    assert judged([replace(reading, lr=1e-3) for reading in readings], baseline=baseline())[0][-1][1] == "approaching"


def test_another_schedule_asks_for_more_of_one_baseline_run_too():
    far = Deviation(now=0.04, low=0.04, high=0.04, between=None, scatter=0.001)
    against = {"has_baseline": True, "reached": True, "deviation": far}
    assert decided(**against) == ("approaching", "baseline")
    assert decided(**against, schedule_difference="the learning rate is 2 times the baseline's") == (
        "healthy",
        "baseline",
    )


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
    changes, detector = judged(overfits, baseline=baseline(count=120))
    assert changes[-1][1] == "overfitting"
    assert detector.verdict.reason == "the baseline ends before this step, and the alarm that was raised before stands."
    changes, detector = judged(by_hand(count=200), baseline=baseline(count=120))
    assert changes[-1] == (1200, "undecidable")
    assert detector.verdict.reason == "the baseline has no value at this step."


def test_a_baseline_with_too_few_readings_or_of_another_layer():
    short = Baseline.from_readings([Reading(step=0, lar=0.8), Reading(step=5000, lar=0.5)])
    assert {outcome for _, outcome in judged(by_hand(), baseline=short)[0]} == {"undecidable"}
    other = Baseline.from_readings([replace(reading, site="head") for reading in by_hand(seed=99)])
    verdict = judged(by_hand(), baseline=other)[1].verdict
    assert "the baseline is of the layer 'head', the run of 'unembedding'" in verdict.limits
    repeats = baseline(epoch=lambda x: x / 500)
    assert "the baseline itself repeats its data (epoch 4.0)" in judged(by_hand(), baseline=repeats)[1].verdict.limits


def test_while_no_data_has_repeated_it_is_healthy_and_a_deviation_is_only_told():
    verdict = judged(by_hand(lambda x: healthy(x) - 0.06, epoch=0.5), baseline=baseline())[1].verdict
    assert verdict.outcome == "healthy"
    assert verdict.reason.startswith("no data has repeated so far (epoch 0.50), though LAR is 0.06")


# Without a baseline --------------------------------------------------------------------------------------------------


def epochs(length):
    return {"epoch": lambda x: x / length}


def test_a_rise_that_slows_down_is_no_decline():
    changes, _ = outcomes(recorded(DATA / "modadd67_wd1.jsonl"))
    assert {outcome for _, outcome in changes} <= {"healthy", "undecidable"}


# The rules, on signals made by hand ----------------------------------------------------------------------------------


def signals(**given):
    """Signals of a run that repeats its data, after the warm-up, of which nothing else is known."""
    nothing = {
        "loss": None, "has_baseline": False, "reached": False, "deviation": None, "deviation_plain": None,
        "deviation_vocab_centered": None, "deviation_centered": None, "deviation_loss": None, "loss_below": None,
        "schedule_difference": None, "lr_dropped": False, "repetition": None, "spread": None,
        "classifies": False, "interpolates": False, "spent_early": False,
    }  # fmt: skip
    return OverfitSignals(**({"step": 1000, "epoch": 5.0, "warm_up": 100.0} | nothing | given))


def repeating(strain=0.0, learning=1.0):
    """Passes whose strain is this share of its threshold."""
    return Repetition(
        memorization=1.0,
        decline=0.05,
        strain=strain * T.strain,
        learning=learning,
    )


def dropping(share, inside=-1.0):
    """Three readings after drops of this share of what unseen samples would have, of which 4 nats are left."""
    drops = 4 * share / (1 - share)
    each = LossSignals(loss=4.0, drops=drops, share=share, share_low=share, inside=inside)
    return (each,) * T.drops.hold


def coming_back(drift, share, *, error=0.01, pace=1.0, began=3.0):
    """A pass with this drift, after which this share of what unseen samples would have is memorized, 3 nats of loss."""
    return Revisited(
        step=900,
        passes=5,
        drift=drift,
        drift_error=error,
        memorized=3 * share / (1 - share),
        memorized_error=0.0,
        loss=3.0,
        began=began,
        pace=pace,
    )


def decided(previous=None, kind="strain", **given):
    """Outcome and what it rests on, where one kind of evidence has said so before."""
    said = decide(signals(**given), T, {} if previous is None else {kind: previous})
    return said.outcome, said.rests_on


def test_strain_is_what_passes_alarm_by_where_samples_are_not_followed():
    assert decided(repetition=repeating(0.9)) == ("healthy", "strain")
    assert decided(repetition=repeating(1.1)) == ("approaching", "strain")
    assert decided(repetition=repeating(1.1, -0.01)) == ("overfitting", "strain")
    assert decided(repetition=repeating(0.9, -0.01)) == ("healthy", "strain")
    between, below = (1 + T.keep) / 2, 0.99 * T.keep
    assert decided("healthy", repetition=repeating(between))[0] == "healthy"
    assert decided("approaching", repetition=repeating(between))[0] == "approaching"
    assert decided("overfitting", repetition=repeating(between))[0] == "overfitting"
    assert decided("approaching", repetition=repeating(below))[0] == "healthy"


def test_drops_of_the_loss_alarm_where_samples_are_not_followed_but_not_in_classifiers():
    limit = T.drops.memorized
    assert decided(drops=dropping(0.9 * limit, 0.1)) == ("healthy", "drops")
    assert decided(drops=dropping(1.1 * limit, -1.0)) == ("healthy", "drops")
    assert decided(drops=dropping(1.1 * limit, -0.01)) == ("approaching", "drops")
    assert decided(drops=dropping(1.1 * limit, 0.01)) == ("overfitting", "drops")
    assert decided(drops=dropping(1.1 * limit, 0.01), classifies=True) == ("undecidable", "nothing")


def test_revisits_alarm_where_much_is_memorized_and_training_no_longer_pays():
    limit, unseen = T.memorized, 3 / (1 - 1.5 * T.memorized)
    pays = -T.falls * unseen
    assert decided(revisited=coming_back(pays - 0.02, 1.5 * limit)) == ("healthy", "revisits")
    assert decided(revisited=coming_back(pays + 0.02, 1.5 * limit)) == ("approaching", "revisits")
    assert decided(revisited=coming_back(pays + 0.02, 0.8 * limit)) == ("healthy", "revisits")
    assert decided(revisited=coming_back(0.05, 0.8 * limit)) == ("healthy", "revisits")
    assert decided(revisited=coming_back(0.05, 1.5 * limit)) == ("overfitting", "revisits")


def test_what_is_next_to_nothing_of_the_first_loss_does_not_matter():
    stalls = coming_back(0.05, 0.3)
    assert decided(revisited=stalls)[0] == "overfitting"
    for share, outcome in ((0.9, "healthy"), (1.1, "overfitting")):
        began = stalls.memorized / (share * T.material)
        assert decided(revisited=replace(stalls, began=began))[0] == outcome


def test_what_may_be_nothing_is_no_alarm_and_the_reason_says_so():
    stalls = coming_back(0.05, 0.6)
    beyond = stalls.memorized - T.material * stalls.began
    for errors, outcome in ((T.errors - 0.1, "healthy"), (T.errors + 0.1, "overfitting")):
        assert decided(revisited=replace(stalls, memorized_error=beyond / errors))[0] == outcome
    for seen, words in (
        (replace(stalls, memorized_error=beyond), "is not clearly more than 1% of the loss that training began with"),
        (coming_back(0.0, 0.1), "little has been memorized"),
        (coming_back(-0.09, 0.6, error=0.1), "may still lower a sample's loss"),
        (coming_back(-0.09, 0.6), "what it learns carries over"),
    ):
        said = decide(signals(revisited=seen), T, {})
        assert said.outcome == "healthy"
        assert words in said.reason


def test_two_passes_in_a_row_are_overfitting():
    stalls, pays = coming_back(0.0, 2 * T.memorized), coming_back(-1.0, 2 * T.memorized)
    assert decided(revisited=stalls, revisited_before=pays) == ("approaching", "revisits")
    assert decided(revisited=stalls, revisited_before=stalls) == ("overfitting", "revisits")


def test_an_alarm_of_revisits_stands_until_training_clearly_pays_again():
    def after(previous, drift, error):
        return decided(previous, "revisits", revisited=coming_back(drift, 2 * T.memorized, error=error))[0]

    assert after(None, -0.2, 0.1) == "healthy"
    assert after("approaching", -0.2, 0.1) == "approaching"
    assert after("overfitting", -0.2, 0.1) == "overfitting"
    assert after("overfitting", -0.2, 0.01) == "healthy"


def test_a_learning_rate_on_its_way_to_zero_asks_for_less():
    slow = -0.5 * T.falls * 3 / (1 - 2 * T.memorized)
    assert decided(revisited=coming_back(slow, 2 * T.memorized, error=1e-4))[0] == "approaching"
    assert decided(revisited=coming_back(slow, 2 * T.memorized, error=1e-4, pace=0.1))[0] == "healthy"


def test_where_samples_are_followed_the_rest_is_not_asked():
    alarming = {"repetition": repeating(2, -1), "drops": dropping(0.9, 1.0), "spread": 9.0, "classifies": True}
    assert decided(revisited=coming_back(-0.5, 0.1), **alarming) == ("healthy", "revisits")
    far = Deviation(now=1.0, low=1.0, high=1.0, between=0.0, scatter=0.0)
    assert decided(revisited=coming_back(-0.5, 0.1), has_baseline=True, reached=True, deviation=far) == (
        "overfitting",
        "baseline",
    )


def test_what_is_said_of_revisits():
    def said(**given):
        return decide(signals(**given), T, {}).reason

    assert said(revisited=coming_back(0.041, 0.3)) == (
        "training on other samples now makes a sample's loss rise, by 0.041 \u00b1 0.01 nats a pass, and 30% of the "
        "loss that unseen samples would have is gone by seeing the same ones again: what it learns no longer carries "
        "over."
    )
    assert "no longer clearly lowers a sample's loss (-0.01 \u00b1 0.01 nats a pass)" in said(
        revisited=coming_back(-0.01, 0.3)
    )
    assert said(revisited=coming_back(-0.2, 0.3)) == (
        "training on other samples lowers a sample's loss, by 0.2 \u00b1 0.01 nats a pass: what it learns carries over."
    )
    assert said(revisited=coming_back(0.0, 0.1)).startswith("little has been memorized: 10% of the loss")


def test_a_training_loss_far_below_the_baselines():
    far = Span(now=1.2 * T.loss_below, low=1.1 * T.loss_below, high=1.2 * T.loss_below)
    against = {"has_baseline": True, "reached": True}
    assert decided(loss_below=far, **against) == ("approaching", "loss")
    assert decided(loss_below=far, interpolates=True, **against)[0] == "undecidable"
    assert decided(loss_below=far, schedule_difference="another", **against)[0] == "undecidable"
    weak = replace(far, low=0.9 * T.loss_below, high=0.9 * T.loss_below)
    assert decided(loss_below=weak, **against)[0] == "undecidable"
    assert decided("approaching", "loss", loss_below=weak, **against) == ("approaching", "loss")
    assert decided("approaching", "loss", has_baseline=True, reached=False) == ("approaching", "loss")


def test_a_learning_rate_that_has_just_dropped_is_no_memorizing():
    assert decided(repetition=repeating(2.0), lr_dropped=True)[0] == "undecidable"
    for previous in ("healthy", "approaching"):
        assert decided(previous, repetition=repeating(2.0), lr_dropped=True)[0] == previous
    drops = [replace(each, lr=1e-3 if each.step < 1000 else 1e-4) for each in by_hand(lambda x: 0.6, epoch=3.0)]
    detector = OverfitDetector()
    for each in drops:
        detector.update(each)
        assert detector.signals.lr_dropped == (1000 <= each.step < 1290)


@pytest.mark.parametrize("rate", [lambda x: 1e-3 * (1 - x / 2000), lambda x: 5e-4 * (1 + math.cos(math.pi * x / 2000))])
def test_a_schedule_that_ends_at_zero_is_no_drop(rate):
    detector = OverfitDetector()
    for each in by_hand(lambda x: 0.6, epoch=3.0, lr=rate):
        detector.update(each)
        assert not detector.signals.lr_dropped


def test_how_far_k_has_grown_is_known_in_a_long_run_and_after_a_resume_from_before():
    def reading(step, lar):
        return Reading(step=step, lar=lar, lar_vocab_centered=lar, n=64, m=10, loss=1.0, epoch=1.0 + step)

    def curve(step):
        return 0.75 - 0.1 * min(1.0, step / 200)

    detector = OverfitDetector()
    for step in range(5000):
        detector.update(reading(step, curve(step)))
    grown = 64 ** (2 * (curve(4) - curve(4999)))
    assert detector.signals.spread == pytest.approx(grown, rel=0.01)
    state = json.loads(json.dumps(detector.state_dict()))
    restored = OverfitDetector()
    restored.load_state_dict(state)
    assert restored.signals == detector.signals
    for step in range(20):  # resumed from the beginning, on another curve: the old heights are forgotten
        detector.update(reading(step, 0.6))
    assert detector.signals.spread == pytest.approx(1)


def test_while_nothing_has_repeated_or_the_warm_up_lasts_passes_and_spread_say_nothing():
    alarming = {"repetition": repeating(2, -1), "spread": 2 * T.spread_alarm, "classifies": True}
    assert decided(epoch=0.9, **alarming) == ("healthy", "epoch")
    assert decided(warm_up=None, **alarming) == ("undecidable", "nothing")


def test_the_spread_of_a_classifier():
    assert decided(classifies=True, spread=1.0) == ("healthy", "spread")
    assert decided(classifies=True, spread=1.01 * T.spread) == ("approaching", "spread")
    assert decided(classifies=True, spread=1.01 * T.spread_alarm) == ("overfitting", "spread")
    assert decided(classifies=True, spread=None) == ("undecidable", "nothing")
    said = decide(signals(classifies=True, spread=1.0, spent_early=True), T, {})
    assert said.outcome == "undecidable"
    assert said.reason.endswith("before k could be seen to grow; take readings more often.")
    assert decided(classifies=True, spread=1.01 * T.spread, spent_early=True) == ("approaching", "spread")


def test_the_spread_of_a_layer_with_more_outputs_than_inputs_says_nothing():
    assert decided(classifies=False, spread=9 * T.spread_alarm) == ("undecidable", "nothing")


def test_where_passes_can_be_seen_they_stand_for_the_spread():
    assert decided(classifies=True, spread=9 * T.spread_alarm, repetition=repeating()) == ("healthy", "strain")


def test_what_the_spread_said_stands_until_it_is_clearly_over():
    between = (1 + T.keep) / 2

    def after(previous, spread):
        return decided(previous, "spread", classifies=True, spread=spread)[0]

    assert after("overfitting", between * T.spread_alarm) == "overfitting"
    assert after("approaching", between * T.spread) == "approaching"
    assert after("healthy", between * T.spread) == "healthy"
    assert after("approaching", 0.99 * T.keep * T.spread) == "healthy"


def test_the_first_alarm_by_severity_stands():
    far = Deviation(now=1.0, low=1.0, high=1.0, between=0.0, scatter=0.0)
    near = Deviation(now=0.0, low=0.0, high=0.0, between=0.0, scatter=0.0)
    against = {"has_baseline": True, "reached": True}
    assert decided(deviation=far, repetition=repeating(), **against) == ("overfitting", "baseline")
    assert decided(deviation=near, repetition=repeating(2, 1), **against) == ("approaching", "strain")
    assert decided(deviation=near, repetition=repeating(2, -1), **against) == ("overfitting", "strain")
    assert decided(deviation=near, repetition=repeating(), **against) == ("healthy", "baseline")


def test_an_alarm_of_one_kind_makes_no_other_kind_more_ready_to_give_one():
    weak = (1 + T.keep) / 2
    below = T.approaching * weak
    near = Deviation(now=below, low=below, high=below, between=0.0, scatter=0.0)
    against = {"has_baseline": True, "reached": True, "deviation": near}
    assert decided("approaching", "baseline", **against)[0] == "approaching"
    assert decided("overfitting", "strain", **against)[0] == "healthy"
    assert decided("approaching", "strain", repetition=repeating(weak))[0] == "approaching"
    for other in ("baseline", "spread", "drops"):
        assert decided("overfitting", other, repetition=repeating(weak))[0] == "healthy"
    ended = {"has_baseline": True, "reached": False}
    assert decided("overfitting", "baseline", **ended) == ("overfitting", "baseline")
    assert decided("overfitting", "strain", **ended) == ("undecidable", "nothing")


def test_an_alarm_of_another_kind_does_not_stand_beyond_the_baselines_end():
    passes_alarm = in_passes(strained=4, inside=2e-4, count=200)
    quiet = [replace(each, loss=None) if each.step > 1500 else each for each in passes_alarm]
    same = Baseline.from_readings([each for each in passes_alarm if each.step <= 1200])
    changes, detector = outcomes(quiet, baseline=same)
    assert "overfitting" in {outcome for step, outcome in changes if step < 1200}
    assert "raised before stands" not in detector.verdict.reason


# Passes and spread, on readings --------------------------------------------------------------------------------------


def in_passes(*, strained, inside=-1e-4, count=200, steps_per_pass=200.0):
    """Readings that end with so many times the threshold of strain."""
    # Memorization is drop / steps_per_pass * step and the decline constant: strain grows with the step.
    drop, last = 0.05, 10.0 * (count - 1)
    rate = strained * T.strain / (drop / steps_per_pass * last)
    return by_hand(
        lambda x: 0.95 - rate * np.log(x / 20 + 1.0),
        count=count,
        epoch=lambda x: x / steps_per_pass,
        loss=lambda x: 5 + inside * x - drop * np.floor(x / steps_per_pass),
    )


def test_readings_of_a_run_that_memorizes():
    assert outcomes(in_passes(strained=0.5))[0][-1][1] == "healthy"
    changes, detector = outcomes(in_passes(strained=2))
    assert changes[-1][1] == "approaching"
    assert changes[-1][0] > 0.4 * 2000  # not before the threshold is reached, but for scatter
    verdict = detector.verdict
    assert verdict.evidence["strain"] == pytest.approx(2 * T.strain, rel=0.3)
    assert verdict.evidence["memorization"] == pytest.approx(0.05 / 200 * 1970, rel=0.02)
    assert verdict.evidence["learning"] == pytest.approx(1e-4 * 1990, rel=0.01)
    assert verdict.basis[0].startswith("what the training loss does inside passes over the data")
    assert f"approaching: a strain of {T.strain:g}" in verdict.basis[1]
    assert "docs/benchmark.md" in verdict.basis[1]
    changes, detector = outcomes(in_passes(strained=2, inside=2e-4))
    assert changes[-1][1] == "overfitting"
    assert "inside a pass" in detector.verdict.reason


def classifying(late, **fields):
    """Readings of a classifier whose vocabulary-centered k ends `late` times as large as it was."""
    fall = np.log(late) / (2 * np.log(64))
    form = {"lar_vocab_centered": lambda x: 0.8 - fall * float(np.clip((x - 500) / 500, 0, 1))}
    return by_hand(lambda x: 0.8, m=10, **(form | fields))


def test_readings_of_a_classifier():
    changes, detector = outcomes(classifying(1.0))
    assert [outcome for _, outcome in changes] == ["undecidable", "healthy"]
    assert detector.verdict.evidence["spread"] == pytest.approx(1.0)
    middle = (T.spread + T.spread_alarm) / 2
    assert outcomes(classifying(middle))[0][-1][1] == "approaching"
    changes, detector = outcomes(classifying(1.2 * T.spread_alarm))
    assert [outcome for _, outcome in changes] == ["undecidable", "healthy", "approaching", "overfitting"]
    assert 500 < changes[2][0] < changes[3][0] < 1100
    verdict = detector.verdict
    assert verdict.evidence["spread"] == pytest.approx(1.2 * T.spread_alarm)
    assert verdict.basis[0].startswith("vocabulary-centered LAR of a layer with no more outputs than inputs")
    assert f"overfitting: {T.spread_alarm:g}" in verdict.basis[1]
    assert "docs/benchmark.md" in verdict.basis[1]


def test_a_classifier_that_has_fitted_its_data_at_once_cannot_be_judged_so():
    first, *rest = classifying(1.0, loss=1e-4)
    changes, detector = outcomes([replace(first, loss=np.log(10)), *rest])
    assert {outcome for _, outcome in changes} == {"undecidable"}
    assert "take readings more often" in detector.verdict.reason


# The rule on recorded signals, and bad input -------------------------------------------------------------------------


def test_the_rule_is_a_function_of_signals_and_stands_by_what_it_said():
    detector = outcomes(recorded(REPEATED), baseline=Baseline.from_run(FRESH))[1]
    signals, thresholds = detector.signals, detector.thresholds
    for previous in (None, "healthy", "approaching", "overfitting", "undecidable"):
        said = decide(signals, thresholds, {} if previous is None else {"baseline": previous})
        assert (said.outcome, said.rests_on, said.standing["baseline"]) == ("overfitting", "baseline", "overfitting")
    signals = replace(signals, repetition=None, drops=(), loss_below=None)
    width = signals.width(thresholds)
    limit, alarm = max(thresholds.approaching, width), max(thresholds.overfitting, width)
    shallow = replace(signals, deviation=replace(signals.deviation, low=1.01 * limit, high=0.99 * alarm))
    assert decide(shallow, thresholds, {}).outcome == "approaching"
    assert decide(shallow, thresholds, {"baseline": "overfitting"}).outcome == "overfitting"
    lenient = OverfitThresholds(approaching=0.1, overfitting=0.2)
    assert decide(signals, lenient, {}).outcome == "healthy"
    assert signals.numbers(thresholds).keys() == detector.verdict.evidence.keys()


def test_an_alarm_says_how_many_like_it_came_in_time():
    page = (Path(__file__).parents[2] / "docs" / "benchmark.md").read_text()
    table = page.split("<!-- begin: alarms -->")[1].split("<!-- end: alarms -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    assert {kind: (int(near), int(alarms)) for kind, alarms, near in rows} == TOLD
    verdict = outcomes(recorded(REPEATED))[1].verdict
    near, alarms = TOLD["drops"]
    assert (
        verdict.sure
        == f"{near} of {alarms} such alarms in the benchmark kept a checkpoint within 0.05 nats of the best."
    )
    assert f"how sure: {verdict.sure}" in str(verdict)
    assert verdict.record()["sure"] == verdict.sure
    assert outcomes(recorded(FRESH))[1].verdict.sure == ""


def test_another_form_can_be_judged():
    for form, name, evidence in (
        ("lar", "plain LAR", "deviation_plain"),
        ("lar_vocab_centered", "vocabulary-centered LAR", "deviation_vocab_centered"),
    ):
        thresholds = replace(GIVEN, form=form)
        verdict = outcomes(recorded(REPEATED), baseline=Baseline.from_run(FRESH), thresholds=thresholds)[1].verdict
        assert verdict.outcome == "overfitting"
        assert verdict.evidence["deviation"] == verdict.evidence[evidence]
        assert verdict.basis[0].startswith(f"{name} against")


def test_where_the_form_is_not_recorded_plain_lar_is_judged():
    readings = recorded(REPEATED, lar_vocab_centered=None)
    verdict = outcomes(readings, baseline=Baseline.from_run(FRESH))[1].verdict
    assert verdict.evidence["deviation"] == verdict.evidence["deviation_plain"]
    assert verdict.basis[0].startswith("plain LAR against")


def test_a_reading_that_lacks_the_form_changes_nothing_of_what_is_judged():
    readings = recorded(REPEATED)
    holes = [replace(each, lar_vocab_centered=None) if i % 9 == 5 else each for i, each in enumerate(readings)]
    detector, forms = OverfitDetector(baseline=Baseline.from_run(FRESH)), set()
    for reading in holes:
        verdict = detector.update(reading)
        if verdict.evidence.get("deviation") is not None:
            forms.add(verdict.evidence["deviation"] == verdict.evidence["deviation_vocab_centered"])
    assert forms == {True}
    assert verdict.outcome == "overfitting"


def test_readings_out_of_order_duplicated_with_gaps_or_nan_give_a_defined_verdict():
    clean = in_passes(strained=3, inside=2e-4, count=120)
    rng = np.random.default_rng(0)
    shuffled = [clean[i] for i in rng.permutation(len(clean))]
    doubled = [reading for reading in clean for _ in range(2)]
    gaps = [reading for reading in clean if not 400 <= reading.step < 700]
    holes = [replace(reading, lar=math.nan) if i % 4 == 1 else reading for i, reading in enumerate(clean)]
    unknown = [replace(reading, loss=math.nan, epoch=math.nan, lr=math.nan) for reading in clean]
    for readings in (shuffled, doubled, gaps, holes, unknown, clean[:3], [*clean, *clean]):
        for detector in (OverfitDetector(), OverfitDetector(baseline=baseline())):
            for reading in readings:
                verdict = detector.update(reading)
                assert verdict.outcome in OUTCOMES
                assert verdict.reason.endswith(".")
                assert all(value is None or math.isfinite(value) for value in verdict.evidence.values())
    plain = judged(clean)[1].verdict
    for again in (doubled, [*clean, *clean], [*clean[:80], *clean[60:]]):
        verdict = judged(again)[1].verdict
        assert (verdict.outcome, verdict.since_step, verdict.step) == (plain.outcome, plain.since_step, plain.step)
        assert any("taken as a resume" in limit for limit in verdict.limits)
    assert judged(unknown)[1].verdict.outcome == "undecidable"
    assert judged(gaps)[1].verdict.outcome == plain.outcome == "overfitting"


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
    detector = outcomes(fell, baseline=baseline())[1]
    assert detector.verdict.outcome == "overfitting"
    good = [reading for reading in by_hand(count=150, **epochs(800)) if reading.step >= 500]
    changes, _ = outcomes(good, detector)
    assert changes == [(500, "healthy")]
    assert detector.verdict.since_step == 0


@pytest.mark.parametrize("given", [{}, {"baseline": Baseline.from_run(FRESH)}])
@pytest.mark.parametrize("back", [1, 12, 60])
def test_what_each_kind_of_evidence_said_is_taken_back_and_said_again(back, given):
    readings = recorded(REPEATED)[:120]
    changes, plain = outcomes(readings, **given)
    resumed = outcomes([*readings, *readings[-back:]], **given)[1]
    assert (resumed.verdict.outcome, resumed.verdict.since_step) == (plain.verdict.outcome, plain.verdict.since_step)
    assert resumed.signals == plain.signals
    assert changes[-1][1] == "overfitting"
