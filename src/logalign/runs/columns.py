"""Read the columns of a long run's log without an object per reading.

Method: polars parses only the fields of a reading from readings.jsonl, in one pass, at a few microseconds a line.
The alternative, `Run.columns`, checks every line and returns every field, but costs ten times as much. It replaces
polars where polars is missing, a line is damaged, or the log is short.
"""

from __future__ import annotations

import io
import json
import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np

from logalign.runs.log import META, READINGS
from logalign.runs.reading import ENERGY_NAMES, FIELDS, FORMS, INTEGER_FIELDS, TEXT_FIELDS, UNEMBEDDING
from logalign.runs.run import Run

Columns = Mapping[str, np.ndarray[Any, Any]]

LONG = 16_000_000
"""A log of at least this many bytes is long."""
CHUNK = 1 << 24
OTHERS = ("val_loss",)
"""Values that consumers use in addition to the fields of a reading."""


def site_columns(run: Run, *, long: int = LONG) -> dict[str, Columns]:
    """Return `run.columns(site)` for every site, in the order of their first readings.

    Args:
        run: The run.
        long: From this many bytes on, the log is read in one pass. That pass omits all other values passed to `step()`
            except `val_loss`.

    Raises:
        RunError: a line other than the last before a kill is damaged.
    """
    columns = _long_columns(run, long)
    if columns is not None:
        return columns
    sites = list(dict.fromkeys(reading.site for reading in run.readings))
    return {site: run.columns(site) for site in sites}


def _long_columns(run: Run, long: int) -> dict[str, Columns] | None:
    log = run.path / READINGS
    if not (run.path / META).exists() or not log.exists() or log.stat().st_size < max(long, 1):
        return None
    try:
        import polars as pl
    except ImportError:
        return None
    numbers = [name for name in (*FIELDS, *OTHERS) if name not in (*TEXT_FIELDS, "energies", "standard_errors")]
    schema: dict[str, Any] = dict.fromkeys(numbers, pl.Float64) | dict.fromkeys(TEXT_FIELDS, pl.String)
    schema["energies"] = pl.Struct(dict.fromkeys(ENERGY_NAMES, pl.Float64))
    schema["standard_errors"] = pl.Struct(dict.fromkeys(FORMS, pl.Float64))
    resumes = run._resumes()
    frame = None
    with log.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        spans = _spans([offset for _, offset in resumes], len(data))
        for (start, end), step in zip(spans, [None, *(step for step, _ in resumes)], strict=True):
            if frame is not None and step is not None:
                frame = frame.filter(pl.col("step") < step)
            end = _end_of_whole_lines(data, start, end)
            if end <= start:
                continue
            # polars reads the whole file in place, and a part of it from a copy.
            source = log if (start, end) == (0, len(data)) else io.BytesIO(data[start:end])
            try:
                read = pl.read_ndjson(source, schema=schema)
            except (pl.exceptions.PolarsError, ValueError):
                return None
            if read.height != _lines(data, start, end) or read["step"].null_count():
                return None
            frame = read if frame is None else frame.vstack(read)
    if frame is None:
        return {}
    empty = [pl.col(name).fill_null("") for name in TEXT_FIELDS if name != "site"]
    frame = frame.with_columns(pl.col("site").fill_null(UNEMBEDDING), *empty)
    sites = frame["site"].unique(maintain_order=True).to_list()
    return {site: _of(frame.filter(pl.col("site") == site) if len(sites) > 1 else frame, numbers) for site in sites}


def _spans(offsets: list[int], end: int) -> list[tuple[int, int]]:
    """Return the parts of a log between its resumes."""
    return list(zip([0, *offsets], [*offsets, end], strict=True))


def _end_of_whole_lines(data: mmap.mmap, start: int, end: int) -> int:
    """Return where a part of a log ends, without its last line if that is torn."""
    while end > start and data[end - 1 : end] == b"\n":
        end -= 1
    last = data.rfind(b"\n", start, end) + 1 or start
    try:
        json.loads(data[last:end])
    except ValueError:
        return last
    return min(end + 1, len(data))


def _lines(data: mmap.mmap, start: int, end: int) -> int:
    """Count the lines of a part, whose last line may lack a newline."""
    count = 0 if data[end - 1 : end] == b"\n" else 1
    for at in range(start, end, CHUNK):
        count += data[at : min(at + CHUNK, end)].count(b"\n")
    return count


def _of(frame: Any, numbers: list[str]) -> Columns:
    """Return one site's columns in the form of `Run.columns`."""
    columns: dict[str, np.ndarray[Any, Any]] = {}
    for name in numbers:
        values = _finite(frame[name])
        if name in OTHERS and np.isnan(values).all():
            continue
        whole = name in (*INTEGER_FIELDS, "step") and not np.isnan(values).any()
        columns[name] = values.astype(np.int64) if whole else values
    for energy in ENERGY_NAMES:
        columns[f"energy_{energy}"] = _finite(frame["energies"].struct.field(energy))
    if frame["standard_errors"].null_count() < frame.height:
        for form in FORMS:
            columns[f"{form}_error"] = _finite(frame["standard_errors"].struct.field(form))
    for name in TEXT_FIELDS:
        columns[name] = frame[name].to_numpy().astype(np.str_)
    return columns


def _finite(series: Any) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = np.array(series.fill_null(np.nan).to_numpy(), dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    return values
