"""What `logalign follow` costs while it follows a run with a reading a second, in a real pseudo-terminal.

    python -m benchmarks.follow                 100 seconds, after a past of 1,000 readings
    python -m benchmarks.follow --past 20000    after a longer one

Prints the share of a core (user and system time of the process, from /proc, after it has caught up) and the bytes that
it sent. A run of several hundred seconds is steadier than one of a minute.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path

import pexpect
import pyte

ROWS, COLUMNS = 24, 80


def line(step: int) -> str:
    """A reading as a training writes them: a slow decline of LAR, with some noise, in passes of 50 readings."""
    noise = math.sin(12.9898 * step) * 43758.5453 % 1
    lar = 0.75 - 0.02 * math.log1p(step) + 0.004 * noise
    fields = {
        "step": step,
        "lar": lar,
        "lar_vocab_centered": lar - 0.02,
        "lar_token_centered": lar - 0.03,
        "lar_centered": lar - 0.05,
        "effective_dim": 512 ** (2 * (1 - lar)),
        "energies": {"weight": 100.0 + 0.01 * step, "input": 3.0, "output": 1.0},
        "time": time.time(),
        "n": 512,
        "m": 32768,
        "tokens": 4096,
        "tokens_seen": 4096 * (step + 1),
        "epoch": step / 500,
        "loss": 4 - 0.2 * math.log1p(step) + 0.1 * noise,
        "loss_mean": 4 - 0.2 * math.log1p(step),
        "lr": 3e-4,
    }
    return json.dumps(fields) + "\n"


def cpu_seconds(process: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--past", type=int, default=1000, help="readings that are there already")
    parser.add_argument("--seconds", type=int, default=100)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        (run / "run.json").write_text(json.dumps({"schema_version": 1, "main": "unembedding"}))
        with (run / "readings.jsonl").open("a") as log:
            log.writelines(line(10 * i) for i in range(arguments.past))
            log.flush()
            child = pexpect.spawn(
                sys.executable,
                ["-m", "logalign.cli", "follow", folder],
                dimensions=(ROWS, COLUMNS),
                env={**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"},
            )
            screen = pyte.Screen(COLUMNS, ROWS)
            stream, sent = pyte.ByteStream(screen), [0]

            def drain() -> None:
                while True:
                    try:
                        data = child.read_nonblocking(65536, timeout=1)
                    except pexpect.TIMEOUT:
                        continue
                    except (pexpect.EOF, OSError, ValueError):
                        return
                    sent[0] += len(data)
                    stream.feed(data)

            threading.Thread(target=drain, daemon=True).start()
            began = time.monotonic()
            while "running" not in screen.display[0]:
                time.sleep(0.1)
            caught_up = time.monotonic() - began
            start, cpu, before = time.monotonic(), cpu_seconds(child.pid), sent[0]
            for i in range(arguments.seconds):
                log.write(line(10 * (arguments.past + i)))
                log.flush()
                time.sleep(max(0.0, start + i + 1 - time.monotonic()))
            share = (cpu_seconds(child.pid) - cpu) / (time.monotonic() - start)
            rate = (sent[0] - before) / (time.monotonic() - start)
            child.send("q")
            child.wait()
    print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, {COLUMNS} x {ROWS}, "
        f"{arguments.past:,} readings before, {arguments.seconds} s with a reading a second: "
        f"{share:.2%} of a core, {rate / 1000:.1f} kB/s to the terminal; started and caught up in {caught_up:.1f} s"
    )


if __name__ == "__main__":
    main()
