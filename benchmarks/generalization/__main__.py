"""The benchmark's command, from the root of the repository.

    python -m benchmarks.generalization train --pilot          thirty runs, on which the detectors were designed
    python -m benchmarks.generalization train [--only TEXT]    all runs that are not there yet
    python -m benchmarks.generalization collect                put them into one Parquet file
    python -m benchmarks.generalization status                 how many runs there are
    python -m benchmarks.generalization fit                    fit the thresholds of the rule on the fitting half
    python -m benchmarks.generalization compare                fit the constants of `logalign compare`, and score them
    python -m benchmarks.generalization tables                 rebuild docs/benchmark.md and its figures, no training
    python -m benchmarks.generalization subset                 make three runs anew, compare them with the stored ones

Each run is a process of one thread; several run side by side (--jobs). A run that is there is not made again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.generalization import configs
from benchmarks.generalization.store import PARQUET, Made, is_made
from benchmarks.pages import markdown

ROOT = Path(__file__).parents[2]
WORK = Path(__file__).parent / "work"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="make runs")
    train.add_argument("--pilot", action="store_true", help="the pilot's runs only")
    train.add_argument("--only", default="", help="runs whose name holds this text")
    one = commands.add_parser("one", help="make one run, in this process")
    one.add_argument("name")
    commands.add_parser("collect", help="put all runs into the Parquet file")
    commands.add_parser("status", help="count the runs")
    tables = commands.add_parser("tables", help="rebuild every table and figure from the Parquet file")
    tables.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of benchmark.md and images/")
    commands.add_parser("fit", help="fit the thresholds of the rule on the fitting half, and print them")
    subset = commands.add_parser("subset", help="make three runs anew and compare them with those of the Parquet file")
    compare = commands.add_parser("compare", help="fit the constants of `logalign compare`, and rebuild its table")
    compare.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of benchmark.md")
    for each in (train, tables, subset):
        each.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes side by side")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of runs under way")
    parser.add_argument("--stored", type=Path, default=PARQUET, help="the Parquet file")
    options = parser.parse_args(arguments)
    if options.command == "train":
        chosen = configs.pilot() if options.pilot else configs.all_configs()
        train_all([config for config in chosen if options.only in config.name], options.work, options.jobs)
    elif options.command == "one":
        from benchmarks.generalization.train import train_one

        train_one(next(config for config in configs.all_configs() if config.name == options.name), options.work)
    elif options.command == "collect":
        from benchmarks.generalization.store import collect

        collect(options.work, options.stored)
    elif options.command == "tables":
        rebuild(options.stored, options.docs, options.jobs)
    elif options.command == "compare":
        fit_compare(options.stored, options.docs)
    elif options.command == "fit":
        fit_thresholds(options.stored)
    elif options.command == "subset":
        compare_subset(options.stored, options.jobs)
    else:
        every = configs.all_configs()
        made = [config for config in every if is_made(config, options.work)]
        for family in configs.FAMILIES:
            print(f"{family}: {sum(c.family == family for c in made)} of {sum(c.family == family for c in every)} runs")


def train_all(chosen: Sequence[configs.Config], work: Path, jobs: int) -> None:
    """Make those runs that are not there, each in a process of its own."""
    missing = [config for config in chosen if not is_made(config, work)]
    print(f"{len(chosen) - len(missing)} of {len(chosen)} runs are there; making {len(missing)}", flush=True)
    started = time.monotonic()

    def make(numbered: tuple[int, configs.Config]) -> bool:
        number, config = numbered
        begun = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.generalization", "--work", str(work.resolve()), "one", config.name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        took = time.monotonic() - begun
        print(
            f"{number}/{len(missing)} {took:.0f} s {'' if done.returncode == 0 else 'FAILED '}{config.name}", flush=True
        )
        if done.returncode != 0:
            print(done.stderr[-3000:], file=sys.stderr, flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(jobs) as pool:
        succeeded = list(pool.map(make, enumerate(missing, 1)))
    print(f"{sum(succeeded)} made in {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
    if not all(succeeded):
        raise SystemExit(f"{len(succeeded) - sum(succeeded)} runs failed: see above")


def rebuild(stored: Path, docs: Path, jobs: int) -> None:
    """Write every table of the page, and every figure, from the stored runs."""
    from benchmarks.generalization import figures, score, tables, verdicts

    started = time.monotonic()
    runs = _stored_runs(stored)
    print(f"judging {len(runs)} runs with and without their baselines ...", flush=True)
    verdicts.prepare(score.contexts(runs), jobs=jobs)
    for name, built in tables.build(runs).items():
        tables.write(built, docs / name)
        print(f"{docs / name}: {', '.join(built)}")
    for path in figures.draw(runs, docs / "images"):
        print(path)
    print(f"rebuilt in {time.monotonic() - started:.0f} s")


def fit_thresholds(stored: Path) -> None:
    """Print the thresholds that the fitting half of the stored runs gives, beside those of the rule."""
    from benchmarks.generalization import fit

    runs = [run for run in _stored_runs(stored) if configs.is_for_fitting(run.config)]
    print(markdown(fit.summary(fit.cases(runs)), numbers=True))


def fit_compare(stored: Path, docs: Path) -> None:
    """Print the constants that the fitting half gives for `logalign compare`, and write the table of the other half."""
    from benchmarks.generalization import comparing, tables

    runs = [run for run in _stored_runs(stored) if run.config.family in tables.SCORED]
    fitting = [run for run in runs if configs.is_for_fitting(run.config)]
    print(markdown(comparing.fit(fitting, tables.group_of), numbers=True))
    scored = [run for run in runs if not configs.is_for_fitting(run.config)]
    tables.write({"compare": comparing.table(scored, tables.group_of)}, docs / "benchmark.md")


def compare_subset(stored: Path, jobs: int) -> None:
    """Make the runs of the subset in a temporary folder and compare them with the stored ones.

    Raises:
        SystemExit: the truth about a run is another one here.
    """
    from benchmarks.generalization import subset
    from benchmarks.generalization.store import load_work

    runs = _stored_runs(stored)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        train_all(subset.chosen(), work, jobs)
        compared = subset.compare(load_work(work), runs)
    print(markdown(subset.rows(compared), numbers=True))
    differing = [each.run for each in compared if each.here != each.stored]
    if differing:
        raise SystemExit(f"another truth here than in {stored.name}: {'; '.join(differing)}")


def _stored_runs(stored: Path) -> list[Made]:
    from benchmarks.generalization.store import load

    if not stored.exists():
        raise SystemExit(f"{stored}: no such file; `train` makes the runs and `collect` puts them there")
    return load(stored)


if __name__ == "__main__":
    main()
