"""Time, memory and error of `logalign spectra` on the head of a large model.

    python -m benchmarks.checkpoints            measure and print
    python -m benchmarks.checkpoints --write    and put the tables into docs/checkpoints.md

The head is 128,256 x 4,096 in bfloat16 (1.05 GB), random with a decaying spectrum and a direction that all rows share,
in a temporary folder; every row of the table is a process of its own. The second table compares what is summed in
float32 with the same in float64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.pages import markdown, measured_here, put, show

PAGE = Path(__file__).parent.parent / "docs" / "checkpoints.md"
M, N = 128_256, 4_096
BLOCK = 8_192
WORKER = """
import json, pathlib, re, sys, numpy as np
from logalign.checkpoints import spectra_of, spectrum
if sys.argv[2] == "float64":
    spectrum.SMALL = 1 << 62
head = spectra_of(sys.argv[1]).weights[0]
np.save(sys.argv[3], head.p)
# Not ru_maxrss, which begins with that of the process that started this one.
peak = re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())
print(json.dumps({**head.record(), "peak": 1024 * int(peak[1])}))
"""
Rows = list[dict[str, str]]


def write_head(path: Path) -> None:
    """A safetensors file, written block by block, with one tensor."""
    header = json.dumps({"lm_head.weight": {"dtype": "BF16", "shape": [M, N], "data_offsets": [0, 2 * M * N]}}).encode()
    generator = np.random.default_rng(0)
    scales = (1 + np.arange(N, dtype=np.float32)) ** -0.25
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, M, BLOCK):
            rows = min(BLOCK, M - start)
            block = generator.standard_normal((rows, N), dtype=np.float32) * scales + 0.02
            file.write((block.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def measured(head: Path, products: str, spectrum: Path) -> dict[str, float]:
    """Seconds, the largest resident memory in GB, and what was found."""
    begun = time.perf_counter()
    command = [sys.executable, "-c", WORKER, str(head), products, str(spectrum)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return {
        "seconds": time.perf_counter() - begun,
        "memory": found["peak"] / 1e9,
        "d_p": found["participation"],
        "stable rank": found["stable_rank"],
        "bound": found["lar_bound"],
    }


def tables() -> tuple[Rows, Rows]:
    """The cost of both ways, and how far one is from the other."""
    with tempfile.TemporaryDirectory() as folder:
        head = Path(folder) / "head.safetensors"
        write_head(head)
        found = {way: measured(head, way, Path(folder) / f"{way}.npy") for way in ("float32", "float64")}
        fast, exact = (np.load(Path(folder) / f"{way}.npy") for way in ("float32", "float64"))
    names = {"float32": "float32 within a block, float64 over blocks (what it does)", "float64": "float64 throughout"}
    cost = [
        {"products": names[way], "time": f"{each['seconds']:.0f} s", "peak memory": f"{each['memory']:.2f} GB"}
        for way, each in found.items()
    ]
    error = [
        {
            "quantity": name,
            "float64": f"{found['float64'][name]:.6f}",
            "relative error": f"{abs(found['float32'][name] / found['float64'][name] - 1):.0e}",
        }
        for name in ("d_p", "stable rank", "bound")
    ]
    largest = float(np.abs(fast - exact).max())
    error.append(
        {"quantity": "p, largest error of one", "float64": "", "relative error": f"{largest / exact[0]:.0e} p_1"}
    )
    return cost, error


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/checkpoints.md")
    arguments = parser.parse_args()
    cost, error = tables()
    for rows in (cost, error):
        show(rows)
    if arguments.write:
        where = measured_here(f"numpy {np.__version__}")
        for name, rows in (("cost", cost), ("error", error)):
            put(PAGE, name, f"{where}\n\n{markdown(rows, numbers=True)}")


if __name__ == "__main__":
    main()
