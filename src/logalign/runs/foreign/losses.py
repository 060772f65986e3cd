"""Turn logs without LAR into readings: losses, epoch and learning rate, with the reason why there is no LAR.

A row with a training loss is a reading. A held-out loss that was recorded by itself joins the reading before it, as in
logs with LAR. If that reading already has one, the loss becomes a separate reading without a training loss.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from logalign.errors import InputError, RunError
from logalign.runs.foreign.names import Meaning, meaning_of
from logalign.runs.foreign.row import Row
from logalign.runs.reading import EPOCHS_AS_STEPS, NO_LAR, ROWS_AS_STEPS, Reading, reading_of_record

CARRIED = ("epoch", "lr", "tokens_seen")
"""Values often logged at other steps than a loss, which uses the last one at or before its step."""
OF_THE_TRAINER = ({"train/loss", "train/epoch"}, {"loss", "epoch", "learning_rate"})
"""Names that Transformers' Trainer logs, whose loss is the mean of the steps since its previous log."""
SUMMARY, OF_THE_WHOLE = "train_runtime", "train_loss"
"""The mark of the Trainer's last row, and the mean loss over the whole training in it."""


def has_losses(names: Sequence[str]) -> bool:
    """Return whether any of these names means a training or held-out loss."""
    return any(meaning_of(name) in ("loss", "val_loss") for name in names)


def loss_readings(rows: Sequence[Row], *, path: Path) -> list[Reading]:
    """Return the readings of a log without LAR, in order.

    A step that is not above the one before means that training resumed there, or that more was recorded at it.

    Args:
        rows: The rows in the order of recording, with a loss among their names.
        path: The path for errors.

    Raises:
        RunError: step and epoch are missing, or a value does not fit a reading.
    """
    rows = [_without_summary(row) for row in rows]
    chosen = _chosen(rows)
    steps, reason = _steps(rows, chosen, path)
    is_mean = any(names <= {name for row in rows for name in row.values} for names in OF_THE_TRAINER)
    taken: dict[int, tuple[str, dict[str, Any]]] = {}
    carried: dict[str, Any] = {}
    last = -1
    for row, step in zip(rows, steps, strict=True):
        found: dict[str, Any] = {meaning: row.values[name] for meaning, name in chosen.items() if name in row.values}
        if step < last:
            taken = {earlier: each for earlier, each in taken.items() if earlier < step}
            last = max(taken, default=-1)
        carried |= {name: found[name] for name in CARRIED if name in found}
        is_held_out = "val_loss" in found and "loss" not in found
        if is_held_out and taken and "val_loss" not in taken[last][1]:
            taken[last][1]["val_loss"] = found["val_loss"]
        elif is_held_out or "loss" in found:
            where, before = taken.get(step, (row.where, {}))
            losses: dict[str, Any] = {name: found[name] for name in ("loss", "val_loss") if name in found}
            if is_mean and "loss" in losses:
                losses["loss_mean"] = losses["loss"]
            taken[step] = where, before | carried | losses | {"time": row.time}
            last = step
    return [_reading(path, where, step, record, reason) for step, (where, record) in taken.items()]


def _without_summary(row: Row) -> Row:
    if not any(name.endswith(SUMMARY) for name in row.values):
        return row
    kept = {name: value for name, value in row.values.items() if name.rpartition("/")[2] != OF_THE_WHOLE}
    return row._replace(values=kept)


def _chosen(rows: Sequence[Row]) -> dict[Meaning, str]:
    """Map each meaning to the name with most numbers, or to the shortest of several with as many."""
    counts = Counter(
        name
        for row in rows
        for name, value in row.values.items()
        if not isinstance(value, float) or math.isfinite(value)
    )
    chosen: dict[Meaning, str] = {}
    for name in sorted(counts, key=lambda name: (-counts[name], len(name), name)):
        meaning = meaning_of(name)
        if meaning is not None:
            chosen.setdefault(meaning, name)
    return chosen


def _steps(rows: Sequence[Row], chosen: Mapping[Meaning, str], path: Path) -> tuple[list[int], str]:
    """Return each row's step, and the reason why its reading has no LAR."""
    own: list[Any] = [row.step if row.step is not None else row.values.get(chosen.get("step", "")) for row in rows]
    if any(step is not None for step in own):
        return _whole(rows, own, path), NO_LAR
    epochs: list[Any] = [row.values.get(chosen.get("epoch", "")) for row in rows]
    known = [epoch for epoch in epochs if isinstance(epoch, int | float) and math.isfinite(epoch)]
    if not known:
        names = ", ".join(sorted(chosen.values()))
        raise RunError(f"{path}: expected a step or an epoch beside the losses, found only {names}; add one of them")
    if all(epoch == int(epoch) and epoch >= 0 for epoch in known):
        return _whole(rows, epochs, path), EPOCHS_AS_STEPS
    return list(range(len(rows))), ROWS_AS_STEPS


def _whole(rows: Sequence[Row], steps: Sequence[Any], path: Path) -> list[int]:
    """Return steps as whole numbers, where a row without one has the step before."""
    found: list[int] = []
    for row, step in zip(rows, steps, strict=True):
        if step is None:
            found.append(found[-1] if found else 0)
        elif isinstance(step, bool) or not isinstance(step, int | float) or not math.isfinite(step) or step < 0:
            raise RunError(f"{path}, {row.where}: expected a whole number from 0 on for the step, found {step!r}")
        elif step != int(step):
            raise RunError(f"{path}, {row.where}: expected a whole number for the step, found {step!r}")
        else:
            found.append(int(step))
    return found


def _reading(path: Path, where: str, step: int, record: Mapping[str, Any], reason: str) -> Reading:
    try:
        return reading_of_record({"lar": None, **record, "step": step, "reason": reason})
    except (InputError, OverflowError) as error:
        raise RunError(f"{path}, {where}: {error}") from error
