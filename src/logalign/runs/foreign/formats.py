"""Choose the reader of a log from the files that are present, before any of them is parsed."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from logalign.errors import RunError
from logalign.runs.foreign import mlflow, records, table, tensorboard, trainer, wandb
from logalign.runs.reading import Reading

FORMATS = "a log of TensorBoard, W&B, MLflow or Transformers' Trainer"


def reader_of(path: Path) -> Callable[[Path], list[Reading]] | None:
    """Return the reader of a path, or None where it is no other tool's log.

    A folder may hold logs of several kinds, such as a Trainer's output folder. The most precise one is then read: the
    Trainer's own history, else W&B, else MLflow, else TensorBoard.

    Raises:
        RunError: the path cannot be accessed.
    """
    try:
        return _reader_of(path)
    except OSError as error:
        raise RunError(f"{path}: expected what can be read, found: {error}") from error


def _reader_of(path: Path) -> Callable[[Path], list[Reading]] | None:
    if mlflow.is_database(path):
        return mlflow.database_readings
    if path.is_file():
        if path.suffix == wandb.SUFFIX:
            return wandb.wandb_readings
        if trainer.is_state(path):
            return trainer.trainer_readings
        if fnmatchcase(path.name, tensorboard.EVENT_FILES):
            return tensorboard.tensorboard_readings
        if records.is_records(path):
            return records.record_readings
        return table.table_readings if table.is_table(path) else None
    if not path.is_dir():
        return None
    if trainer.trainer_state(path) is not None:
        return trainer.trainer_readings
    if wandb.wandb_files(path):
        return wandb.wandb_readings
    if mlflow.run_folders(path):
        return mlflow.folder_readings
    return tensorboard.tensorboard_readings if tensorboard.event_folders(path) else None


def is_log_file(path: str) -> bool:
    """Return whether a file, by its path below a folder, is part of a log (a checkpoint is not).

    Example:
        >>> is_log_file("checkpoint-10/trainer_state.json"), is_log_file("checkpoint-10/model.safetensors")
        (True, False)
    """
    file = PurePosixPath(path)
    return (
        file.name in (trainer.STATE, mlflow.META)
        or file.suffix == wandb.SUFFIX
        or mlflow.METRICS in file.parts[:-1]
        or fnmatchcase(file.name, tensorboard.EVENT_FILES)
    )
