import json

import pytest

from logalign import Baseline, Reading
from logalign.diagnosis.detector import Detector
from logalign.diagnosis.guarded import GuardedDetector
from logalign.errors import InputError


def readings(count=30, **fields):
    return [Reading(step=10 * i, lar=0.5 + 0.001 * i, epoch=0.1, m=512, n=64, **fields) for i in range(count)]


@pytest.fixture
def told():
    return []


@pytest.fixture
def detector(told):
    return GuardedDetector(baseline=None, regime="auto", warn=told.append)


def test_it_says_what_a_detector_says(detector, told):
    plain = Detector()
    assert detector.verdict == plain.verdict
    for reading in readings():
        detector.update(reading)
        assert detector.verdict == plain.update(reading)
    state = json.loads(json.dumps(detector.state_dict(), allow_nan=False))
    other = GuardedDetector(baseline=None, regime="auto", warn=told.append)
    other.load_state_dict(state)
    assert other.verdict == detector.verdict
    assert told == []


def test_a_fault_is_told_once_becomes_the_verdict_and_stops_nothing(told):
    detector = GuardedDetector(baseline=Baseline.from_readings(readings(lr=1.0)), regime="decline", warn=told.append)
    detector.update(readings()[0])
    for step in (10, 20):
        detector.update(Reading(step=step, lar=0.5, m=512, n=128))
    assert len(told) == 1
    assert told[0].startswith("there will be no more verdicts, for the detector failed (InputError: step 10: expected")
    assert (detector.verdict.outcome, detector.verdict.step) == ("undecidable", 0)
    assert "the readings cannot be judged together: step 10" in detector.verdict.reason
    assert detector.state_dict() is None


def test_any_fault(detector, told, monkeypatch):
    monkeypatch.setattr("logalign.diagnosis.overfitting.decide", lambda *_: 1 / 0)
    detector.update(readings()[0])
    assert "ZeroDivisionError: division by zero" in told[0]
    assert detector.verdict.reason == "the detector failed (ZeroDivisionError: division by zero)."


def test_the_past_is_read_when_it_is_needed_and_once(detector):
    asked = []

    def past():
        asked.append(True)
        return readings(20)

    detector.update(Reading(step=990, lar=0.9))
    detector.restart(past)
    assert asked == []
    detector.update(readings(21)[-1])
    assert detector.verdict.step == 200
    assert detector.verdict.since_step == 0
    assert asked == [True]
    detector.restart(past)
    detector.load_state_dict(Detector().state_dict())
    assert detector.verdict.step is None
    assert asked == [True]


def test_a_state_of_something_else_is_refused(detector):
    with pytest.raises(InputError, match=r"expected what Detector\.state_dict"):
        detector.load_state_dict({"version": 0})
