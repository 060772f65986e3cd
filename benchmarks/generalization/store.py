"""Where runs are kept: a file each while the benchmark is under way, one Parquet file in the repository."""

from __future__ import annotations

from pathlib import Path

from benchmarks.generalization import configs

PARQUET = Path(__file__).parent / "runs.parquet"


def file_of(config: configs.Config, work: Path) -> Path:
    """Where a run's facts are, once it is whole."""
    return work / "runs" / f"{config.name.replace('/', '--')}.json"


def is_made(config: configs.Config, work: Path) -> bool:
    """Whether a run is there."""
    return file_of(config, work).exists()
