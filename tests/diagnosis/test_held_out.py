"""Recorded held-out losses beside verdicts: when they disagree, and that no outcome rests on them."""

from dataclasses import replace

import numpy as np
import pytest

from logalign import diagnose, open_run
from logalign.diagnosis.detector import Detector
from logalign.diagnosis.held_out import HeldOut, HeldOutMemory, held_out
from logalign.runs.reading import Reading

MOVED = HeldOut(lowest=2.0, lowest_step=400, last=3.0, last_step=900, range=2.0, error=0.01)


def test_moving_means_of_all_evaluations_and_of_few():
    steps = np.arange(0.0, 200.0, 10.0)
    losses = np.abs(np.arange(20.0) - 7) / 10 + 2
    found = held_out(steps, losses)
    assert found.lowest == pytest.approx(losses[5:10].mean())
    assert (found.lowest_step, found.last_step) == (70, 190)
    assert found.last == pytest.approx(losses[-3:].mean())
    few = held_out(steps[:5], np.array([2.0, 1.5, 1.75, 2.0, np.nan]))
    assert (few.lowest, few.lowest_step, few.last) == (1.5, 10, 2.0)
    assert held_out(steps[:4], np.array([2.0, 1.5, np.nan, 2.0])) is None


def test_noise_is_no_rise():
    rng = np.random.default_rng(0)
    steps = np.arange(300.0)
    falling = 3 * np.exp(-steps / 60) + 2
    for seed_losses in (falling + 0.1 * rng.standard_normal(300) for _ in range(20)):
        assert not held_out(steps, seed_losses).has_risen
    assert held_out(steps, falling + 0.002 * np.maximum(steps - 150, 0)).has_risen


@pytest.mark.parametrize(
    ("changes", "outcome", "said"),
    [
        ({}, "healthy", "was lowest at step 400 (2) and has risen by 50% since; the verdict does not use it."),
        ({"last": 5.0}, "undecidable", "was lowest at step 400 (2) and has risen to 5 since;"),
        ({"lowest": -1.0, "last": 0.5}, "generalizing", "and has risen to 0.5 since;"),
        ({}, "overfitting", ""),
        ({}, "approaching", ""),
        ({"last": 2.03}, "healthy", ""),
        ({"error": 0.5}, "healthy", ""),
        ({"lowest": 1e-6, "last": 1e-3}, "healthy", ""),
        ({"last": 2.0}, "overfitting", "is at its lowest (2 at step 900); the verdict does not use it."),
        ({"last": 2.005}, "memorizing", "is at its lowest"),
        ({"last": 2.1}, "overfitting", ""),
    ],
)
def test_what_disagrees(changes, outcome, said):
    found = replace(MOVED, **changes).against(outcome)
    assert found.startswith("the recorded held-out loss ") if said else found == ""
    assert said in found


def test_a_run_with_lar_whose_held_out_loss_rises(data):
    readings = open_run(data / "held_out_rises.jsonl").readings
    verdict = diagnose(readings)
    assert verdict.outcome == "healthy"
    assert verdict.held_out.startswith("the recorded held-out loss was lowest at step 400 (")
    blind = diagnose([replace(reading, extra={}) for reading in readings])
    assert blind == replace(verdict, held_out="")


def test_an_alarm_while_the_held_out_loss_falls(data):
    readings = open_run(data / "lm_repeat200k.jsonl").readings
    falls = [replace(each, extra={"val_loss": 5 - each.step / 1000}) for each in readings]
    verdict = diagnose(falls)
    assert verdict.outcome == "overfitting"
    assert "is at its lowest" in verdict.held_out
    assert f"but: {verdict.held_out}" in str(verdict).splitlines()
    assert "but:" in verdict._repr_html_()


def test_a_resume_and_a_saved_state(data):
    readings = open_run(data / "held_out_rises.jsonl").readings
    detector = Detector()
    for reading in readings:
        detector.update(reading)
    loaded = Detector()
    loaded.load_state_dict(detector.state_dict())
    assert loaded.verdict == detector.verdict
    back = next(each for each in readings if each.step >= 420)
    assert detector.update(replace(back, extra={})).held_out == ""


def test_memory_is_bounded():
    memory = HeldOutMemory()
    for step in range(5000):
        memory.update(Reading(step=step, lar=None, extra={"val_loss": 1 + step / 1000}))
    assert len(memory.state()["bins"]) <= 256
    assert "was lowest at step" in memory.against("healthy")
