"""Read other tools' JSON logs: one object a line, a list of objects, or one object of columns.

W&B's history and many training loops write one object a line. `json.dump(history)` writes a list. Keras's
`History.history` and pandas's `to_json()` write columns. If no column is a step, rows are counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from logalign.errors import RunError
from logalign.runs.foreign.losses import has_losses
from logalign.runs.foreign.names import meaning_of
from logalign.runs.foreign.row import Row
from logalign.runs.foreign.rows import PREFIX, STEP, TRAINER_PREFIX, listed, readings_of
from logalign.runs.reading import Reading

SUFFIXES = (".json", ".jsonl", ".ndjson")
STEPS = ("train/global_step", "trainer/global_step", "global_step", STEP, "Step", "_step")
TIMES = ("time", "_timestamp")
PEEKED = 1 << 16
LINES_PEEKED = 50
KIND = "log"
SUMMARY = "_wandb"
"""A key in a W&B run's summary."""


def is_records(path: Path) -> bool:
    """Return whether a file is JSON, but not one object a line with `step` and `lar`."""
    if path.suffix.lower() not in SUFFIXES:
        return False
    with path.open("rb") as file:
        lines = [line for line in islice(file, LINES_PEEKED) if line.strip()]
    first = lines[0].lstrip()[:1] if lines else b""
    if first == b"[":
        return True
    objects = [each for line in lines if isinstance(each := _parsed(line), dict)]
    if objects:
        return not any({STEP, "lar"} <= set(each) and not isinstance(each["lar"], list | dict) for each in objects)
    return first == b"{" and path.suffix.lower() == ".json"


def record_readings(path: Path) -> list[Reading]:
    """Return the readings of a JSON file.

    Raises:
        RunError: the file is damaged, lacks losses and LAR, or has columns of several lengths.
    """
    records = list(_records(path))
    if len(records) == 1 and SUMMARY in records[0][1]:
        raise RunError(
            f"{path}: expected the history of a W&B run, found its summary, which holds last values only; "
            "export the history, or give the run's folder"
        )
    names = dict.fromkeys(name for _, record in records for name in record)
    step = next((name for name in STEPS if name in names), None)
    time = next((name for name in TIMES if name in names), None)
    rows = []
    for where, record in records:
        values = {name: value for name, value in record.items() if _is_number(value) and name not in (*STEPS, *TIMES)}
        when = record.get(time or "")
        rows.append(Row(record.get(step or ""), when if _is_number(when) else None, values, where))
    if not rows:
        raise RunError(f"{path}: expected readings with columns 'step' and 'lar', found none")
    return readings_of(rows, path=path, kind=KIND)


def _records(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Return the place and numbers of each row, from any of the three forms."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: expected text in JSONL or CSV form, found: {error}") from error
    whole = _parsed(text)
    if isinstance(whole, list):
        if not all(isinstance(each, dict) for each in whole):
            raise RunError(f"{path}: expected a list of objects, one for each row, found other things in it")
        return [(f"entry {i}", each) for i, each in enumerate(whole)]
    if isinstance(whole, dict):
        is_columns = SUMMARY not in whole and any(isinstance(each, list | dict) for each in whole.values())
        return _of_columns(path, whole) if is_columns else [("", whole)]
    return _of_lines(path, text)


def _of_lines(path: Path, text: str) -> list[tuple[str, Mapping[str, Any]]]:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    found: list[tuple[str, Mapping[str, Any]]] = []
    for at, (number, line) in enumerate(lines):
        value = _parsed(line)
        if isinstance(value, dict):
            found.append((f"line {number}", value))
        elif at < len(lines) - 1 or not found:  # the last may be torn
            raise RunError(f"{path}, line {number}: expected a JSON object, found damage; repair or remove that line")
    return found


def _of_columns(path: Path, columns: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    taken = {name: list(each.values()) if isinstance(each, dict) else each for name, each in columns.items()}
    taken = {name: each for name, each in taken.items() if isinstance(each, list) and _is_of_a_log(name)}
    lengths = {len(each) for each in taken.values()}
    if not has_losses(list(taken)) and not any(name.endswith("lar") for name in taken):
        raise RunError(f"{path}: expected a loss among the columns, found {listed(columns)}; add one")
    if len(lengths) > 1:
        told = ", ".join(f"{name} with {len(each)}" for name, each in taken.items())
        raise RunError(f"{path}: expected columns of one length, found {told}; write one object a row instead")
    counted = not any(name in STEPS or meaning_of(name) in ("step", "epoch") for name in taken)
    rows = [dict(zip(taken, row, strict=True)) for row in zip(*taken.values(), strict=True)]
    return [(f"row {i}", row | ({STEP: i} if counted else {})) for i, row in enumerate(rows)]


def _is_of_a_log(name: str) -> bool:
    own = name.removeprefix(TRAINER_PREFIX)
    return own.startswith((PREFIX, "lar")) or name in (*STEPS, *TIMES, "n", "m") or meaning_of(name) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parsed(text: str | bytes) -> Any:
    """Return the parsed JSON, or None where the text is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
