"""What the tests of trackers share: recorded curves, given to a tracker as a training would."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from logalign import open_run
from logalign.diagnosis.detector import Detector
from logalign.runs.reading import Reading, Readings
from logalign.trackers.tracker import Trackers, open_trackers
from tests.drifts import drifting

DATA = Path(__file__).parent.parent / "data"

os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


@pytest.fixture(scope="session")
def recorded() -> list[Reading]:
    """A language model that repeats its data: 150 readings with drift, at the end of which it overfits."""
    return drifting(open_run(DATA / "lm_repeat200k.jsonl").readings)


def no_warning(key: str, message: str) -> None:
    raise AssertionError(message)


def show(
    trackers: object,
    readings: list[Reading],
    *,
    folder: Path | None = None,
    warn: Callable[[str, str], None] = no_warning,
    after: Callable[[Reading], None] = lambda reading: None,
) -> None:
    """Open trackers, give them the readings and the verdict at each, and close them."""
    opened = Trackers(open_trackers(trackers, folder=folder), warn=warn)
    detector = Detector()
    for reading in readings:
        detector.update(reading)
        opened.log(Readings({reading.site: reading}, main=reading.site), detector.verdict)
        after(reading)
    opened.close()


def check_same(found: list[Reading], expected: list[Reading], *, rel: float = 0.0) -> None:
    """The same steps, sites and numbers, but for the time and what no tracker is given."""
    numbers = [
        [
            {
                name: value
                for name, value in reading.record().items()
                if name not in ("time", "energies", "tokens", "standard_errors", "reason", "drift_reason")
                and value is not None
            }
            for reading in each
        ]
        for each in (found, expected)
    ]
    assert len(numbers[0]) == len(numbers[1])
    for one, other in zip(*numbers, strict=True):
        texts = {name: value for name, value in other.items() if isinstance(value, str)}
        assert {name: one.get(name) for name in texts} == texts
        rest = [{name: value for name, value in each.items() if name not in texts} for each in (one, other)]
        assert rest[0] == (pytest.approx(rest[1], rel=rel, abs=0) if rel else rest[1])


@pytest.fixture
def tools() -> tuple[Callable[..., None], Callable[..., None]]:
    """`show` and `check_same`."""
    return show, check_same
