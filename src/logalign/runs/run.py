"""Open a recorded run: a run folder of logalign, a file of readings, or another tool's log."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from logalign.errors import InputError, LogAlignError, RunError
from logalign.runs.foreign.formats import FORMATS, is_log_file, reader_of
from logalign.runs.log import (
    EVENTS,
    META,
    READINGS,
    RUN_FILES,
    SPECTRA,
    file_readings,
    objects_of,
    parts_of,
    read_meta,
    reading_at,
)
from logalign.runs.reading import (
    ENERGY_NAMES,
    FIELDS,
    FORMS,
    INTEGER_FIELDS,
    TEXT_FIELDS,
    UNEMBEDDING,
    Reading,
)
from logalign.runs.remote import NOTHING_THERE, fetch, fetch_folder, hint_of, is_remote, shown


@dataclass(frozen=True)
class Run:
    """A recorded run with its description, readings and events.

    Attributes:
        path: The run folder, the file or another tool's log. It is a local copy for a URL.
        meta: The content of run.json. Empty where there is none.
        location: The URL of the run. Empty for a local path.
    """

    path: Path
    meta: Mapping[str, Any]
    location: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        """The path, or the URL without its secrets."""
        return shown(self.location) if self.location else str(self.path)

    @cached_property
    def main(self) -> str:
        """The run's main layer by the rule of `main_layer`, or the unembedding's name while there is none.

        Raises:
            InputError: several layers were measured, and none of them is the main one.
            RunError: the log is damaged.
        """
        sites = sorted({reading.site for reading in self.readings})
        return main_layer(sites, named=self.meta.get("main"), name=self.name)

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """Start, resumes, warnings and close, in order."""
        path = self.path / EVENTS
        with _named(self.path, self.location):
            return [event for _, event in objects_of(path)] if self.path.is_dir() and path.exists() else []

    @cached_property
    def readings(self) -> list[Reading]:
        """All readings in order, except those that a resume supersedes.

        Raises:
            RunError: a line other than the last before a kill is damaged.
        """
        with _named(self.path, self.location):
            return self._read()

    def _read(self) -> list[Reading]:
        if not (self.path / META).exists() and (read := reader_of(self.path)) is not None:
            return read(self.path)
        if self.path.is_file():
            return file_readings(self.path)
        path = self.path / READINGS
        if not path.exists():
            return []
        resumes = self._resumes()
        kept: list[Reading] = []
        for step, part in zip([None, *(step for step, _ in resumes)], parts_of(path, resumes), strict=True):
            if step is not None:
                kept = [reading for reading in kept if reading.step < step]
            kept.extend(reading_at(path, number, record) for number, record in part)
        return kept

    @cached_property
    def spectra_folder(self) -> Path:
        """The folder of spectra, copied from a URL on first use, and missing if none were computed."""
        folder = self.path / SPECTRA
        if self.location and (self.path / META).exists():
            fetch_folder(f"{self.location.rstrip('/')}/{SPECTRA}", folder)
        return folder

    def _resumes(self) -> list[tuple[int, int]]:
        """Return the step and the log offset of each resume."""
        found = []
        for event in self.events:
            if event.get("event") != "resume":
                continue
            step, offset = event.get("step"), event.get("readings_offset")
            if type(step) is not int or type(offset) is not int:
                raise RunError(
                    f"{self.path / EVENTS}: expected a resume event with whole numbers step and readings_offset, "
                    f"found {json.dumps(event)}; repair or remove that line"
                )
            found.append((step, offset))
        return found

    def columns(self, site: str | None = None) -> dict[str, np.ndarray[Any, Any]]:
        """Return the readings as NumPy columns of one length, as pandas.DataFrame and polars.DataFrame take them.

        Args:
            site: The site to read. The default is all sites.

        Undefined numbers are NaN. Whole-number columns are int64 where none is missing. Null texts are empty. Energies
        are named energy_weight, energy_input, energy_output. Standard errors, if any, are named lar_error,
        lar_centered_error and so on. Values passed to `step()` keep their names.
        """
        readings = [reading for reading in self.readings if site is None or reading.site == site]
        columns: dict[str, np.ndarray[Any, Any]] = {}
        for name in FIELDS:
            values = [getattr(reading, name) for reading in readings]
            if name == "energies":
                for energy in ENERGY_NAMES:
                    columns[f"energy_{energy}"] = _floats(each[energy] if each else None for each in values)
            elif name == "standard_errors":
                for form in FORMS if any(values) else ():
                    columns[f"{form}_error"] = _floats(each[form] if each else None for each in values)
            elif name in TEXT_FIELDS:
                columns[name] = np.array([value or "" for value in values], dtype=np.str_)
            elif name in (*INTEGER_FIELDS, "step") and None not in values:
                columns[name] = np.array(values, dtype=np.int64)
            else:
                columns[name] = _floats(values)
        for name in sorted({name for reading in readings for name in reading.extra}):
            columns[name] = _floats(reading.extra.get(name) for reading in readings)
        return columns

    def plot(self, *, site: str | None = None) -> Any:
        """Draw the run's LAR, k and losses as a plotly Figure (details in `logalign.notebook.plot`).

        Args:
            site: The layer. The default is the run's main layer.

        Raises:
            MissingExtraError: plotly is not installed.
            InputError: the layer has no readings.
            RunError: the run is damaged.
        """
        return import_module("logalign.notebook").plot(self, site=site)

    def _repr_html_(self) -> str:
        """Return the HTML for a notebook, also for a damaged run."""
        card: str = import_module("logalign.notebook").card(self)
        return card


RunLike = str | os.PathLike[str] | Run
"""A run, or its path or URL."""


def main_layer(
    sites: Collection[str], *, named: object = None, name: str = "readings", otherwise: str | None = None
) -> str:
    """Return the main layer of a run: the one in run.json, else the unembedding, else the only one.

    Args:
        sites: The layers with readings. Without any, the result is the unembedding's name.
        named: The value in run.json, of any type.
        name: The run's name, for the error.
        otherwise: The result in place of the error.

    Raises:
        InputError: several layers exist, and none of them is the main one.

    Example:
        >>> main_layer(["blocks.0", "head"], named="head"), main_layer(["head"]), main_layer(["unembedding", "head"])
        ('head', 'head', 'unembedding')
    """
    if isinstance(named, str) and named in sites:
        return named
    if UNEMBEDDING in sites or not sites:
        return UNEMBEDDING
    if len(sites) > 1:
        if otherwise is not None:
            return otherwise
        raise InputError(f"{name}: expected readings of one layer or of {UNEMBEDDING!r}, found {', '.join(sites)}")
    return next(iter(sites))


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a recorded run: a run folder, a JSONL or CSV file with columns `step` and `lar`, or another tool's log.

    A log without LAR needs losses and a step or an epoch. Its readings give the reason why they have no LAR.

    A URL that fsspec knows, such as s3://bucket/run, is copied in its present state into a temporary folder. The copied
    files and the credentials are described in docs/compare.md. The URL is never written to.

    The other tools are TensorBoard, W&B (offline runs, exports), MLflow (local stores), Transformers' Trainer, and all
    that write tables or JSON. docs/run-format.md lists the path to give for each, and the names that are read.

    Raises:
        RunError: the path or URL is missing, not a run, damaged, unreadable, or of a later version of the format.
        MissingExtraError: the package that reads a TensorBoard log, a W&B log or a URL is not installed.

    Example:
        >>> open_run("no/such/run")
        Traceback (most recent call last):
        ...
        logalign.errors.RunError: no/such/run: expected a run folder, a JSONL or a CSV file, found nothing there
    """
    if not is_remote(path):
        return _opened(Path(path))
    url = str(path)
    fetched = fetch(url, run_files=RUN_FILES, is_log_file=is_log_file)
    try:
        run = _opened(fetched.path, location=url if fetched.folder else "")
    except BaseException:
        if fetched.folder is not None:
            shutil.rmtree(fetched.folder, ignore_errors=True)
        raise
    if fetched.folder is not None:
        weakref.finalize(run, shutil.rmtree, fetched.folder, ignore_errors=True)
    return run


def _opened(path: Path, location: str = "") -> Run:
    with _named(path, location):
        if (path / META).exists():
            return Run(path, read_meta(path), location)
        if reader_of(path) is not None:
            run = Run(path, {}, location)
            assert run.readings, "a log without LAR was refused"
            return run
        if path.is_dir():
            raise RunError(f"{path}: expected a run folder, found no {META} in it, nor {FORMATS}")
        if path.is_file():
            run = Run(path, {}, location)
            if not run.readings:
                raise RunError(f"{path}: expected readings with columns 'step' and 'lar', found none")
            return run
        raise RunError(f"{path}: {NOTHING_THERE}{hint_of(path)}")


@contextmanager
def _named(path: Path, location: str) -> Iterator[None]:
    """Name the URL in errors instead of its local copy."""
    try:
        yield
    except LogAlignError as error:
        if not location or str(path) not in str(error):
            raise
        raise type(error)(str(error).replace(str(path), shown(location))) from error


def _floats(values: Iterable[float | None]) -> np.ndarray[Any, Any]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
