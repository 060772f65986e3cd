"""TensorBoard logs as readings: what people recorded before they had a run folder can be looked at, too.

Read with TensorBoard's own EventAccumulator. Its scalars are float32, so that LAR is good to about 1e-8 and tokens_seen
is rounded above 2**24.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logalign.errors import InputError, MissingExtraError, RunError
from logalign.readings import FIELDS, TEXT_FIELDS, Reading, reading_of_record

PREFIX = "logalign/"
EVENT_FILES = "*tfevents*"
NOT_SCALARS = ("step", "time", "energies", "standard_errors", *TEXT_FIELDS)
KNOWN = (*(name for name in FIELDS if name not in NOT_SCALARS), "val_loss")
"""Scalars that are taken by these names, with or without the prefix; with it, any other scalar, too."""
CARRIED = ("epoch", "loss", "lr", "tokens_seen", "n", "m")
"""What is often logged at other steps than LAR: the last value at or before a reading's step stands."""

Points = dict[int, tuple[float, float]]  # step: (value, seconds since the epoch)


def event_folders(path: Path) -> list[Path]:
    """The folders at or below a path that hold TensorBoard event files."""
    return sorted({file.parent for file in path.rglob(EVENT_FILES) if file.is_file()})


def tensorboard_readings(path: Path) -> list[Reading]:
    """The readings of a TensorBoard log folder that has a scalar `logalign/lar` or `lar`.

    A step that is not above the one before means that training was resumed there: what was logged before, at that step
    and beyond, is superseded.

    Raises:
        MissingExtraError: tensorboard is not installed.
        RunError: several runs, no such scalar, or values that no reading has.
    """
    folders = event_folders(path)
    if len(folders) != 1:
        names = ", ".join(str(folder.relative_to(path)) for folder in folders) or "none"
        raise RunError(f"{path}: expected one folder with TensorBoard event files, found {names}; give one of them")
    tags = _scalars(folders[0])
    chosen: dict[str, Points] = {}
    for tag, points in tags.items():
        name = tag.removeprefix(PREFIX)
        if (tag.startswith(PREFIX) and name not in NOT_SCALARS) or (name in KNOWN and PREFIX + name not in tags):
            chosen[name] = points
    if "lar" not in chosen:
        found = ", ".join(sorted(tags)) or "none"
        raise RunError(f"{path}: expected a scalar '{PREFIX}lar' or 'lar' in the TensorBoard log, found {found}")
    readings = []
    carried: dict[str, float] = {}
    pending = {name: sorted(chosen[name].items(), reverse=True) for name in CARRIED if name in chosen}
    for step, (_, time) in sorted(chosen["lar"].items()):
        for name, later in pending.items():
            while later and later[-1][0] <= step:
                carried[name] = later.pop()[1][0]
        here = {name: points[step][0] for name, points in chosen.items() if step in points and name not in CARRIED}
        try:
            readings.append(reading_of_record({"step": step, "time": time, **carried, **here}))
        except InputError as error:
            raise RunError(f"{path}, step {step}: {error}") from error
    return readings


def _scalars(folder: Path) -> Mapping[str, Points]:
    """Every scalar of a log, by tag and step."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError as error:
        raise MissingExtraError(
            f'{folder}: reading TensorBoard logs needs tensorboard: pip install "logalign[tensorboard]"'
        ) from error
    log: Any = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 1, "audio": 1})
    log.Reload()
    found: dict[str, Points] = {}
    for tag in log.Tags()["scalars"]:
        found[tag] = _points((event.step, event.value, event.wall_time) for event in log.Scalars(tag))
    for tag in log.Tags()["tensors"]:
        arrays = [(event.step, make_ndarray(event.tensor_proto), event.wall_time) for event in log.Tensors(tag)]
        if all(array.size == 1 and array.dtype.kind in "fiu" for _, array, _ in arrays):
            found[tag] = _points((step, array.item(), time) for step, array, time in arrays)
    return found


def _points(events: Any) -> Points:
    points: Points = {}
    last = -1
    for step, value, time in events:
        if step <= last:
            points = {earlier: points[earlier] for earlier in points if earlier < step}
        points[step] = (float(value), float(time))
        last = step
    return points
