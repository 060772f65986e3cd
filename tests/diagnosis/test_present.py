"""A verdict speaks of now: of trainings that have diverged, and of those that are not measured any more."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import logalign
from logalign import Reading, diagnose, open_run
from logalign.diagnosis.detector import Detector

CASES = Path(__file__).parents[1] / "data" / "cases"
NAN = {"lar": None, "nonfinite": 3, "reason": "3 rows of weight, inputs or outputs hold a NaN or an infinity"}


def healthy(count=30, **fields):
    given = {"lar": 0.6, "loss": 2.0, "epoch": 0.5, "tokens": 100, "m": 50, "n": 20} | fields
    return [Reading(step=10 * i, **(given | {"lar": given["lar"] and given["lar"] - 1e-4 * i})) for i in range(count)]


def then(readings, count, **fields):
    """The same, with so many readings more that differ in these fields."""
    last = readings[-1]
    return [*readings, *(replace(last, step=last.step + 10 * i, **fields) for i in range(1, count + 1))]


def test_a_recorded_run_whose_weights_became_nan():
    found = diagnose(CASES / "diverged.jsonl")
    assert (found.outcome, found.is_alarm, found.exit_status) == ("diverged", True, 3)
    assert "since step 600" in found.reason
    assert "hold a NaN or an infinity" in found.reason
    assert found.step == open_run(CASES / "diverged.jsonl").readings[-1].step


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (NAN, "LAR has been undefined since step 300: 3 rows of weight"),
        ({"lar": None, "reason": "the output energy is zero"}, "LAR has been undefined since step 300: the output"),
        ({"loss": None}, "the loss has been undefined since step 300: it is not a finite number."),
        (NAN | {"loss": None}, "LAR has been undefined since step 300"),
    ],
)
def test_three_readings_tell(fields, reason):
    assert diagnose(then(healthy(), 2, **fields)).outcome == "healthy"
    for count in (3, 40):
        found = diagnose(then(healthy(), count, **fields))
        assert found.outcome == "diverged"
        assert found.since_step == 320
        assert found.reason.startswith(reason)


def test_what_comes_back_is_judged_again_and_the_alarm_stays_in_the_verdict():
    found = diagnose(then(then(healthy(), 5, **NAN), 3, lar=0.59, nonfinite=0, reason=None))
    assert (found.outcome, found.exit_status) == ("healthy", 3)
    assert [str(each) for each in found.earlier] == ["diverged from step 320 to 340"]


def test_a_head_of_zeros_has_not_diverged_before_it_was_trained():
    first = [Reading(step=i, lar=None, reason="the output energy is zero", loss=2.0, tokens=9) for i in range(9)]
    assert diagnose(first).outcome == "undecidable"


def test_a_loss_that_was_never_recorded_or_only_now_and_then_is_not_missing():
    assert diagnose(healthy(loss=None)).outcome == "healthy"
    sparse = [replace(each, loss=2.0 if i % 5 == 0 else None) for i, each in enumerate(healthy())]
    assert diagnose(sparse).outcome == "healthy"


def test_rows_without_a_measurement_say_nothing():
    rows = then(healthy(), 9, lar=None, loss=None)
    assert diagnose(rows).outcome == "healthy"


def test_nothing_is_known_where_nothing_is_measured_any_more():
    why = "no training forward reached this layer (30 in model.eval())"
    found = diagnose(then(healthy(), 3, lar=None, tokens=0, reason=why))
    assert (found.outcome, found.exit_status) == ("undecidable", 4)
    assert found.reason == f"nothing has been measured since step 300: {why}."
    assert "model.train()" in found.suggestion


def test_a_resume_forgets_what_it_replaces():
    detector = Detector()
    for reading in then(healthy(), 3, **NAN):
        verdict = detector.update(reading)
    assert verdict.outcome == "diverged"
    for reading in healthy()[25:]:
        verdict = detector.update(reading)
    assert (verdict.outcome, verdict.earlier) == ("healthy", ())


def test_a_state_goes_on():
    readings = then(healthy(), 5, **NAN)
    for cut in (5, 31, 33, 34):
        first, second = Detector(), Detector()
        for reading in readings[:cut]:
            first.update(reading)
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        assert second.verdict == first.verdict
        for reading in readings[cut:]:
            assert second.update(reading) == first.update(reading)


@pytest.mark.filterwarnings("ignore::logalign.errors.LogAlignWarning")
def test_a_training_whose_weights_become_nan():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    x, y = torch.randn(640, 20), torch.randint(0, 5, (640,))
    with logalign.watch(model, every=1) as monitor:
        for step in range(90):
            chosen = torch.randint(0, 640, (64,))
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 60:
                with torch.no_grad():
                    model[0].weight.fill_(float("nan"))
            monitor.step(loss=loss, epoch=step / 10)
    assert (monitor.verdict.outcome, monitor.verdict.is_alarm) == ("diverged", True)
