"""How long `logalign export` takes for 2,000 runs of 50 readings, or another number of runs, and how much memory.

    python -m benchmarks.export [RUNS]

Prints one line with the date, for docs/compare.md.
"""

import resource
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

from logalign import Reading
from logalign.runs.writer import RunWriter

RUNS, READINGS = 2_000, 50


def write_runs(folder: Path, *, runs: int, readings: int) -> None:
    """Run folders with the fields that `watch` records."""
    for run in range(runs):
        writer = RunWriter(folder / f"{run:05d}", {"main": "unembedding", "settings": {"lr": 0.001 * run, "seed": run}})
        for i in range(readings):
            writer.append(
                Reading(
                    step=10 * i,
                    lar=0.5 + 0.001 * i,
                    lar_vocab_centered=0.5,
                    lar_token_centered=0.5,
                    lar_centered=0.5,
                    effective_dim=64.0,
                    energies={"weight": 1.0, "input": 2.0, "output": 3.0},
                    time=1.7e9 + i,
                    n=64,
                    m=512,
                    tokens=1024,
                    tokens_seen=1024 * i,
                    epoch=i / 10,
                    loss=2.0,
                    nonfinite=0,
                    extra={"val_loss": 2.0} if run % 2 else {"accuracy": 0.5},
                )
            )
        writer.close()


def main(runs: int = RUNS) -> None:
    """Measure in a process of its own, so that the peak of memory is that of the export."""
    with tempfile.TemporaryDirectory() as folder:
        write_runs(Path(folder) / "runs", runs=runs, readings=READINGS)
        out = Path(folder) / "all.parquet"
        began = perf_counter()
        command = [sys.executable, "-m", "logalign.cli", "export", f"{folder}/runs", "--parquet", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000  # kB on Linux
        print(
            f"{datetime.now(UTC):%Y-%m-%d}: {runs:,} runs of {READINGS} readings: {seconds:.1f} s, "
            f"{peak:.0f} MB at the peak"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
