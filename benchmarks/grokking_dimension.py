"""Does k count the directions of the learned function? Thirty grokking runs, k beside the independent dimension.

    python -m benchmarks.grokking_dimension            train what is not in the results yet, then write the tables
    python -m benchmarks.grokking_dimension --table    write the tables into docs/grokking-dimension.md only
    python -m benchmarks.grokking_dimension --explain P WIDTH SEED
                                                       train one run again and print what each frequency does in it

Seeds 0 to 4, p in {53, 59, 67}, widths 64 and 96; every run is that of `logalign demo grokking` with its defaults, on
one thread. Two run at a time. A finished run adds one line to benchmarks/results/grokking_dimension.jsonl, from the
last reading of its log, so an interrupted benchmark goes on with the runs that are missing.

What is scored: |k / dimension - 1|, the relative error of k, taken as it is. The trivial predictors may fit a constant
to the other 29 runs: a multiple of p, a multiple of the width, and one number for all.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.pages import markdown, put

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "grokking_dimension.jsonl"
PAGE = ROOT.parent / "docs" / "grokking-dimension.md"
SEEDS, MODULI, WIDTHS = range(5), (53, 59, 67), (64, 96)
COUNTS = {"dimension": "removal", "dimension_additive": "additive", "dimension_energy": "energy"}

Row = dict[str, float | int | None]


def measure(p: int, width: int, seed: int) -> Row:
    """Train one network and return what its last reading says; run in a process of its own."""
    import torch
    from rich.console import Console

    from logalign import open_run
    from logalign.demos import grokking

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        grokking.run(out=out, p=p, width=width, seed=seed, console=Console(file=io.StringIO()))
        columns = grokking.with_effective_dims(open_run(out / grokking.RUN).columns())
    solved = np.flatnonzero(columns["test_acc"] >= grokking.SOLVED)
    names = ["effective_dim", "effective_dim_centered", *COUNTS, "test_acc", "train_acc", "margin", "train_loss"]
    last = {name: float(columns[name][-1]) for name in names}
    return {
        "p": p,
        "width": width,
        "seed": seed,
        "step": int(columns["step"][-1]),
        "solved_at": int(columns["step"][solved[0]]) if len(solved) else None,
        **{name: value if np.isfinite(value) else None for name, value in last.items()},
    }


def explain(p: int, width: int, seed: int) -> None:
    """Train one network again and print its frequencies, the strongest first."""
    import torch
    from rich.console import Console

    from logalign.demos import grokking
    from logalign.demos.dimension import function_dimension
    from logalign.demos.training import CHECKPOINT

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        grokking.run(out=out, p=p, width=width, seed=seed, console=Console(file=io.StringIO()))
        state = torch.load(out / grokking.RUN / CHECKPOINT, weights_only=True)
    model = grokking.Adder(p, width)
    model.load_state_dict(state["model"])
    pairs = grokking.all_pairs(p, seed=seed, device=torch.device("cpu"))
    with torch.no_grad():
        features = model.body(model.embedding(pairs.train).flatten(1)).double()
        logits = model(pairs.held_out).double().numpy()
    found = function_dimension(logits, pairs.held_out_labels.numpy())
    common = float(features.mean(dim=0).square().sum() / features.square().sum(dim=1).mean())
    print(f"p = {p}, width {width}, seed {seed}: removal {found.dimension}, additive {found.additive_dimension}, ")
    print(f"energy {found.energy_dimension}; common direction holds {common:.1%} of the energy of the training inputs")
    print(f"directions at the evenness of the logits' energy: {2 / np.square(found.energy_share).sum():.1f}")
    print("frequency  margin lost  share of lead  share of energy")
    for f in np.argsort(-found.energy_share)[:14]:
        shares = f"{found.margin_drop[f]:11.1%}  {found.additive_share[f]:13.1%}  {found.energy_share[f]:15.1%}"
        print(f"{f + 1:9}  {shares}")


def collect(processes: int) -> None:
    """Train the runs that are not in the results yet."""
    done = {(row["p"], row["width"], row["seed"]) for row in read()}
    missing = [key for key in itertools.product(MODULI, WIDTHS, SEEDS) if key not in done]
    RESULTS.parent.mkdir(exist_ok=True)

    def one(key: tuple[int, int, int]) -> Row:
        command = [sys.executable, __file__, "--one", *map(str, key)]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        return dict(json.loads(found.stdout.splitlines()[-1]))

    with ThreadPoolExecutor(processes) as pool:
        for row in pool.map(one, missing):
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def read() -> list[Row]:
    """Read the results, in the order of p, width and seed."""
    if not RESULTS.exists():
        return []
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return sorted(rows, key=lambda row: (row["p"], row["width"], row["seed"]))


def left_out(values: np.ndarray, fit: Callable[[np.ndarray], float]) -> np.ndarray:
    """For each run, the constant that `fit` finds on all others."""
    return np.array([fit(np.delete(values, i)) for i in range(len(values))])


def constant(ratios: np.ndarray) -> float:
    """Return the c with the least median of |c / r - 1|, among the r themselves."""
    errors = np.median(np.abs(ratios[:, None] / ratios[None, :] - 1), axis=1)
    return float(ratios[np.argmin(errors)])


def scores(rows: Sequence[Row], count: str) -> list[dict[str, str]]:
    """Score k and the trivial predictors against one count, over the runs where it is defined."""
    from scipy.stats import spearmanr

    kept = [row for row in rows if row[count] is not None]
    column = {name: np.array([row[name] for row in kept], dtype=float) for name in kept[0]}
    truth = column[count]
    predictions = {
        "k, centered": column["effective_dim_centered"],
        "k, plain": column["effective_dim"],
        "c x p, c fitted": column["p"] * left_out(truth / column["p"], constant),
        "c x width, c fitted": column["width"] * left_out(truth / column["width"], constant),
        "c, fitted": left_out(truth, constant),
    }
    base = {"c x p, c fitted": column["p"], "c x width, c fitted": column["width"], "c, fitted": None}
    found = []
    for name, predicted in predictions.items():
        error = np.abs(predicted / truth - 1)
        # A constant fitted to the others ranks against the truth by construction: rank by p and width themselves.
        ranked = base.get(name, predicted)
        rank = None if ranked is None else float(spearmanr(ranked, truth).statistic)
        found.append(
            {
                "predictor": name,
                "median relative error": f"{np.median(error):.1%}",
                "mean": f"{error.mean():.1%}",
                "largest": f"{error.max():.1%}",
                "within 25 %": f"{int((error <= 0.25).sum())} of {len(error)}",
                "median signed": f"{np.median(predicted / truth - 1):+.1%}",
                "Spearman": "" if rank is None else f"{rank:.2f}",
            }
        )
    return found


def tables() -> str:
    """Write all tables of the page."""
    rows = read()

    def number(value: float | int | None, digits: int) -> str:
        return "undefined" if value is None else f"{value:.{digits}f}"

    def error(row: Row) -> str:
        k, count = row["effective_dim_centered"], row["dimension"]
        return "" if k is None or count is None else f"{k / count - 1:+.0%}"

    runs = [
        {
            "p": str(row["p"]),
            "width": str(row["width"]),
            "seed": str(row["seed"]),
            "k, plain": number(row["effective_dim"], 1),
            "k, centered": number(row["effective_dim_centered"], 1),
            **{words: number(row[count], 0) for count, words in COUNTS.items()},
            "k centered / removal": error(row),
            "test accuracy": number(row["test_acc"], 3),
            "0.9 at step": number(row["solved_at"], 0),
        }
        for row in rows
    ]
    parts = [
        f"**Against the independent dimension (removal)**, {len(rows)} runs:",
        markdown(scores(rows, "dimension"), numbers=True),
        "**Against the additive count:**",
        markdown(scores(rows, "dimension_additive"), numbers=True),
        "**Against the energy-based count:**",
        markdown(scores(rows, "dimension_energy"), numbers=True),
        f"**Every run**, at its last reading (step {rows[0]['step']}):",
        markdown(runs, numbers=True),
    ]
    return "\n\n".join(parts)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the tables from the results there are")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time [2]")
    parser.add_argument("--one", type=int, nargs=3, metavar=("P", "WIDTH", "SEED"), help="train one run, print it")
    parser.add_argument("--explain", type=int, nargs=3, metavar=("P", "WIDTH", "SEED"), help="look into one run")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    if arguments.explain:
        explain(*arguments.explain)
        return
    if not arguments.table:
        collect(arguments.processes)
    put(PAGE, "benchmarks/grokking_dimension.py", tables())


if __name__ == "__main__":
    main()
