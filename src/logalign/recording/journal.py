"""The journal processes the readings of a training and depends on no framework.

It writes each step's readings to the run log, keeps them in memory, judges them and passes them to the trackers. It
warns once of each problem with them. It never stops a training: a folder that cannot be written, or a detector or
tracker that fails, causes one warning.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logalign.diagnosis.detector import check_regime
from logalign.diagnosis.guarded import GuardedDetector
from logalign.diagnosis.overfit_rule import OverfitThresholds
from logalign.errors import LogAlignWarning
from logalign.runs.reading import Reading, Readings
from logalign.runs.run import open_run
from logalign.runs.writer import RunWriter
from logalign.samples.record import SampleRecord
from logalign.samples.visits import TRACKED
from logalign.trackers.tracker import Tracker, Trackers, open_trackers

if TYPE_CHECKING:
    import numpy as np

    from logalign.diagnosis.baseline import Baseline
    from logalign.diagnosis.detector import AskedRegime
    from logalign.diagnosis.verdict import Verdict

log = logging.getLogger("logalign")


class Journal:
    """Takes the readings of a training, step by step.

    Args:
        writer: The writer of the run folder. None writes nothing.
        main: The site that is judged.
        history: The number of steps whose readings stay in memory.
        baseline: See `Detector`.
        regime: See `Detector`.
        thresholds: For the decline logic, see `Detector`.
        past: The readings of a resumed run, whose last one the next step follows. None for a new run.
        trackers: From `open_trackers()`.
        revisits: The number of samples to track for drift. 0 for none.

    Attributes:
        samples: The record of the tracked samples.
        readings: The readings so far, the latest last.
        first_step: The first step: 0, or the one after the last reading of a resumed run.
        past: The readings of a resumed run. None where nothing is resumed.
    """

    def __init__(
        self,
        writer: RunWriter | None,
        *,
        main: str,
        history: int,
        baseline: Baseline | None = None,
        regime: AskedRegime = "auto",
        thresholds: OverfitThresholds | None = None,
        past: Iterable[Reading] | None = None,
        trackers: Iterable[Tracker] = (),
        revisits: int = TRACKED,
    ) -> None:
        check_regime(regime)
        self.readings: deque[Readings] = deque(maxlen=history)
        self.first_step = 0
        self._writer = writer
        self._main = main
        self._tokens_seen: dict[str, tuple[int, int]] = {}  # site: tokens, up to and including which step
        self._sites: dict[str, Any] = {}
        self._warned: set[str] = set()
        self._told_later: list[tuple[str, str]] = []
        self._detector = GuardedDetector(
            baseline=baseline,
            regime=regime,
            thresholds=thresholds,
            warn=lambda message: self.warn_later("detector", message),
        )
        self._trackers = Trackers(trackers, warn=self.warn_later)
        self.past = None if past is None else list(past)
        self._resume_at: int | None = None
        if self.past is not None:
            self._go_on_at(self.past[-1].step + 1 if self.past else 0)
            for reading in self.past:
                if reading.tokens_seen is not None:
                    self._tokens_seen[reading.site] = (reading.tokens_seen, reading.step)
            self._detector.restart(partial(self._before, self.first_step))
        self._revisits = revisits
        self.samples = self._new_samples()

    @property
    def writes(self) -> bool:
        """True if there is a run folder to write to."""
        return self._writer is not None

    @property
    def verdict(self) -> Verdict:
        """The verdict on the main site's readings so far."""
        return self._detector.verdict

    def describe(self, sites: Mapping[str, Mapping[str, Any]], *, step: int) -> None:
        """Write to the run which layers are measured, once and at each change."""
        described = {site: dict(entries) for site, entries in sites.items()}
        if described == self._sites:
            return
        self._sites = described
        if self._writer is None:
            return
        try:
            self._writer.describe(sites=described)
            self._writer.event("sites", step=step, sites=described)
        except OSError as error:
            self._warn_of_writing(error)

    def count(self, site: str, *, step: int, tokens: int) -> int:
        """Count the tokens so far, where steps between two monitored ones count as many as the later one."""
        seen, until = self._tokens_seen.get(site, (0, -1))
        seen += tokens * (step - until)
        self._tokens_seen[site] = (seen, step)
        return seen

    def of_samples(self, step: int, epoch: float | None, *, lacking: str | None = None) -> dict[str, Any]:
        """Return the main layer's fields that the visits of samples up to this step give.

        Args:
            step: The reading's step.
            epoch: The user's value of `epoch`.
            lacking: The missing requirement for visits, in words. None where none is missing.
        """
        fields = self.samples.fields(step, epoch, lacking=lacking)
        for key, message in self.samples.notes():
            self.warn_later(key, message)
        told, self.samples.told = self.samples.told, None
        if told is not None:
            self._note(told, step=step)
        return fields

    def take(self, readings: Readings) -> None:
        """Write one step's readings, keep, judge and show them, and then issue the warnings."""
        self._write(readings)
        self.readings.append(readings)
        self._detector.update(readings.main)
        if self._trackers:
            self._trackers.log(readings, self.verdict)
        told, self._told_later = self._told_later, []
        for key, message in told:
            self.warn(key, message, step=readings.step)

    def spectra(self, step: int, site: str, **vectors: np.ndarray[Any, Any]) -> None:
        """Write a site's p and q of one step to the run folder."""
        if self._writer is None:
            return
        try:
            self._writer.spectra(step, site, **vectors)
        except OSError as error:
            self._warn_of_writing(error)

    def _note(self, message: str, *, step: int) -> None:
        """Log a message that is no warning, and write it to the run."""
        say(message)
        if self._writer is not None:
            try:
                self._writer.event("note", step=step, message=message)
            except OSError as error:
                self._warn_of_writing(error)

    def warn_later(self, key: str, message: str) -> None:
        """Warn after the next readings are taken, so that warnings turned into errors lose none."""
        self._told_later.append((key, message))

    def warn(self, key: str, message: str, *, step: int | None = None) -> None:
        """Warn once for each key, and write it to the run."""
        if key in self._warned:
            return
        self._warned.add(key)
        if self._writer is not None and key != "write":
            try:
                self._writer.event("warning", step=step, message=message)
            except OSError as error:
                self._warn_of_writing(error)
        warnings.warn(f"logalign: {message}", LogAlignWarning, stacklevel=5)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: tokens seen, samples and the detector's state, each as JSON."""
        return {
            "samples": self.samples.state_dict(),
            "tokens_seen": json.dumps({site: list(pair) for site, pair in self._tokens_seen.items()}),
            "detector": json.dumps(self._detector.state_dict(), allow_nan=False),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, step: int) -> None:
        """Continue at a checkpoint's step, which supersedes the run's readings from that step on."""
        self._tokens_seen = {site: (pair[0], pair[1]) for site, pair in json.loads(state["tokens_seen"]).items()}
        self._go_on_at(step)
        self.samples = self._new_samples()
        if "samples" in state:
            self.samples.load_state_dict(state["samples"])
        detector = json.loads(state.get("detector", "null"))
        if detector is not None:
            self._detector.load_state_dict(detector)
        else:
            self._detector.restart(partial(self._before, step))

    def close(self, *, step: int) -> None:
        """Close the trackers and the run log (safe to call twice)."""
        self._trackers.close()
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.event("close", step=step)
        except OSError as error:
            self.warn("write", _cannot_write(writer, error))
        finally:
            writer.close()

    def _go_on_at(self, step: int) -> None:
        self.first_step = step
        if self._writer is not None and self._writer.last is not None:
            self._resume_at = step

    def _new_samples(self) -> SampleRecord:
        """Return an empty record, whose passes continue from the last reading before the first step."""
        before = 0.0
        for reading in self.past or ():
            if reading.site == self._main and reading.step < self.first_step and reading.passes is not None:
                before = reading.passes
        return SampleRecord(self._revisits, origin=float(self.first_step), before=before)

    def _before(self, step: int) -> list[Reading]:
        """Return the main site's readings before a step, from the resumed run and since then."""
        taken = [readings.main for readings in self.readings]
        recorded = [*(self.past or ()), *taken] if self._writer is None else open_run(self._writer.path).readings
        return [reading for reading in recorded if reading.site == self._main and reading.step < step]

    def _write(self, readings: Readings) -> None:
        if self._writer is None:
            return
        try:
            if self._resume_at is not None:
                self._writer.resume_at(self._resume_at)
                self._resume_at = None
            for reading in readings.values():
                self._writer.append(reading)
        except OSError as error:
            self._warn_of_writing(error)

    def _warn_of_writing(self, error: OSError) -> None:
        assert self._writer is not None
        self.warn("write", _cannot_write(self._writer, error))


def open_journal(
    run: str | os.PathLike[str] | None,
    meta: Mapping[str, Any],
    *,
    main: str,
    resume: bool = False,
    is_first: bool = True,
    history: int = 10_000,
    baseline: Baseline | None = None,
    regime: AskedRegime = "auto",
    thresholds: OverfitThresholds | None = None,
    trackers: object = None,
    revisits: int = TRACKED,
) -> Journal:
    """Open a journal that writes to a run folder and to trackers in the first of several training processes.

    Args:
        run: The folder. None keeps readings in memory only.
        meta: The content of run.json.
        main: The site that is judged.
        resume: Continue the run in that folder, or begin it if there is none.
        is_first: True if this process writes. The others judge the same readings, and write and show nothing.
        history: See `Journal`.
        baseline: See `Journal`.
        regime: See `Journal`.
        thresholds: See `Journal`.
        trackers: Names or objects, as `open_trackers()` takes them.
        revisits: See `Journal`.

    Raises:
        RunError: the folder holds a run and `resume` is False, or it is damaged or cannot be written.
        InputError: the regime or tracker is unknown.
        MissingExtraError: a tracker's package is not installed.
    """
    check_regime(regime)
    writer = RunWriter(run, meta, resume=resume) if run is not None and is_first else None
    try:
        opened = open_trackers(trackers, folder=None if run is None else Path(run)) if is_first else []
    except BaseException:
        if writer is not None:
            writer.close()
        raise
    past: list[Reading] | None = None
    if writer is not None and writer.resumed:
        past = list(open_run(writer.path).readings)
    elif run is not None and resume and not is_first and (Path(run) / "run.json").exists():
        past = list(open_run(run).readings)
    return Journal(
        writer,
        main=main,
        history=history,
        baseline=baseline,
        regime=regime,
        thresholds=thresholds,
        past=past,
        trackers=opened,
        revisits=revisits,
    )


def say(message: str) -> None:
    """Log a message to the logger "logalign", or print it on standard error if no logging is set up."""
    if log.hasHandlers():
        log.info(message)
    else:
        print(f"logalign: {message}", file=sys.stderr)


def _cannot_write(writer: RunWriter, error: OSError) -> str:
    return f"{writer.path}: readings cannot be written ({error}); training goes on without"
