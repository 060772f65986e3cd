"""Read MLflow runs from the store's own files, so that MLflow need not be installed.

A store has one of two kinds: files (`mlruns/EXPERIMENT/RUN_ID`, where every metric is a file of lines "milliseconds
value step") or SQLite (`mlflow.db`, where `mlflow.db#RUN_ID` names a run).
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from logalign.errors import RunError
from logalign.runs.foreign.losses import has_losses
from logalign.runs.foreign.rows import LARS, PREFIX, Point, listed, printable, readings_of, rows_by_step
from logalign.runs.reading import Reading

SQLITE_MAGIC = b"SQLite format 3\0"
KIND = "MLflow run"
META, METRICS = "meta.yaml", "metrics"


def run_folders(path: Path) -> list[Path]:
    """Return the runs with metrics in a run folder, an experiment's folder or a file store."""
    return sorted(
        folder.parent
        for pattern in ("metrics", "*/metrics", "*/*/metrics", "mlruns/*/*/metrics")
        for folder in path.glob(pattern)
        if (folder.parent / META).is_file()
    )


def folder_readings(path: Path) -> list[Reading]:
    """Return the readings of a run in a file store.

    Raises:
        RunError: several runs have LAR, several runs exist and none has LAR, or a file is damaged.
    """
    metrics = {str(folder.relative_to(path)): _metrics(folder) for folder in run_folders(path)}
    run = metrics[_only_of({name: list(files) for name, files in metrics.items()}, path)]
    curves = {name: _points(file) for name, file in run.items()}
    return readings_of(rows_by_step(curves), path=path, kind=KIND)


def _metrics(folder: Path) -> dict[str, Path]:
    metrics = folder / METRICS
    return {file.relative_to(metrics).as_posix(): file for file in sorted(metrics.rglob("*")) if file.is_file()}


def _only_of(metrics: Mapping[str, Sequence[str]], path: Path, give: str = "give one of them") -> str:
    """Return the run to read, by its metrics' names: the only one with LAR, else the only one with a loss.

    Raises:
        RunError: several runs match, or none.
    """
    if len(metrics) == 1:
        return next(iter(metrics))
    with_lar = [run for run, names in metrics.items() if not set(names).isdisjoint(LARS)]
    with_loss = [run for run, names in metrics.items() if has_losses(names)]
    best = with_lar or with_loss
    if len(best) == 1:
        return best[0]
    without = "" if with_lar or not metrics else ", none of which has LAR"
    raise RunError(f"{path}: expected one {KIND} with '{PREFIX}lar', found {listed(best or metrics)}{without}; {give}")


def is_database(path: Path) -> bool:
    """Return whether a path, with or without `#RUN_ID`, is a SQLite file."""
    file, _ = _split(path)
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC


def database_readings(path: Path) -> list[Reading]:
    """Return the readings of a run in a SQLite store: the run after `#`, else the only one with LAR or a loss.

    Raises:
        RunError: the run is missing, several match, or the database is not MLflow's.
    """
    file, run_id = _split(path)
    try:
        database = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)
        try:
            run_id = run_id or _only_run(database, path)
            found = database.execute(
                "SELECT key, step, value, is_nan, timestamp FROM metrics WHERE run_uuid = ? ORDER BY rowid", (run_id,)
            ).fetchall()
        finally:
            database.close()
    except sqlite3.Error as error:
        raise RunError(f"{file}: expected a database of MLflow with a table of metrics, found: {error}") from error
    if not found:
        raise RunError(f"{path}: expected a run with metrics, found none of the id {printable(run_id)!r}")
    curves: dict[str, list[Point]] = {}
    for key, step, value, is_nan, milliseconds in found:
        # MLflow stores infinities as the largest numbers.
        number = float("nan") if is_nan or abs(value) >= sys.float_info.max else float(value)
        curves.setdefault(str(key), []).append(Point(int(step), number, milliseconds / 1000))
    return readings_of(rows_by_step(curves), path=path, kind=KIND)


def _split(path: Path) -> tuple[Path, str]:
    file, _, run_id = path.name.rpartition("#")
    return (path.with_name(file), run_id) if file and not path.exists() else (path, "")


def _only_run(database: sqlite3.Connection, path: Path) -> str:
    rows: Iterable[tuple[str, str]] = database.execute("SELECT DISTINCT run_uuid, key FROM metrics ORDER BY run_uuid")
    metrics: dict[str, list[str]] = {}
    for run, key in rows:
        metrics.setdefault(str(run), []).append(str(key))
    return _only_of(metrics, path, f"give one of them as {path.name}#RUN_ID")


def _points(file: Path) -> list[Point]:
    points = []
    *lines, _ = file.read_bytes().decode(errors="replace").split("\n")  # the last is empty, or torn by a kill
    for number, line in enumerate(lines, 1):
        try:
            milliseconds, value, *step = line.split()
            points.append(Point(int(step[0]) if step else 0, float(value), int(milliseconds) / 1000))
        except ValueError:
            raise RunError(
                f"{file}, line {number}: expected 'milliseconds value step', found {printable(line)!r}; "
                "repair or remove that line"
            ) from None
    return points
