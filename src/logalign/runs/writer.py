"""Write a run as one folder of plain files that survives a killed process and that other programs can read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from logalign.errors import RunError
from logalign.runs.log import (
    AFTER_TORN_LINE,
    EVENTS,
    META,
    READINGS,
    SCHEMA_VERSION,
    SPECTRA,
    ends_in_torn_line,
    read_meta,
)
from logalign.runs.reading import Reading
from logalign.runs.remote import is_remote, shown
from logalign.runs.run import open_run


class RunWriter:
    """Appends readings and events to a run folder.

    Args:
        path: The folder, created if it is missing.
        meta: The content of run.json, in addition to the schema version and the time.
        resume: Continue an existing run, if any. Otherwise an existing run is an error.

    Raises:
        RunError: a run exists and `resume` is False, it is damaged, or the folder cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], meta: Mapping[str, Any], *, resume: bool = False) -> None:
        if is_remote(path):
            raise RunError(
                f"{shown(str(path))}: expected a folder of this machine to write to, found a URL; record into a folder "
                "and copy it there"
            )
        self.path = Path(path)
        self.latest: dict[str, Reading] = {}
        self.last: Reading | None = None
        self._torn: set[str] = set()
        self._files: dict[str, int] = {}
        found = [name for name in (META, READINGS, EVENTS) if (self.path / name).exists()]
        if found and not resume:
            raise RunError(
                f"{self.path}: expected a new or empty folder, found a run ({', '.join(found)}); name another folder, "
                "or continue that run with resume=True"
            )
        self.resumed = META in found
        if found and not self.resumed:
            raise RunError(f"{self.path}: expected {META} to resume from, found only {', '.join(found)}")
        if self.resumed:
            readings = open_run(self.path).readings
            self.latest = {reading.site: reading for reading in readings}
            self.last = readings[-1] if readings else None
            self.meta = read_meta(self.path)
        else:
            self.meta = {"schema_version": SCHEMA_VERSION, "created": time.time(), **meta}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_meta()
            for name in (READINGS, EVENTS):
                self._files[name] = os.open(self.path / name, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o666)
                if ends_in_torn_line(self._files[name]):
                    self._torn.add(name)
        except OSError as error:
            self.close()
            raise RunError(f"{self.path}: expected a folder that can be written, found: {error}") from error
        if not self.resumed:
            self.event("start")

    def resume_at(self, step: int) -> None:
        """Record that training continues at `step`, which supersedes earlier readings from that step on."""
        if READINGS in self._torn:
            if ends_in_torn_line(self._files[READINGS]):
                self._append(READINGS, "\n")
            self._torn.discard(READINGS)
        self.event("resume", step=step, readings_offset=os.fstat(self._files[READINGS]).st_size)

    def describe(self, **entries: Any) -> None:
        """Add later facts, such as the sites, to run.json, and replace the file in one move."""
        self.meta = {**self.meta, **entries}
        self._write_meta()

    def append(self, reading: Reading) -> None:
        """Write one reading as one line with one write."""
        if READINGS in self._torn:
            # A resume marks the place, because only the last line before a resume may be torn.
            self.resume_at(reading.step)
        self._append(READINGS, reading.line())
        self.last = self.latest[reading.site] = reading

    def spectra(self, step: int, site: str, **vectors: np.ndarray[Any, Any]) -> None:
        """Add a site's p and q to the step's safetensors file, and replace the file in one move."""
        from safetensors.numpy import load_file, save_file

        folder = self.path / SPECTRA
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{step:08d}.safetensors"
        arrays = load_file(path) if path.exists() else {}
        draft = path.with_suffix(".draft")
        save_file(arrays | {f"{site}.{name}": vector for name, vector in vectors.items()}, draft)
        draft.replace(path)

    def event(self, event: str, **entries: Any) -> None:
        """Write one event with its time."""
        record = {"event": event, "time": time.time(), **entries}
        end_of_torn_line = ""
        if EVENTS in self._torn:
            record[AFTER_TORN_LINE] = True
            end_of_torn_line = "\n" if ends_in_torn_line(self._files[EVENTS]) else ""
        self._append(EVENTS, end_of_torn_line + json.dumps(record, allow_nan=False) + "\n")
        self._torn.discard(EVENTS)

    def close(self) -> None:
        """Close the files (safe to call twice)."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _append(self, name: str, line: str) -> None:
        data = line.encode()
        try:
            while data:
                data = data[os.write(self._files[name], data) :]
        except OSError:  # half a line may be there, as after a kill
            self._torn.add(name)
            raise

    def _write_meta(self) -> None:
        draft = self.path / f".{META}.{os.getpid()}"
        try:
            draft.write_text(json.dumps(self.meta, indent=2, allow_nan=False) + "\n")
            draft.replace(self.path / META)
        except (TypeError, ValueError) as error:
            draft.unlink(missing_ok=True)
            raise RunError(f"{self.path}: expected settings that strict JSON can hold, found: {error}") from error
