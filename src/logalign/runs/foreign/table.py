"""Read other tools' tables: CSV and TSV files with `logalign/lar` or a loss, W&B's exports among them.

W&B's page names columns "RUN - METRIC" and adds "RUN - METRIC__MIN" and "__MAX". `run.history().to_csv()` uses the
metric's name, and adds `_step` and `_timestamp`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from logalign.errors import RunError
from logalign.runs.foreign.names import meaning_of
from logalign.runs.foreign.records import STEPS, TIMES
from logalign.runs.foreign.row import Row
from logalign.runs.foreign.rows import PREFIX, STEP, TRAINER_PREFIX, listed, readings_of
from logalign.runs.reading import Reading

SUFFIXES = (".csv", ".tsv")
OF_RUN = " - "
BOUNDS = ("__MIN", "__MAX")
OWN = (STEP, "time")
"""First columns of `trackers="csv"` tables."""


def is_table(path: Path) -> bool:
    """Return whether a CSV or TSV file has a header that lacks `step` or `lar`."""
    if path.suffix.lower() not in SUFFIXES:
        return False
    header = _header(path)
    return bool(header) and not {STEP, "lar"} <= set(header)


def table_readings(path: Path) -> list[Reading]:
    """Return the readings of a table.

    Raises:
        RunError: LAR and loss, or step and epoch, are missing, or the table has several runs or damage.
    """
    names = _names(path, _header(path))
    metrics = set(names.values())
    own_steps = {PREFIX + STEP, TRAINER_PREFIX + PREFIX + STEP}
    step = next((name for name in STEPS if name in metrics), None)
    counts = own_steps | {name for name in metrics if meaning_of(name) in ("step", "epoch")}
    if step is None and not counts & metrics:
        raise RunError(
            f"{path}: expected a column '{PREFIX}{STEP}', 'step', '_step', 'Step' or 'epoch', found {listed(metrics)}"
        )
    time = next((name for name in TIMES if name in metrics), None)
    rows = []
    for number, cells in _rows(path):
        values = {
            names[column]: value
            for column, text in cells.items()
            if column in names and (value := _value(text)) is not None
        }
        at, when = values.get(step or ""), values.get(time or "")
        ours = {name: value for name, value in values.items() if name not in (*STEPS, *TIMES)}
        rows.append(Row(at, when if isinstance(when, float) else None, ours, f"line {number}"))
    return readings_of(rows, path=path, kind="table")


def _names(path: Path, header: list[str]) -> dict[str, str]:
    """Return the metric of each column that is read."""
    runs = {name.rpartition(OF_RUN)[0] for name in header if OF_RUN in name}
    if len(runs) > 1:
        raise RunError(f"{path}: expected the columns of one run, found {listed(runs)}; export one of them")
    metrics = {name: name.rpartition(OF_RUN)[2] for name in header if name and not name.endswith(BOUNDS)}
    plain = {name for name in metrics if OF_RUN not in name}
    return {name: metric for name, metric in metrics.items() if name == metric or metric not in plain}


def _value(text: str | None) -> float | str | None:
    """Return a number, text for an error message, or None for an empty cell."""
    text = "" if text is None else text.strip()
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _header(path: Path) -> list[str]:
    return [name.strip() for name in next(_lines(path), (1, []))[1]]


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    lines = _lines(path)
    header = [name.strip() for name in next(lines)[1]]
    own = tuple(header[: len(OWN)]) == OWN
    torn = own and not path.read_bytes().endswith(b"\n")
    last: tuple[int, list[str]] | None = None
    for line in lines:
        if last is not None:
            yield last[0], dict(zip(header, last[1], strict=False))
        last = line
    if last is not None and not torn:  # a full disk leaves the last line unfinished
        yield last[0], dict(zip(header, last[1], strict=False))


def _lines(path: Path) -> Iterator[tuple[int, list[Any]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, delimiter=delimiter)
            for row in rows:
                if row:
                    yield rows.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path}: expected text in JSONL or CSV form, found: {error}") from error
