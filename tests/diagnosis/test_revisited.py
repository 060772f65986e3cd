"""What a detector keeps of samples that come back: on passes made by hand, and on five recorded trainings."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from logalign import Reading
from logalign.diagnosis.detector import Detector
from logalign.diagnosis.revisited import RevisitMemory
from logalign.diagnosis.series import Series
from logalign.samples.record import SampleRecord
from logalign.samples.visits import hashes_of

RECORDED = Path(__file__).parents[1] / "data" / "revisits"
PASS = 40


def passes(gains, *, drifts=None, loss=3.0, every=10, lr=None, scale=1.0):
    """Readings of passes of 40 steps; from the second pass on each has a gain, and a drift."""
    drifts = [-0.1 - 0.01 * i for i in range(len(gains))] if drifts is None else drifts
    readings = []
    for step in range(0, PASS * (len(gains) + 2), every):
        number = step // PASS - 2
        known = number >= 0
        readings.append(
            Reading(
                step=step,
                lar=0.6 + 1e-4 * math.sin(step),
                loss=scale * loss,
                passes=step / PASS,
                lr=None if lr is None else lr(step),
                drift=scale * drifts[number] if known else None,
                drift_error=scale * 0.01 if known else None,
                gain=scale * gains[number] if known else None,
                gain_error=scale * 0.03 if known else None,
                m=50,
                n=40,
            )
        )
    return readings


def followed(readings):
    series, memory = Series(), RevisitMemory()
    for reading in readings:
        if series.goes_back(reading):
            series.rewind(reading.step)
            memory.rewind(reading.step)
        series.add(reading)
        memory.follow(series)
    return memory


def test_gains_are_summed_once_a_pass():
    for every in (2, 10, 20, 40):
        found = followed(passes([0.1, 0.2, 0.4], drifts=[0.1, 0.2, 0.0], every=every)).now
        assert found.memorized == pytest.approx(0.7)
        assert found.memorized_error == pytest.approx(0.03 * math.sqrt(3))
        assert (found.passes, found.drift) == (4, 0.0)
        assert found.share == pytest.approx(0.7 / 3.7)
        assert found.of_the_first() == pytest.approx(0.7 / 3)


def test_what_is_learned_from_others_makes_up_for_what_was_memorized():
    found = followed(passes([0.5, 0.0], drifts=[0.0, -1.4])).now
    assert found.memorized == pytest.approx(0.5 * (1 - 1.4 / 3.5))
    assert followed(passes([0.5, 0.0], drifts=[0.0, -9.0])).now.memorized == 0


def test_readings_farther_apart_than_passes_count_those_between():
    found = followed(passes([0.1, 0.2, 0.4, 0.4, 0.4], drifts=[0.1, 0.2, 0.3, 0.2, 0.1], every=80)).now
    # Of passes 2, 4 and 6 readings are there; the gain of the last stands for the pass before it, too.
    assert found.memorized == pytest.approx(0.1 + 2 * 0.4 + 2 * 0.4)
    assert found.passes == 6


def test_nothing_is_known_before_the_first_drift_or_after_the_last():
    readings = passes([0.1, 0.2])
    assert followed(readings[:8]).now is None
    assert followed(readings[:8]).before is None
    lost = replace(readings[-1], step=readings[-1].step + 10, drift=None, gain=None)
    assert followed([*readings, lost]).now is None
    assert followed(readings).before.memorized == pytest.approx(0.1)


def test_a_share_is_never_below_zero_nor_above_one():
    memory = followed(passes([-0.5, -0.5]))
    assert (memory.now.share, memory.now.of_the_first(), memory.now.unseen) == (0, 0, 3)
    assert followed(passes([9.0, 9.0], loss=0.0)).now.share == 1


def test_pace_is_the_learning_rate_beside_its_highest():
    assert followed(passes([0.1, 0.1])).now.pace == 1
    found = followed(passes([0.1, 0.1], lr=lambda step: 1.0 if step <= 80 else 0.25)).now
    assert found.pace == pytest.approx(0.25)


def test_a_resume_takes_back_what_it_replaces_and_a_state_goes_on():
    readings = passes([0.1, 0.2, 0.4, 0.3])
    whole = followed(readings)
    for back in (1, 5, 12):
        assert followed([*readings, *readings[-back:]]).now == whole.now
    state = json.loads(json.dumps(whole.state(), allow_nan=False))
    assert RevisitMemory.from_state(state).now == whole.now
    assert RevisitMemory.from_state(state).before == whole.before


def test_the_scale_of_the_loss_changes_no_outcome():
    drifts = [-0.4, -0.2, 0.0, 0.02, 0.05]
    gains = [0.3] * 5

    def said(scale):
        detector = Detector()
        return [detector.update(each).outcome for each in passes(gains, drifts=drifts, scale=scale)]

    assert said(1.0)[-1] == "overfitting"
    assert said(100.0) == said(0.01) == said(1.0)


def readings_of(path):
    """The readings that a monitor would have taken every five steps, and the smoothed held-out loss at them."""
    with np.load(path) as run:
        hashes = np.array(hashes_of(range(int(run["samples"].max()) + 1)))
        record, readings = SampleRecord(), []
        lar = dict(zip(run["step"].tolist(), run["lar"].tolist(), strict=True))
        length = int(run["steps_per_pass"])
        for step, (samples, losses) in enumerate(zip(run["samples"], run["losses"], strict=True)):
            record.add(step, hashes[samples], losses)
            if step in lar:
                fields = record.fields(step, step / length)
                readings.append(Reading(step=step, lar=lar[step], loss=float(losses.mean()), m=1024, n=96, **fields))
        held_out = np.array([run["val_loss"][max(0, i - 2) : i + 3].mean() for i in range(len(run["val_loss"]))])
        return readings, np.interp([each.step for each in readings], run["val_step"], held_out)


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.npz")), ids=lambda path: path.stem[:24])
def test_recorded_trainings(path):
    readings, held_out = readings_of(path)
    detector = Detector()
    outcomes = [detector.update(reading).outcome for reading in readings]
    alarm = next((i for i, said in enumerate(outcomes) if said in ("approaching", "overfitting")), None)
    regret = held_out[-1 if alarm is None else alarm] - held_out.min()
    if held_out[-1] - held_out.min() > 0.05:
        assert detector.verdict.outcome == "overfitting"
        assert regret < 0.05
    else:
        assert regret < 0.03
    changes = [after for before, after in itertools.pairwise(outcomes) if before != after]
    assert len(changes) <= 4
