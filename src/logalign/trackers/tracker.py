"""Trackers show curves where a team already looks, all under the same names, and cannot stop a training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from logalign.diagnosis.verdict import Verdict
from logalign.errors import InputError
from logalign.runs.reading import Readings
from logalign.trackers.metrics import metrics


@runtime_checkable
class Tracker(Protocol):
    """The interface of a tracker, which may raise `LogAlignError`s when it is made, but not later.

    It may also have a `notice`: a warning that the user gets once, as soon as it is text.
    """

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Take one step's numbers, named as `trackers.metrics` names them."""

    def tell(self, verdict: Verdict) -> None:
        """Take a verdict whose outcome differs from the one before."""

    def close(self) -> None:
        """Write what is left, and leave open what was not opened here."""


NAMED = ("tensorboard", "wandb", "mlflow", "csv")
"""Names of trackers: each is a module here with a function `open_tracker(folder)`."""


def open_trackers(trackers: object, *, folder: Path | None) -> list[Tracker]:
    """Return the trackers that names and objects stand for.

    Args:
        trackers: A name of `NAMED`, an object, or a list of them, or None for none. An object is a `Tracker`, or of a
            kind that a module here knows: a SummaryWriter, a run of W&B, an MLflow run, an Accelerator.
        folder: The run folder, where trackers put their files, or None without one.

    Raises:
        InputError: the name is unknown, the object is of another kind, or the tracker needs a run and finds none.
        MissingExtraError: the tracker's package is not installed.
    """
    if trackers is None:
        return []
    several = trackers if isinstance(trackers, list | tuple) else [trackers]
    return [_open(each, folder) for each in several]


def _open(tracker: object, folder: Path | None) -> Tracker:
    if isinstance(tracker, str):
        if tracker not in NAMED:
            raise InputError(f"trackers: expected one of {', '.join(NAMED)} or an object, found {tracker!r}")
        module = import_module(f"logalign.trackers.{tracker}")
        named: Tracker = module.open_tracker(folder)
        return named
    if isinstance(tracker, Tracker):
        return tracker
    for name in ("tensorboard", "wandb", "mlflow", "accelerate"):
        wrapped: Tracker | None = import_module(f"logalign.trackers.{name}").wrap(tracker)
        if wrapped is not None:
            return wrapped
    raise InputError(
        f"trackers: expected a name ({', '.join(NAMED)}), a SummaryWriter, a run of W&B or MLflow, an Accelerator, or "
        f"an object with log, tell and close, found {type(tracker).__name__}"
    )


class Trackers:
    """Several trackers beside a training: one that fails warns once and is then left out.

    Args:
        trackers: From `open_trackers()`.
        warn: Called with a key and one sentence when one fails.
    """

    def __init__(self, trackers: Iterable[Tracker], *, warn: Callable[[str, str], None]) -> None:
        self._trackers = list(trackers)
        self._warn = warn
        self._outcome: str | None = None

    def __bool__(self) -> bool:
        return bool(self._trackers)

    def log(self, readings: Readings, verdict: Verdict) -> None:
        """Give all of them one step's readings, and the verdict where its outcome changes."""
        values = metrics(readings, verdict)
        self._each(lambda tracker: tracker.log(values, step=readings.step))
        for tracker in self._trackers:
            notice = getattr(tracker, "notice", None)
            if isinstance(notice, str):
                self._warn(f"notice of {type(tracker).__name__} {id(tracker)}", notice)
        if verdict.outcome != self._outcome:
            self._outcome = verdict.outcome
            self._each(lambda tracker: tracker.tell(verdict))

    def close(self) -> None:
        """Close all of them. A second call is safe."""
        self._each(lambda tracker: tracker.close())
        self._trackers.clear()

    def _each(self, act: Callable[[Tracker], Any]) -> None:
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                with suppress(Exception):  # only the first failure warns, not those that follow from it
                    tracker.close()
                name = type(tracker).__name__
                self._warn(
                    f"tracker {name} {id(tracker)}",
                    f"{name} failed and gets no more readings ({type(error).__name__}: {error}); training goes on",
                )
