"""Export many runs to one Parquet table, a row per reading, in memory that does not grow with the number of runs.

Method: a Parquet file needs its columns before its first row, but the values passed to `step()` are known only after
the last run is read. So the rows go to Arrow files first, in parts, and then into the table with all columns found.
One alternative, reading every log twice, costs more than copying the parts. Pandas and SQL handle the other badly: one
column that maps names to numbers.
"""

from __future__ import annotations

import glob
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logalign.common.extras import load
from logalign.errors import InputError, LogAlignError, RunError
from logalign.runs.log import META
from logalign.runs.reading import ENERGY_NAMES, FIELDS, FORMS, INTEGER_FIELDS, TEXT_FIELDS, Reading
from logalign.runs.remote import GLOB, find_runs, is_remote
from logalign.runs.run import Run, RunLike, open_run

RUN, SETTINGS = "run", "settings"
PART_ROWS, PART_BYTES = 100_000, 64_000_000
"""A part, and a row group of the table, ends when it has this many rows or bytes."""
EXTRA_PREFIX = "extra_"
"""Prefix of a value passed to `step()` whose name another column already has."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The result of an export.

    Attributes:
        path: The Parquet file.
        runs: The number of runs in it, including runs without a reading yet.
        readings: The number of rows in it.
        skipped: The errors of the runs that could not be read. Each error names its run.
    """

    path: Path
    runs: int
    readings: int
    skipped: tuple[str, ...] = ()


def export(
    runs: Sequence[RunLike],
    out: str | os.PathLike[str],
    *,
    strict: bool = False,
    told: Callable[[str], None] | None = None,
) -> Exported:
    """Write the readings of runs into one Parquet file, which appears when it is complete.

    A row is one reading of one site. It has these columns, where an undefined or missing value is null:

        run       text     the path or URL
        step ...           the fields of docs/run-format.md (whole numbers int64, numbers float64)
        energy_weight, energy_input, energy_output, lar_error, lar_vocab_centered_error, ...
        settings  text     settings of run.json as one JSON object
        any other float64  each value passed to `step()` under its own name (null in runs without that name)

    Args:
        runs: Runs, URLs, folders with runs at any depth, or patterns with `*`, `?` or `[...]`. A run that is given
            twice is written once.
        out: The Parquet file. An existing file is replaced.
        strict: Stop at the first run that cannot be read, and write nothing.
        told: Called with the error of each skipped run as soon as it occurs.

    Raises:
        MissingExtraError: pyarrow is not installed.
        InputError: no run was given, a pattern matches none, or no run could be read.
        RunError: a run cannot be read and `strict` is set, or a file cannot be written.
    """
    arrow = load("pyarrow", extra="export", purpose="logalign export")
    out = Path(out)
    if not out.parent.is_dir() or out.is_dir():
        raise RunError(f"{out}: expected a file to write in a folder that is there, found {_what_is_wrong(out)}")
    count, rows = 0, 0
    skipped: list[str] = []
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
            parts = _Parts(Path(folder), arrow)
            for given in _each(runs):
                try:
                    run = given if isinstance(given, Run) else open_run(given)
                    parts.add(run)
                except LogAlignError as error:
                    if strict:
                        raise
                    skipped.append(str(error))
                    if told is not None:
                        told(str(error))
                    continue
                count, rows = count + 1, rows + len(run.readings)
            if not count:
                first = f", of which the first says: {skipped[0]}" if skipped else ""
                raise InputError(f"expected at least one run that can be read, found {len(skipped)} that cannot{first}")
            draft = Path(folder) / "draft.parquet"
            parts.write(draft)
            draft.replace(out)
    except OSError as error:
        raise RunError(f"{out}: expected a file that can be written, found: {error}") from error
    return Exported(path=out, runs=count, readings=rows, skipped=tuple(skipped))


def found_runs(given: str | os.PathLike[str]) -> list[str]:
    """Return the runs of a path: itself, the run folders below it, or the matches of a pattern.

    Raises:
        InputError: a pattern matches nothing.
        MissingExtraError, RunError: for a URL, as in `open_run`.
    """
    text = os.fspath(given) if isinstance(given, os.PathLike) else str(given)
    is_pattern = GLOB.search(text) is not None
    if is_remote(text):
        found = find_runs(text, META)
    elif is_pattern and not os.path.exists(text):
        found = [run for path in sorted(glob.glob(text, recursive=True)) for run in _run_folders(path) or [path]]
    else:
        found = _run_folders(text)
    if is_pattern and not found:
        raise InputError(f"{text}: expected a pattern that matches runs, found nothing that it matches")
    return found or [text]


class _Parts:
    """Rows that wait for the table, in Arrow files that each hold the columns of their own runs."""

    def __init__(self, folder: Path, arrow: Any) -> None:
        self._folder = folder
        self._arrow = arrow
        self._files: list[Path] = []
        self._tables: list[Any] = []
        self._rows = self._bytes = 0
        self._names: set[str] = set()

    def add(self, run: Run) -> None:
        """Add all readings of a run, or none if it cannot be read.

        Raises:
            RunError: the run cannot be read, or holds whole numbers that need more than 64 bits.
        """
        settings = run.meta.get(SETTINGS)
        text = None if settings is None else json.dumps(settings, sort_keys=True)
        readings = run.readings
        try:
            tables = [
                self._arrow.table(_columns(self._arrow, run.name, readings[start : start + PART_ROWS], text))
                for start in range(0, len(readings), PART_ROWS)
            ]
        except (OverflowError, ValueError) as error:
            raise RunError(f"{run.name}: expected whole numbers of at most 64 bits, found: {error}") from error
        for table in tables:
            self._tables.append(table)
            self._names |= set(table.column_names)
            self._rows += table.num_rows
            self._bytes += table.nbytes
            if self._rows >= PART_ROWS or self._bytes >= PART_BYTES:
                self._end_part()

    def write(self, path: Path) -> None:
        """Write the table, and delete each part once the table holds it."""
        arrow = self._arrow
        parquet = load("pyarrow.parquet", extra="export", purpose="logalign export")
        if self._tables:
            self._end_part()
        own = _columns(arrow, "", [], None)
        others = sorted(self._names - set(own))
        schema = arrow.schema(
            [
                *(arrow.field(name, array.type) for name, array in own.items()),
                *(arrow.field(name, arrow.float64()) for name in others),
            ]
        )
        with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
            for file in self._files:
                with arrow.memory_map(str(file)) as mapped:
                    table = arrow.ipc.open_file(mapped).read_all()
                    found = set(table.column_names)
                    columns = [
                        table[field.name] if field.name in found else arrow.nulls(table.num_rows, field.type)
                        for field in schema
                    ]
                    writer.write_table(arrow.table(columns, schema=schema), row_group_size=PART_ROWS)
                file.unlink()

    def _end_part(self) -> None:
        table = self._arrow.concat_tables(self._tables, promote_options="default")
        file = self._folder / f"part-{len(self._files)}.arrow"
        with self._arrow.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table)
        self._files.append(file)
        self._tables, self._rows, self._bytes = [], 0, 0


def _columns(arrow: Any, name: str, readings: Sequence[Reading], settings: str | None) -> dict[str, Any]:
    """Return the columns of one run's readings as Arrow arrays."""
    text, whole, number = arrow.string(), arrow.int64(), arrow.float64()
    columns: dict[str, Any] = {RUN: arrow.array([_encodable(name)] * len(readings), text)}
    for field in FIELDS:
        values = [getattr(reading, field) for reading in readings]
        if field == "energies":
            for energy in ENERGY_NAMES:
                columns[f"energy_{energy}"] = arrow.array([each[energy] if each else None for each in values], number)
        elif field == "standard_errors":
            for form in FORMS:
                columns[f"{form}_error"] = arrow.array([each[form] if each else None for each in values], number)
        elif field in TEXT_FIELDS:
            columns[field] = arrow.array([value and _encodable(value) for value in values], text)
        else:
            columns[field] = arrow.array(values, whole if field in (*INTEGER_FIELDS, "step") else number)
    columns[SETTINGS] = arrow.array([settings] * len(readings), text)
    for extra in sorted({extra for reading in readings for extra in reading.extra}):
        column = _encodable(extra)
        while column in columns:
            column = EXTRA_PREFIX + column
        columns[column] = arrow.array([reading.extra.get(extra) for reading in readings], number)
    return columns


def _encodable(text: str) -> str:
    """Replace lone surrogates, which JSON and file names may hold and Parquet may not."""
    return text.encode(errors="replace").decode()


def _each(runs: Sequence[RunLike]) -> Iterator[RunLike]:
    """Yield every run once, in the order given."""
    seen: set[str] = set()
    for given in runs:
        for run in [given] if isinstance(given, Run) else found_runs(given):
            name = run.name if isinstance(run, Run) else str(run)
            key = name if is_remote(name) else os.path.realpath(name)
            if key not in seen:
                seen.add(key)
                yield run


def _run_folders(path: str) -> list[str]:
    """Return the run folders at or below a local path, without a search inside run folders."""
    found = []
    for folder, below, files in os.walk(path):
        if META in files:
            found.append(folder)
            below.clear()
        below.sort()
    return found


def _what_is_wrong(out: Path) -> str:
    return "a folder of that name" if out.is_dir() else f"no folder {out.parent}"
