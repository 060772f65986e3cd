"""Read TensorBoard logs, so that recordings from before the run folder can be used, too.

TensorBoard's own EventAccumulator reads them. Its scalars are float32, so that LAR is good to about 1e-8 and
tokens_seen is rounded above 2**24.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from logalign.common.extras import load
from logalign.errors import RunError
from logalign.runs.foreign.names import meaning_of
from logalign.runs.foreign.rows import LARS, NAMES_TOLD, Point, listed, readings_of, rows_by_step
from logalign.runs.reading import Reading

EVENT_FILES = "*tfevents*"


def event_folders(path: Path) -> list[Path]:
    """Return the folders at or below a path that hold TensorBoard event files."""
    return sorted({file.parent for file in path.rglob(EVENT_FILES) if file.is_file()})


def tensorboard_readings(path: Path) -> list[Reading]:
    """Return the readings of a TensorBoard log: a folder, or one event file.

    The only folder with LAR is read. If none has LAR, the folders are one log if one of them holds the training loss
    and the others, such as `validation`, hold none.

    Raises:
        MissingExtraError: tensorboard is not installed.
        RunError: several runs exist, LAR and loss are missing, or a value does not fit a reading.
    """
    folders = [path] if path.is_file() else event_folders(path)
    curves = _scalars(folders[0]) if len(folders) == 1 else _one_of(path, folders)
    return readings_of(rows_by_step(curves), path=path, kind="TensorBoard log")


def _one_of(path: Path, folders: list[Path]) -> dict[str, list[Point]]:
    """Return the scalars of several folders that hold one run."""
    names = [folder.relative_to(path).as_posix() for folder in folders]
    if len(folders) <= NAMES_TOLD:
        read = [_scalars(folder) for folder in folders]
        with_lar = [tags for tags in read if not tags.keys().isdisjoint(LARS)]
        if len(with_lar) == 1:
            return with_lar[0]
        if not with_lar:
            read = [
                {tag if name == "." else f"{name}/{tag}": points for tag, points in tags.items()}
                for name, tags in zip(names, read, strict=True)
            ]
            if sum(any(meaning_of(tag) == "loss" for tag in tags) for tags in read) == 1:
                return {tag: points for tags in read for tag, points in tags.items()}
    raise RunError(f"{path}: expected one folder with TensorBoard event files, found {listed(names)}; give one of them")


def _scalars(folder: Path) -> dict[str, list[Point]]:
    """Return every scalar of a log by tag, in the order of recording."""
    purpose = f"{folder}: reading TensorBoard logs"
    accumulator = load(
        "tensorboard.backend.event_processing.event_accumulator", extra="tensorboard", purpose=purpose
    ).EventAccumulator
    make_ndarray = load("tensorboard.util.tensor_util", extra="tensorboard", purpose=purpose).make_ndarray
    log: Any = accumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 1, "audio": 1})
    log.Reload()
    found: dict[str, list[Point]] = {}
    for tag in log.Tags()["scalars"]:
        found[tag] = [Point(event.step, float(event.value), float(event.wall_time)) for event in log.Scalars(tag)]
    for tag in log.Tags()["tensors"]:
        arrays = [(event.step, make_ndarray(event.tensor_proto), event.wall_time) for event in log.Tensors(tag)]
        if all(array.size == 1 and array.dtype.kind in "fiu" for _, array, _ in arrays):
            found[tag] = [Point(step, float(array.item()), float(time)) for step, array, time in arrays]
    return found
