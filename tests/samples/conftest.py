"""Recorded runs with every sample's loss."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

RUNS = sorted((Path(__file__).parent.parent / "data" / "revisits").glob("*.npz"))


class Recorded(NamedTuple):
    """A run's visits: samples [v], steps [v], losses [v], and the length of a pass."""

    samples: np.ndarray
    steps: np.ndarray
    losses: np.ndarray
    steps_per_pass: int


@pytest.fixture(params=RUNS, ids=lambda path: path.stem[:24])
def recorded(request):
    """One run after the other."""
    with np.load(request.param) as run:
        steps = np.repeat(np.arange(len(run["samples"])), run["samples"].shape[1])
        return Recorded(
            run["samples"].ravel().astype(int), steps, run["losses"].ravel().astype(float), int(run["steps_per_pass"])
        )
