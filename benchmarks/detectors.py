"""What judging costs: time and memory of a detector per reading, as a run grows to a million readings.

    python benchmarks/detectors.py [--readings 1000000]

Readings are simulated: a decline that is straight in log(step), with scatter, all forms and fields recorded. Both
logics judge every reading, without and with a baseline of 2,000 readings. Times are over the readings since the row
before; state is what a checkpoint has to hold, as JSON; memory is the whole detector, its baseline included, pickled.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import random
import statistics
import time
from array import array
from collections.abc import Iterator

from logalign import Baseline, Reading
from logalign.diagnosis.detector import Detector

MARKS = (100, 1_000, 10_000, 100_000, 1_000_000)
EVERY = 10


def reading(step: int, scatter: random.Random) -> Reading:
    """One simulated reading."""
    lar = 0.9 - 0.03 * math.log(step + 10) + scatter.gauss(0, 0.005)
    return Reading(
        step=step,
        lar=lar,
        lar_vocab_centered=lar - 0.01,
        lar_token_centered=lar - 0.1,
        lar_centered=lar - 0.1,
        n=128,
        m=2048,
        tokens_seen=2048 * step,
        epoch=1 + step / 10_000,
        loss=3.0 + scatter.gauss(0, 0.2),
        lr=1e-3,
        energies={"weight": 100.0, "input": 1.0, "output": 1.0},
    )


def readings(count: int, seed: int) -> Iterator[Reading]:
    """A run of so many readings."""
    scatter = random.Random(seed)
    return (reading(EVERY * i, scatter) for i in range(count))


def baseline(count: int) -> Baseline:
    """One run of the same length, recorded at 2,000 steps."""
    scatter = random.Random(1)
    stride = max(1, count // 2_000)
    return Baseline.from_readings([reading(EVERY * i, scatter) for i in range(0, count + stride, stride)])


def measure(count: int, reference: Baseline | None) -> None:
    """Print a row at every mark."""
    detector, times = Detector(baseline=reference), array("d")
    marks = [mark for mark in MARKS if mark <= count]
    for i, each in enumerate(readings(count, seed=0), 1):
        start = time.perf_counter()
        detector.update(each)
        times.append(1e6 * (time.perf_counter() - start))
        if i in marks:
            median, slow = statistics.median(times), statistics.quantiles(times, n=100)[-1]
            state, held = len(json.dumps(detector.state_dict())), len(pickle.dumps(detector))
            kind = "with" if reference is not None else "without"
            sizes = f"{state / 1e3:.0f} kB | {held / 1e3:.0f} kB"
            print(f"| {kind} | {i:,} | {median:.0f} us | {slow:.0f} us | {sizes} |", flush=True)
            times = array("d")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readings", type=int, default=1_000_000)
    count = parser.parse_args().readings
    print("| baseline | readings | time, median | 99 in 100 below | state | memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    for reference in (None, baseline(count)):
        measure(count, reference)


if __name__ == "__main__":
    main()
