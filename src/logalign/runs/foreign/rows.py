"""Turn another tool's rows into readings: select and translate names, and carry values on to later rows.

Every format's reader returns rows in the order of recording: numbers by name, with the tool's step. This module handles
everything that the formats share: the prefix `logalign/`, other names for the same number, numbers recorded at other
steps than LAR, and a resumed training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from logalign.errors import InputError, RunError
from logalign.runs.foreign.losses import has_losses, loss_readings
from logalign.runs.foreign.row import Row
from logalign.runs.reading import (
    ENERGY_NAMES,
    FIELDS,
    FORMS,
    SPECTRAL_FIELDS,
    TEXT_FIELDS,
    UNEMBEDDING,
    Reading,
    reading_of_record,
)

PREFIX = "logalign/"
STEP = "step"
WEIGHT_NORM = "weight_norm"
"""The norm of W, which replaces the energies: its square is `energies.weight`."""
VERDICT = "verdict"
DERIVED = (VERDICT, "verdict_text", "deviation", "revisited_share", "strain", "decline_rate", "memorization")
"""Tracker values that are not read, because the readings give the verdict anew (the last two: in old logs only)."""
NOT_NUMBERS = ("time", "energies", "standard_errors", *TEXT_FIELDS)
KNOWN = (*(name for name in FIELDS if name not in (STEP, *NOT_NUMBERS)), "val_loss")
"""Names that are read with or without the prefix (with it, all other numbers too)."""
OF_A_LAYER = (*FORMS, "effective_dim", *SPECTRAL_FIELDS, "n", "m", WEIGHT_NORM)
"""Values read for layers other than the main one: `logalign/SITE/lar` and so on."""
OTHER_NAMES: Mapping[str, str] = {
    "learning_rate": "lr",
    "train/learning_rate": "lr",
    "train/loss": "loss",
    "train/epoch": "epoch",
    "eval_loss": "val_loss",
    "eval/loss": "val_loss",
}
"""Names that Transformers' Trainer uses in its log history, and with `train/` and `eval/` in trackers."""
TRAINER_PREFIX = "train/"
LARS = (PREFIX + "lar", "lar", TRAINER_PREFIX + PREFIX + "lar")
CARRIED = ("epoch", "loss", "lr", "tokens_seen", "n", "m")
"""Values often logged at other steps than LAR: a reading uses the last one at or before its step."""
HELD_OUT = "val_loss"
"""A loss measured now and then, after a reading, which joins the last reading before it."""
NAMES_TOLD = 20

Target = tuple[str, str]  # site, field


class Point(NamedTuple):
    """One number of one curve, for tools that record each curve separately."""

    step: int
    value: float
    time: float | None


def rows_by_step(curves: Mapping[str, Iterable[Point]]) -> list[Row]:
    """Build rows from curves, each in the order of recording.

    A step that is not above the one before means that training resumed there. It supersedes the curve's earlier points
    at that step and beyond.
    """
    rows: dict[int, tuple[dict[str, float], float | None]] = {}
    for name, points in curves.items():
        kept: dict[int, Point] = {}
        last = -math.inf
        for point in points:
            if point.step <= last:
                kept = {step: earlier for step, earlier in kept.items() if step < point.step}
            kept[point.step] = point
            last = point.step
        for step, point in kept.items():
            values, time = rows.get(step, ({}, None))
            values[name] = point.value
            is_lar = name.endswith("lar")
            rows[step] = (values, point.time if time is None or is_lar else time)
    return [Row(step, rows[step][1], rows[step][0], f"step {step}") for step in sorted(rows)]


def readings_of(rows: Sequence[Row], *, path: Path, kind: str) -> list[Reading]:
    """Return a log's readings in order: one per row with LAR, and one per layer other than the main one.

    A log without LAR has one per row with a loss (see `losses`).

    A step below the one before means that training resumed there. It supersedes readings from that step on.

    Args:
        rows: The rows in the order of recording.
        path: The path for errors.
        kind: The kind of log, for errors: "W&B run".

    Raises:
        RunError: LAR and loss are missing, or a value does not fit a reading.
    """
    names = dict.fromkeys(name for row in rows for name in row.values)
    targets = _targets(names)
    if (UNEMBEDDING, "lar") not in targets.values() and not any(_is_verdict(name) for name in names):
        if has_losses(list(names)):
            return loss_readings(rows, path=path)
        raise RunError(
            f"{path}: expected '{PREFIX}lar', 'lar' or a loss such as 'loss', 'train/loss' or 'val_loss' in the "
            f"{kind}, found {listed(names)}; record LAR with logalign.watch(trackers=...)"
        )
    steps = [name for name in (PREFIX + STEP, TRAINER_PREFIX + PREFIX + STEP) if name in names]
    taken: list[tuple[int, str, dict[str, dict[str, Any]]]] = []
    carried: dict[str, Any] = {}
    for row in rows:
        step = next((row.values[name] for name in steps if name in row.values), row.step)
        sites: dict[str, dict[str, Any]] = {UNEMBEDDING: {}}
        is_reading = False
        for name, value in row.values.items():
            if (target := targets.get(name)) is not None:
                site, field = target
                sites.setdefault(site, {})[field] = value
                is_reading = is_reading or (site, field) == (UNEMBEDDING, "lar")
            is_reading = is_reading or _is_verdict(name)
        main = sites[UNEMBEDDING]
        carried |= {name: main[name] for name in CARRIED if name in main}
        if not is_reading:
            if HELD_OUT in main and taken:
                taken[-1][2][UNEMBEDDING][HELD_OUT] = main[HELD_OUT]
            continue
        whole = _step(step, path, row.where)
        sites[UNEMBEDDING] = carried | main
        while taken and taken[-1][0] > whole:
            taken.pop()
        if taken and taken[-1][0] == whole:
            for site, record in taken.pop()[2].items():
                sites[site] = record | sites.get(site, {})
        sites[UNEMBEDDING].setdefault("lar", None)
        for record in sites.values():
            record |= {STEP: whole, "time": row.time}
        taken.append((whole, row.where, sites))
    return [
        _reading(path, where, site, record)
        for _, where, sites in taken
        for site, record in sites.items()
        if "lar" in record
    ]


def _is_verdict(name: str) -> bool:
    """Return whether a name marks a judged reading, with LAR or an undefined one."""
    return name.removeprefix(TRAINER_PREFIX) == PREFIX + VERDICT


def listed(names: Iterable[str]) -> str:
    """Return names for an error: sorted, printable, not too many."""
    found = sorted(printable(name) for name in names)
    if len(found) > NAMES_TOLD:
        found[NAMES_TOLD:] = [f"and {len(found) - NAMES_TOLD} more"]
    return ", ".join(found) or "nothing"


def printable(text: str) -> str:
    """Return a log's text as an error may show it on a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _targets(names: Iterable[str]) -> dict[str, Target]:
    """Map recorded names to site and field, with the prefixed name where two names mean one field."""
    best: dict[Target, tuple[int, str]] = {}
    recorded = set(names)
    for name in recorded:
        rank, target = 0, None
        own = name.removeprefix(TRAINER_PREFIX) if name.startswith(TRAINER_PREFIX + PREFIX) else name
        if own.startswith(PREFIX):
            field = own.removeprefix(PREFIX)
            rank = 0 if own == name else 1
            site, slash, of_layer = field.rpartition("/")
            if slash and of_layer in OF_A_LAYER and f"{name.removesuffix(field)}{site}/lar" in recorded:
                target = (site, of_layer)
            elif field not in (STEP, *DERIVED, *NOT_NUMBERS):
                target = (UNEMBEDDING, field)
        elif name in KNOWN:
            rank, target = 2, (UNEMBEDDING, name)
        elif name in OTHER_NAMES:
            rank, target = 3, (UNEMBEDDING, OTHER_NAMES[name])
        if target is not None:
            best[target] = min(best.get(target, (rank, name)), (rank, name))
    return {name: target for target, (_, name) in best.items()}


def _step(step: Any, path: Path, where: str) -> int:
    if isinstance(step, bool) or not isinstance(step, int | float) or not math.isfinite(step) or step != int(step):
        raise RunError(f"{path}, {where}: expected a whole number for the step, found {step!r}")
    return int(step)


def _reading(path: Path, where: str, site: str, record: Mapping[str, Any]) -> Reading:
    record = dict(record)
    norm = record.pop(WEIGHT_NORM, None)
    try:
        if isinstance(norm, int | float) and math.isfinite(norm):
            record["energies"] = dict.fromkeys(ENERGY_NAMES) | {"weight": norm * norm}
        return reading_of_record({**record, "site": site})
    except (InputError, OverflowError) as error:
        raise RunError(f"{path}, {where}: {error}") from error
