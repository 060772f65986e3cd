"""What a very large run would pay, worked out from parts that are measured here.

    python -m benchmarks.scale            measure the parts, work out the rest, print both tables
    python -m benchmarks.scale --write    and put them into docs/scale.md

Measured: the host's time for a monitored forward of a layer and for its reading, with layers so small that arithmetic
takes next to nothing, and the bytes of a line in the log. All else is arithmetic on `ASSUMED`, which the page states.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import logalign
from benchmarks.pages import markdown, measured_here, put, show
from logalign.torch.meter import SCALARS

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
SITES, ROUNDS = 200, 15
ASSUMED = {
    "ranks": 10_000,
    "seconds a step": 10.0,
    "steps": 1_000_000,
    "GB/s of an all-reduce, each rank": 20.0,
    "microseconds of latency a hop": 10.0,
    "n": 4096,
    "m of a hidden layer": 8192,
    "m of the unembedding": 128_256,
}
"""10 s is a usual step of pre-training on so many ranks; 20 GB/s is less than half of a 400 Gb/s link."""
Rows = list[dict[str, str]]


class Chain(nn.Module):
    """So many tiny layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(SITES)])

    def forward(self, x: Tensor) -> Tensor:
        """[T, 8] to [T, 8]."""
        for layer in self.layers:
            x = layer(x)
        return x


def measured() -> dict[str, float]:
    """Seconds of host time a site, and bytes a line."""
    torch.set_num_threads(1)
    inputs, forwards, plain, readings = torch.randn(4, 8), [], [], []
    with tempfile.TemporaryDirectory() as folder:
        model, bare = Chain(), Chain()
        run = Path(folder) / "run"
        with logalign.watch(model, layers=["layers.*"], every=1, run=run) as monitor:
            for _ in range(ROUNDS):
                forwards.append(timed(lambda: model(inputs)))
                plain.append(timed(lambda: bare(inputs)))
                readings.append(timed(lambda: monitor.step(loss=1.0, lr=1e-3, epoch=0.5)))
        lines = (run / "readings.jsonl").read_bytes()
        hook = statistics.median(with_ - without for with_, without in zip(forwards, plain, strict=True)) / SITES
        idle = statistics.median(idle_forward(model, bare, inputs) for _ in range(ROUNDS)) / SITES
    return {
        "a monitored forward": hook,
        "a reading, its line in the log included": statistics.median(readings) / SITES,
        "a forward between monitored steps": idle,
        "bytes a line": len(lines) / lines.count(b"\n"),
    }


def idle_forward(model: nn.Module, bare: nn.Module, inputs: Tensor) -> float:
    """Seconds that hooks take which are not armed."""
    with logalign.watch(model, layers=["layers.*"], every=1000) as monitor:
        model(inputs)
        monitor.step()
        return timed(lambda: model(inputs)) - timed(lambda: bare(inputs))


def timed(run: object) -> float:
    """Seconds of CPU time that a call takes."""
    assert callable(run)
    begun = time.thread_time()
    run()
    return time.thread_time() - begun


def worked_out(parts: dict[str, float]) -> Rows:
    """What one monitored step costs, and which interval keeps it under a thousandth."""
    a = ASSUMED
    layers = {"the unembedding": (0, 1), f"{SITES} hidden layers and it": (SITES, 1)}
    rows = []
    for name, (hidden, heads) in layers.items():
        numbers = hidden * (len(SCALARS) + 2 * a["n"] + a["m of a hidden layer"])
        numbers += heads * (len(SCALARS) + 2 * a["n"] + a["m of the unembedding"])
        size = 8 * numbers
        sites = hidden + heads
        collective = 2 * size / (a["GB/s of an all-reduce, each rank"] * 1e9)
        collective += 2 * math.ceil(math.log2(a["ranks"])) * a["microseconds of latency a hop"] * 1e-6
        host = sites * (parts["a monitored forward"] + parts["a reading, its line in the log included"])
        share = (collective + host) / a["seconds a step"]
        every = max(1, math.ceil(share / 1e-3))
        log = parts["bytes a line"] * sites * a["steps"]
        rows.append(
            {
                "watched": name,
                "vector": f"{size / 1e6:.1f} MB",
                "all-reduce": f"{collective * 1e3:.1f} ms",
                "host": f"{host * 1e3:.1f} ms",
                "of a step": f"{share:.3%}",
                "under 0.1 % from": f"every={every}",
                "log at that / at every=100": f"{log / every / 1e9:.1f} GB / {log / 100 / 1e9:.1f} GB",
            }
        )
    return rows


def main() -> None:
    """Measure, work out, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    arguments = parser.parse_args()
    parts = measured()
    bytes_a_line = parts["bytes a line"]
    first = [
        {"part, for one layer": name, "measured": f"{value * 1e6:.0f} µs"}
        for name, value in parts.items()
        if name != "bytes a line"
    ]
    first.append({"part, for one layer": "a line in the log", "measured": f"{bytes_a_line:.0f} bytes"})
    second = worked_out(parts)
    for rows in (first, second):
        show(rows)
    if arguments.write:
        where = measured_here(f"torch {torch.__version__}")
        for name, rows in (("parts", first), ("run", second)):
            put(PAGE, name, f"{where}\n\n{markdown(rows, numbers=True)}")


if __name__ == "__main__":
    main()
