"""Trainings and logs on which verdicts went wrong before, each for its class."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import logalign
from logalign import Reading, diagnose, open_run
from logalign.diagnosis.detector import Detector

CASES = Path(__file__).parents[1] / "data" / "cases"
SCHEDULES = {
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + np.cos(np.pi * share)) / 2,
    "stable, then down": lambda share: np.minimum(1, (1 - share) / 0.2),
    "square root": lambda share: np.sqrt(1 - share),
}


def test_a_schedule_to_zero_changes_nothing_of_the_same_readings():
    constant, linear = (diagnose(CASES / f"{name}.jsonl") for name in ("constant", "linear"))
    assert (linear.outcome, linear.since_step, linear.reason) == (
        constant.outcome, constant.since_step, constant.reason,
    )  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("peak", [1e-5, 1.0])
def test_every_schedule_to_zero_keeps_the_verdict(schedule, peak):
    readings = open_run(CASES / "constant.jsonl").readings
    last = readings[-1].step
    scheduled = [replace(each, lr=float(peak * schedule(each.step / last))) for each in readings]
    without = [replace(each, lr=None) for each in readings]
    expected = diagnose(readings)
    for others in (scheduled, without):
        found = diagnose(others)
        assert (found.outcome, found.since_step) == (expected.outcome, expected.since_step)


def test_since_step_is_that_of_the_outcome_that_is_shown_and_alarms_are_named():
    detector, said = Detector(), []
    for reading in open_run(CASES / "outcomes.jsonl").readings:
        verdict = detector.update(reading)
        said.append((reading.step, verdict.outcome))
        since = next(step for step, outcome in said if outcome == verdict.outcome and not _changes_after(said, step))
        assert verdict.since_step == since
        alarms = {outcome for _, outcome in said if outcome in ("overfitting", "memorizing", "diverged")}
        assert {each.outcome for each in verdict.earlier} | ({verdict.outcome} & alarms) == alarms
    assert "epoch" not in verdict.suggestion
    assert "loss" not in verdict.suggestion


def _changes_after(said, step):
    after = [outcome for at, outcome in said if at >= step]
    return len(set(after)) > 1


@pytest.mark.parametrize("name", ["rising", "small_loss"])
def test_no_share_is_above_all_or_below_nothing(name):
    detector = Detector()
    for reading in open_run(CASES / f"{name}.jsonl").readings:
        verdict = detector.update(reading)
        for percent in re.findall(r"-?[\d.]+%", f"{verdict.reason} {verdict.sure}"):
            assert 0 <= float(percent.rstrip("%")) <= 100
        for share in ("revisited_share", "dropped_share"):
            value = verdict.evidence.get(share)
            assert value is None or 0 <= value <= 1


@pytest.mark.parametrize("first", [0.693, 0.11, 1.0, 0.02])
def test_a_loss_that_is_no_cross_entropy_is_never_memorized(first):
    """Of a hundred labels, each yes or no; of squared errors; of a fine-tuning: all under 5 % of log m soon."""
    losses = np.geomspace(first, first / 30, 120)
    readings = [
        Reading(
            step=10 * i, lar=0.52 + 1e-4 * (i % 7), lar_centered=0.5 + 1e-4 * (i % 5), loss=float(loss), epoch=i / 10
        )
        for i, loss in enumerate(losses)
    ]
    detector = Detector()
    for reading in readings:
        verdict = detector.update(replace(reading, m=100, n=128))
        assert verdict.outcome not in ("memorizing", "generalizing")


def test_a_training_with_many_labels_does_not_enter_the_grokking_regime():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 100))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    x = torch.randn(640, 30)
    y = (x @ torch.randn(30, 100) > 11).float()
    regimes = set()
    with logalign.watch(model, every=2) as monitor:
        for _ in range(12):
            for chosen in torch.randperm(640).split(64):
                loss = F.binary_cross_entropy_with_logits(model(x[chosen]), y[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                monitor.step(loss=loss)
                regimes.add(monitor.verdict.regime)
    assert loss < 0.05 * np.log(100)
    assert "grokking" not in regimes


@pytest.mark.parametrize("seed", range(2))
def test_clean_digits_are_no_alarm(seed):
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x, y = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(seed)
    order = torch.randperm(len(x))[:1300]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    outcomes = set()
    with logalign.watch(model, every=5) as monitor:
        for _ in range(12):
            for chosen in order[torch.randperm(len(order))].split(64):
                loss = F.cross_entropy(model(x[chosen]), y[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                monitor.step(loss=loss)
                outcomes.add(monitor.verdict.outcome)
    assert outcomes <= {"healthy", "undecidable"}
