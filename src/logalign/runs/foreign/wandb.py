"""Read offline runs of W&B: the folder `wandb/offline-run-*` (or `wandb/run-*`), or the `.wandb` file in it.

W&B has no public reader of these files. They use the framing of LevelDB's logs: blocks of 32 KiB, and records of
checksum, length, kind and data. The records are protocol buffers, and W&B's own classes read them.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from logalign.common.extras import load
from logalign.errors import MissingExtraError, RunError
from logalign.runs.foreign.row import Row
from logalign.runs.foreign.rows import listed, readings_of
from logalign.runs.reading import Reading

SUFFIX = ".wandb"
MAGIC = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
BLOCK = 32 * 1024
HEADER = struct.Struct("<IHB")  # checksum, length, kind
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
STEPS = ("_step", "train/global_step", "trainer/global_step")
"""W&B's own row count is the step unless the Trainer or Lightning logs its step."""


def wandb_files(path: Path) -> list[Path]:
    """Return the runs in a run folder, in the folder `wandb` or in its parent folder."""
    return sorted(file for folder in ("", "*run-*/", "wandb/*run-*/") for file in path.glob(f"{folder}*{SUFFIX}"))


def wandb_readings(path: Path) -> list[Reading]:
    """Return the readings of an offline run.

    Raises:
        MissingExtraError: wandb is not installed, or its release lacks the classes for its records.
        RunError: several runs exist, or the file is no run, is damaged, or lacks LAR and loss.
    """
    files = [path] if path.is_file() else wandb_files(path)
    if len(files) != 1:
        names = listed(str(file.parent.relative_to(path)) for file in files)
        raise RunError(f"{path}: expected one W&B run, found {names}; give one of them")
    record_of = _parser(files[0])
    rows = []
    for at, data in _records(files[0]):
        try:
            record = record_of(data)
        except Exception as error:
            raise RunError(f"{files[0]}, byte {at}: expected a record of a W&B run, found damage ({error})") from error
        if record.WhichOneof("record_type") == "history":
            rows.append(_row(files[0], at, record.history))
    return readings_of(rows, path=path, kind="W&B run")


def _parser(file: Path) -> Callable[[bytes], Any]:
    """Return the parser of records, the only user of wandb's private interface."""
    purpose = f"{file}: reading W&B runs"
    records = load("wandb.proto.wandb_internal_pb2", extra="wandb", purpose=purpose)
    try:
        parser: Callable[[bytes], Any] = records.Record.FromString
        records.HistoryRecord.DESCRIPTOR.fields_by_name["item"]
    except (AttributeError, KeyError) as error:
        version = load("wandb", extra="wandb", purpose=purpose).__version__
        raise MissingExtraError(
            f"{purpose} needs a release of wandb that has wandb.proto.wandb_internal_pb2.Record, as 0.18 to 0.31 do, "
            f"found {version}: export the run's history to CSV instead"
        ) from error
    return parser


def _row(file: Path, at: int, history: Any) -> Row:
    values = {}
    for item in history.item:
        try:
            value = json.loads(item.value_json)
        except ValueError as error:
            raise RunError(f"{file}, byte {at}: expected JSON in a W&B row, found damage ({error})") from error
        if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
            value = float(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            values["/".join(item.nested_key) or item.key] = value
    step = next((values[name] for name in reversed(STEPS) if name in values), history.step.num)
    time = values.get("_timestamp")
    values = {name: value for name, value in values.items() if not name.startswith("_")}
    return Row(step, time, values, f"row {history.step.num}")


def _records(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the place and bytes of every whole record, except a last one that a kill left unfinished."""
    data = file.read_bytes()
    if data[: len(MAGIC)] != MAGIC:
        found = "nothing" if not data else repr(data[: len(MAGIC)])
        raise RunError(f"{file}: expected a W&B run of version 0 (it begins with {MAGIC!r}), found {found}")
    at = begun = len(MAGIC)
    parts: list[bytes] = []
    while at + HEADER.size <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER.size:
            at += left
            continue
        checksum, length, kind = HEADER.unpack_from(data, at)
        body = data[at + HEADER.size : at + HEADER.size + length]
        if len(body) < length:
            return
        if zlib.crc32(bytes([kind]) + body) != checksum or kind not in (FULL, FIRST, MIDDLE, LAST):
            if not any(data[at:]):
                return  # the file was extended before it was written
            raise RunError(f"{file}, byte {at}: expected a record of a W&B run, found damage; sync or export the run")
        if kind in (FULL, FIRST):
            begun, parts = at, []
        parts.append(body)
        at += HEADER.size + length
        if kind in (FULL, LAST):
            yield begun, b"".join(parts)
