"""TensorBoard: scalars of every reading, and the verdict as text.

The name selects event files of our own. TensorBoard's writer writes them, so they need neither PyTorch nor TensorFlow.
The object is a SummaryWriter of the user's, from PyTorch or tensorboardX.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logalign.common.extras import load
from logalign.diagnosis.verdict import Verdict
from logalign.errors import RunError
from logalign.trackers.metrics import VERDICT_TEXT

FOLDER = "tensorboard"
FOLDER_WITHOUT_RUN = "logalign-tensorboard"
WRITER_METHODS = ("add_scalar", "add_text", "flush")


def open_tracker(folder: Path | None) -> EventTracker:
    """Return a tracker of event files: in `tensorboard` in the run folder, or in `logalign-tensorboard` here.

    Raises:
        MissingExtraError: tensorboard is not installed.
        RunError: the folder cannot be written.
    """
    path = Path(FOLDER_WITHOUT_RUN) if folder is None else folder / FOLDER
    return EventTracker(path)


def wrap(tracker: object) -> SummaryWriterTracker | None:
    """Return a tracker that logs to a SummaryWriter, or None for any other object."""
    is_writer = all(callable(getattr(tracker, method, None)) for method in WRITER_METHODS)
    return SummaryWriterTracker(tracker) if is_writer else None


def _markdown(verdict: Verdict) -> str:
    return str(verdict).replace("\n", "\n\n")


class EventTracker:
    """Writes its own event files, flushed at every reading.

    At its first step, and where steps go back (as after a resume), it makes readers drop earlier records of that step
    and beyond.
    """

    def __init__(self, path: Path) -> None:
        purpose = 'trackers="tensorboard"'
        events = load("tensorboard.compat.proto.event_pb2", extra="tensorboard", purpose=purpose)
        writer = load("tensorboard.summary.writer.event_file_writer", extra="tensorboard", purpose=purpose)
        texts = load("tensorboard.plugins.text.metadata", extra="tensorboard", purpose=purpose)
        tensors = load("tensorboard.util.tensor_util", extra="tensorboard", purpose=purpose)
        self._event, self._session = events.Event, events.SessionLog
        self._text_kind = texts.create_summary_metadata("", "")
        self._tensor = tensors.make_tensor_proto
        self._last: int | None = None
        try:
            self._writer = writer.EventFileWriter(str(path))
        except OSError as error:
            raise RunError(f"{path}: expected a folder that can be written, found: {error}") from error

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Write one step's scalars."""
        if self._last is None or step <= self._last:
            self._add(step, session_log=self._session(status=self._session.START))
        self._last = step
        event = self._event(wall_time=time.time(), step=step)
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._writer.add_event(event)
        self._writer.flush()

    def tell(self, verdict: Verdict) -> None:
        """Write the verdict as text."""
        event = self._event(wall_time=time.time(), step=self._last or 0)
        text = self._tensor([_markdown(verdict).encode()])
        event.summary.value.add(tag=VERDICT_TEXT, tensor=text, metadata=self._text_kind)
        self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, **content))


class SummaryWriterTracker:
    """Logs to the user's SummaryWriter, which stays open, with a flush at every reading."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._step = 0

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Add one step's scalars."""
        self._step = step
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def tell(self, verdict: Verdict) -> None:
        """Add the verdict as text."""
        self._writer.add_text(VERDICT_TEXT, _markdown(verdict), self._step)
        self._writer.flush()

    def close(self) -> None:
        """Do nothing: the writer is the user's."""
