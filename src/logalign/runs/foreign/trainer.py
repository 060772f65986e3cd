"""Read the log history of Transformers' Trainer: `trainer_state.json`, or a folder that holds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from logalign.errors import RunError
from logalign.runs.foreign.row import Row
from logalign.runs.foreign.rows import readings_of
from logalign.runs.reading import Reading

STATE = "trainer_state.json"
CHECKPOINT = "checkpoint-"


def trainer_state(path: Path) -> Path | None:
    """Return the state file of a checkpoint or output folder: its own, else its last checkpoint's."""
    if (path / STATE).is_file():
        return path / STATE
    states = [
        (int(number), file)
        for file in path.glob(f"{CHECKPOINT}*/{STATE}")
        if (number := file.parent.name.removeprefix(CHECKPOINT)).isdecimal()
    ]
    return max(states)[1] if states else None


def is_state(path: Path) -> bool:
    """Return whether a file is a Trainer's state, under any name."""
    return path.name == STATE or (path.suffix == ".json" and b'"log_history"' in path.read_bytes())


def trainer_readings(path: Path) -> list[Reading]:
    """Return the readings of a Trainer's log history.

    Raises:
        RunError: the file is damaged, or lacks the history, or LAR and loss in it.
    """
    file = path if path.is_file() else trainer_state(path)
    assert file is not None, "reader_of() looked for it"
    try:
        state: Any = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file}: expected a JSON object, found damage: {error}") from error
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise RunError(f"{file}: expected a Trainer's state with a list 'log_history' of objects, found none")
    rows = []
    for i, entry in enumerate(history):
        values = {
            name: value
            for name, value in entry.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
        }
        rows.append(Row(entry.get("step"), None, values, f"log_history entry {i}"))
    return readings_of(rows, path=path, kind="Trainer's log history")
