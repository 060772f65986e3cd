"""Where runs are kept: a file each while the benchmark is under way, one Parquet file in the repository."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.generalization import configs

PARQUET = Path(__file__).parent / "runs.parquet"

Column = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Made:
    """A run that was made: its configuration, its readings as columns, and its facts, the truth among them."""

    config: configs.Config
    columns: dict[str, Column]
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.config.name

    @cached_property
    def truth(self) -> dict[str, float]:
        """What the held-out samples showed; for scoring alone."""
        found: dict[str, float] = self.facts["truth"]
        return found


def file_of(config: configs.Config, work: Path) -> Path:
    """Where a run's facts are, once it is whole."""
    return work / "runs" / f"{config.name.replace('/', '--')}.json"


def is_made(config: configs.Config, work: Path) -> bool:
    """Whether a run is there."""
    return file_of(config, work).exists()


def load_work(work: Path) -> list[Made]:
    """The runs of the work folder."""
    from benchmarks.generalization.replay import replayed

    made = []
    for config in configs.all_configs():
        path = file_of(config, work)
        if path.exists():
            with np.load(path.with_suffix(".npz")) as arrays:
                columns = dict(arrays)
            columns |= replayed(columns, path.with_suffix(".visits.npz"))
            made.append(Made(config, columns, json.loads(path.read_text())))
    return made


def collect(work: Path, parquet: Path = PARQUET) -> int:
    """Put the runs of the work folder into the Parquet file, beside those that are there; how many it holds now.

    One row a reading. The columns are float32 (steps and sizes are whole numbers under 2**24), the run's name and its
    facts, as JSON, are text that repeats and so takes next to no room.
    """
    import polars as pl

    runs = {run.name: run for run in (load(parquet) if parquet.exists() else [])}
    runs |= {run.name: run for run in load_work(work)}
    order = [config.name for config in configs.all_configs()]
    frames = []
    for name in order:
        if name in runs:
            run = runs[name]
            columns = {key: pl.Series(value, dtype=pl.Float32) for key, value in run.columns.items()}
            length = len(run.columns["step"])
            texts = {"run": [name] * length, "facts": [json.dumps(run.facts)] * length}
            frames.append(pl.DataFrame({**texts, **columns}))
    table = pl.concat(frames, how="diagonal")
    draft = parquet.with_suffix(".draft")
    table.write_parquet(draft, compression="zstd", compression_level=19, statistics=False)
    draft.replace(parquet)
    print(f"{parquet.name}: {len(frames)} runs, {table.height:,} readings, {parquet.stat().st_size / 1e6:.1f} MB")
    return len(frames)


def load(parquet: Path = PARQUET) -> list[Made]:
    """The runs of the Parquet file, in the order of `configs.all_configs()`."""
    import polars as pl

    known = {config.name: config for config in configs.all_configs()}
    made = []
    for (name,), part in pl.read_parquet(parquet).group_by(["run"], maintain_order=True):
        columns = {
            column: part[column].to_numpy().astype(np.float64)
            for column in part.columns
            if column not in ("run", "facts") and part[column].null_count() < part.height
        }
        made.append(Made(known[str(name)], columns, json.loads(part["facts"][0])))
    return made
