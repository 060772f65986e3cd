"""What a report costs: time, size and memory of the page of a run, up to a million readings.

    python -m benchmarks.report [--readings 1000000] [--write]

A run folder is written for each size: LAR in four forms, losses and all other fields of a reading, along a recorded
run (tests/data/lm_repeat200k.jsonl) with scatter, one spike, and a held-out loss at every thousandth reading. Each
report is made by `logalign report` in a process of its own, start and imports included; memory is the highest resident
size of that process, which maps the log. `--write` puts the table between the markers in docs/performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.pages import put

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "tests" / "data" / "lm_repeat200k.jsonl"
PAGE = ROOT / "docs" / "performance.md"
SIZES = (1_000, 10_000, 100_000, 1_000_000)
N, M = 128, 2048


def write_run(folder: Path, count: int) -> None:
    """A run folder of so many readings."""
    recorded = [json.loads(line) for line in RECORDED.read_text().splitlines()]
    rng = np.random.default_rng(0)
    place = np.linspace(0, len(recorded) - 1, count)

    def along(name: str, scatter: float) -> np.ndarray:
        known = [(i, each[name]) for i, each in enumerate(recorded) if each.get(name) is not None]
        return np.interp(place, *np.array(known, dtype=float).T) + rng.normal(0, scatter, count)

    lar = along("lar", 0.003)
    lar[count // 3] = 0.95
    columns = {
        "lar": lar,
        **{form: along(form, 0.003) for form in ("lar_vocab_centered", "lar_token_centered", "lar_centered")},
        "effective_dim": N ** (2 * (1 - lar)),
        "epoch": along("epoch", 0.0),
        "loss": along("loss", 0.1),
        "loss_mean": along("loss", 0.03),
    }
    held_out = along("val_loss", 0.02)
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"schema_version": 1, "main": "unembedding", "every": 1}))
    with (folder / "readings.jsonl").open("w") as file:
        for step, row in enumerate(rows):
            record = {
                "step": step,
                "site": "unembedding",
                **dict(zip(columns, row, strict=True)),
                "energies": {"weight": 1234.5, "input": 123456.1234567, "output": 1234567.1234567},
                "time": 1_700_000_000.125 + step,
                "n": N,
                "m": M,
                "tokens": 2048,
                "tokens_seen": 2048 * step,
                "kept": 0.95,
                "lr": 1e-3,
                "nonfinite": 0,
                "reason": None,
            }
            if step % 1000 == 0:
                record["val_loss"] = float(held_out[step])
            file.write(json.dumps(record) + "\n")


def measure(count: int) -> str:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_run(folder / "run", count)
        log = (folder / "run" / "readings.jsonl").stat().st_size
        start = time.perf_counter()
        command = [sys.executable, "-m", "logalign.cli", "report", "run", "-o", "report.html"]
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        if process.returncode:
            raise SystemExit(f"logalign report ended with exit status {process.returncode}")
        page = (folder / "report.html").stat().st_size
    unit = 1024 if sys.platform != "darwin" else 1
    return (
        f"| {count:,} | {log / 1e6:,.1f} MB | {seconds:.1f} s | {usage.ru_utime + usage.ru_stime:.1f} s | "
        f"{page / 1e6:.1f} MB | {usage.ru_maxrss * unit / 1e6:,.0f} MB |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readings", type=int, default=1_000_000, help="the largest run")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    given = parser.parse_args()
    lines = [
        f"*{datetime.date.today().isoformat()}, {os.cpu_count()} cores, {platform.machine()}*",
        "",
        "| readings | log | time | CPU time | page | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    for count in sorted({size for size in SIZES if size < given.readings} | {given.readings}):
        line = measure(count)
        print(line, flush=True)
        lines.append(line)
    if given.write:
        put(PAGE, "report", "\n".join(lines))


if __name__ == "__main__":
    main()
