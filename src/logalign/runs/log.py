"""Read the files of a run line by line, even if a killed process or a full disk cut them short.

Method: every reading is one line, appended with one write. A database checks more, but does not work on the shared
file systems of clusters. docs/run-format.md specifies the files.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from logalign.errors import InputError, RunError
from logalign.runs.reading import TEXT_FIELDS, Reading, reading_of_record

SCHEMA_VERSION = 1
AFTER_TORN_LINE = "after_torn_line"
META, READINGS, EVENTS, SPECTRA = "run.json", "readings.jsonl", "events.jsonl", "spectra"
RUN_FILES = (META, EVENTS, READINGS)
"""Events come before readings, because a resume says how many readings precede it."""


def read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META
    try:
        meta = json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{folder}: expected a run folder, found no {META} in it") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: expected a JSON object, found damage: {error}") from error
    version = meta.get("schema_version") if isinstance(meta, dict) else None
    if not isinstance(version, int):
        raise RunError(f"{path}: expected an object with a whole number schema_version, found {version!r}")
    if version > SCHEMA_VERSION:
        raise RunError(
            f"{path}: expected schema version {SCHEMA_VERSION} or earlier, found {version}; upgrade logalign"
        )
    return dict(meta)


def ends_in_torn_line(file: int) -> bool:
    """Return whether a killed process or a full disk left half a line at the end."""
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"


def objects_of(path: Path, start: int = 0, end: int | None = None) -> list[tuple[int, dict[str, Any]]]:
    """Return (line number, object) pairs of part of a JSONL file, whose last and marked lines may be torn."""
    data = path.read_bytes()
    first_line = data.count(b"\n", 0, start) + 1
    found = []
    damage: RunError | None = None
    damaged_lines = 0
    for number, line in enumerate(data[start:end].splitlines(), first_line):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(f"not an object but {type(value).__name__}")
        except ValueError as error:
            damaged_lines += 1
            damage = damage or RunError(
                f"{path}, line {number}: expected a JSON object, found damage ({error}); repair or remove that line"
            )
            continue
        if damage is not None and not value.get(AFTER_TORN_LINE):
            raise damage
        damage, damaged_lines = None, 0
        found.append((number, value))
    if damage is not None and damaged_lines > 1:
        raise damage
    return found


def parts_of(path: Path, resumes: Iterable[tuple[int, int]]) -> list[list[tuple[int, dict[str, Any]]]]:
    """Return the lines of the log between resumes, given by step and offset."""
    offsets = [offset for _, offset in resumes]
    return [objects_of(path, start, end) for start, end in zip([0, *offsets], [*offsets, None], strict=True)]


def reading_at(path: Path, number: int, record: Mapping[str, Any]) -> Reading:
    try:
        return reading_of_record(record)
    except InputError as error:
        raise RunError(f"{path}, line {number}: {error}") from error


def file_readings(path: Path) -> list[Reading]:
    read: Callable[[Path], Iterable[tuple[int, Mapping[str, Any]]]]
    read = _csv_records if path.suffix.lower() in (".csv", ".tsv") else objects_of
    try:
        return [reading_at(path, number, record) for number, record in read(path)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path}: expected text in JSONL or CSV form, found: {error}") from error


def _csv_records(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        for row in rows:
            yield rows.line_num, {name.strip(): _cell(name.strip(), text) for name, text in row.items() if name}


def _cell(name: str, text: str | None) -> Any:
    text = "" if text is None else text.strip()
    if not text:
        return None
    if name in TEXT_FIELDS:
        return text
    try:
        return float(text)
    except ValueError:
        return text
