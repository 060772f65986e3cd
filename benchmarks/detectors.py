"""What judging costs: time and memory of a detector per reading, as a run grows to a million readings.

    python -m benchmarks.detectors [--readings 1000000] [--write]

Without an option: 30,000 readings, a minute on an idle core; `--write` puts the table between the markers in
docs/performance.md.

Readings are simulated: a decline that is straight in log(step), with scatter, all forms and fields recorded. Both
logics judge every reading, without and with a baseline of 2,000 readings. Times are of the thread's own CPU, over the
readings since the row before; state is what a checkpoint has to hold, as JSON; memory is the whole detector, its
baseline included, pickled.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import pickle
import platform
import random
import statistics
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

from benchmarks.pages import put
from logalign import Baseline, Reading
from logalign.diagnosis.detector import Detector, diagnose

MARKS = (100, 1_000, 10_000, 100_000, 1_000_000)
EVERY = 10
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


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
        epoch=step / 500,  # passes are seen from the first rows on
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


def measure(count: int, reference: Baseline | None) -> Iterator[str]:
    """A row at every mark, and at the end."""
    detector, times = Detector(baseline=reference), array("d")
    marks = {mark for mark in MARKS if mark <= count} | {count}
    for i, each in enumerate(readings(count, seed=0), 1):
        start = time.thread_time()
        detector.update(each)
        times.append(1e6 * (time.thread_time() - start))
        if i in marks:
            median, slow = statistics.median(times), statistics.quantiles(times, n=100)[-1]
            state, held = len(json.dumps(detector.state_dict())), len(pickle.dumps(detector))
            kind = "with" if reference is not None else "without"
            yield f"| {kind} | {i:,} | {median:.0f} us | {slow:.0f} us | {state / 1e3:.0f} kB | {held / 1e3:.0f} kB |"
            times = array("d")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readings", type=int, default=30_000)
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    given = parser.parse_args()
    diagnose(readings(200, seed=0))  # what is imported and compiled once is not of a reading
    lines = [
        f"*{datetime.date.today().isoformat()}, {os.cpu_count()} cores, {platform.machine()}, seconds of CPU time*",
        "",
        "| baseline | readings | time, median | 99 in 100 below | state | memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    for reference in (None, baseline(given.readings)):
        for line in measure(given.readings, reference):
            print(line, flush=True)
            lines.append(line)
    if given.write:
        put(PAGE, "detectors", "\n".join(lines))


if __name__ == "__main__":
    main()
