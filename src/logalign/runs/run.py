"""The run log: one folder of plain files that survives a killed process and that other programs can read and write.

Method: every reading is one line, appended with one write. A database would check more, and would not work on the
shared file systems of clusters. docs/run-format.md specifies the files.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from logalign.common import markup
from logalign.errors import InputError, LogAlignError, RunError
from logalign.runs.foreign.formats import FORMATS, is_log_file, reader_of
from logalign.runs.reading import (
    ENERGY_NAMES,
    FIELDS,
    FORMS,
    INTEGER_FIELDS,
    TEXT_FIELDS,
    UNEMBEDDING,
    Reading,
    never_tried,
    reading_of_record,
)
from logalign.runs.remote import NOTHING_THERE, fetch, fetch_folder, hint_of, is_remote, shown

SCHEMA_VERSION = 1
AFTER_TORN_LINE = "after_torn_line"
META, READINGS, EVENTS, SPECTRA = "run.json", "readings.jsonl", "events.jsonl", "spectra"
SHOWN_AT_ONCE = 16_000_000
"""Bytes of a log that a notebook reads only to show a run."""
RUN_FILES = (META, EVENTS, READINGS)
"""Events before readings: a resume says how many readings were there before it."""


@dataclass(frozen=True)
class Run:
    """A run that was logged: its description, its readings and its events.

    Attributes:
        path: The run folder, the file, or what another tool recorded; a copy on this machine, if it lies elsewhere.
        meta: What run.json says; empty where there is none.
        location: The URL that it was read from; empty for a path of this machine.
    """

    path: Path
    meta: Mapping[str, Any]
    location: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        """The path, or the URL without its secrets."""
        return shown(self.location) if self.location else str(self.path)

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """Start, resumes, warnings and close, in order."""
        path = self.path / EVENTS
        with _named(self.path, self.location):
            return [event for _, event in _objects(path)] if self.path.is_dir() and path.exists() else []

    @cached_property
    def readings(self) -> list[Reading]:
        """All readings, in order, without those that a resume has superseded.

        Raises:
            RunError: a line is damaged that is not the last before a kill.
        """
        with _named(self.path, self.location):
            return self._read()

    def _read(self) -> list[Reading]:
        if not (self.path / META).exists() and (read := reader_of(self.path)) is not None:
            return read(self.path)
        if self.path.is_file():
            return _file_readings(self.path)
        path = self.path / READINGS
        if not path.exists():
            return []
        resumes = self._resumes()
        kept: list[Reading] = []
        for step, part in zip([None, *(step for step, _ in resumes)], _parts(path, resumes), strict=True):
            if step is not None:
                kept = [reading for reading in kept if reading.step < step]
            kept.extend(_reading(path, number, record) for number, record in part)
        return kept

    @cached_property
    def spectra_folder(self) -> Path:
        """Where the spectra are; copied from a URL when it is first asked for. It is not there if none were taken."""
        folder = self.path / SPECTRA
        if self.location and (self.path / META).exists():
            fetch_folder(f"{self.location.rstrip('/')}/{SPECTRA}", folder)
        return folder

    def _resumes(self) -> list[tuple[int, int]]:
        """Step and offset into the log of each resume."""
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
        """The readings as NumPy columns of one length, which pandas.DataFrame and polars.DataFrame take as they are.

        Args:
            site: One site's readings only; all by default.

        Undefined numbers are NaN; whole-number columns are int64 where none is missing; texts that are null are empty.
        Energies stand as energy_weight, energy_input, energy_output; standard errors, where there are any, as
        lar_error, lar_centered_error and so on; values passed to `step()` under their own names.
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
        """The run's curves as a plotly Figure: LAR, k and losses; `logalign.notebook.plot` says more.

        Args:
            site: The layer; the run's main one by default.

        Raises:
            MissingExtraError: plotly is not installed.
            InputError: no readings of that layer.
            RunError: the run is damaged.
        """
        return import_module("logalign.notebook").plot(self, site=site)

    def _repr_html_(self) -> str:
        """What a notebook shows; a damaged run says so."""
        log = self.path if self.path.is_file() else self.path / READINGS
        if "readings" not in self.__dict__ and log.is_file() and log.stat().st_size > SHOWN_AT_ONCE:
            size = f"{log.stat().st_size / 1e6:,.0f} MB, not read yet; .readings reads them"
            return markup.card(f"Run {self.name}", markup.facts({"readings": size}))
        try:
            readings = self.readings
        except LogAlignError as error:
            return markup.card(f"Run {self.name}", markup.text("damaged:", str(error)))
        if not readings:
            return markup.card(f"Run {self.name}", markup.facts({"readings": "none yet"}))
        sites = list(dict.fromkeys(reading.site for reading in readings))
        named = self.meta.get("main", UNEMBEDDING)
        main = [reading for reading in readings if reading.site == (named if named in sites else sites[0])]
        last = main[-1]
        known = [reading for reading in main if reading.lar is not None]
        facts = {
            "layer": f"{last.site} (m = {markup.number(last.m, ',')}, n = {markup.number(last.n, ',')})",
            "readings": f"{len(main):,}, steps {main[0].step:,} to {last.step:,}",
            "LAR": f"{markup.number(last.lar)} at the last" + (f" ({last.reason})" if last.reason else ""),
        }
        others = {"LAR, centered": last.lar_centered, "k": last.effective_dim, "loss": last.loss}
        facts |= {name: markup.number(value) for name, value in others.items() if value is not None}
        if last.drift is not None:
            facts["drift"] = f"{markup.measured(last.drift, last.drift_error)} nats a pass"
        is_without_lar = all(never_tried(reading) for reading in main)
        if len(known) < len(main) and not is_without_lar:
            facts["undefined"] = f"{len(main) - len(known):,} readings"
        if len(sites) > 1:
            facts["other layers"] = f"{len(sites) - 1:,}"
        steps = [reading.step for reading in main]
        drawn = [
            markup.Drawn("LAR", markup.BLUE, steps, [reading.lar for reading in main]),
            markup.Drawn("centered", markup.ORANGE, steps, [reading.lar_centered for reading in main]),
        ]
        if is_without_lar:
            held_out = [(reading.step, reading.extra.get("val_loss")) for reading in main]
            held_out = [each for each in held_out if each[1] is not None]
            drawn = [
                markup.Drawn("loss", markup.BLUE, steps, [reading.loss for reading in main]),
                markup.Drawn("held out", markup.ORANGE, [step for step, _ in held_out], [loss for _, loss in held_out]),
            ]
        shown = [each for each in drawn if any(value is not None for value in each.y)]
        return markup.card(f"Run {self.name}", markup.facts(facts), markup.curves(shown, x_name="step"))


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open what was recorded: a run folder, a JSONL or CSV file with columns `step` and `lar`, or another tool's log.

    Of a log without LAR, one that has losses and a step or an epoch, the readings have no LAR and the reason for it.

    A URL that fsspec knows, such as s3://bucket/run, is copied into a temporary folder, as it is now; docs/compare.md
    says what of it and how credentials are given. Nothing is ever written there.

    The other tools are TensorBoard, W&B (offline runs, exports), MLflow (local stores), Transformers' Trainer, and what
    writes tables or JSON; docs/run-format.md says what is given for each, and which names are taken.

    Raises:
        RunError: nothing there, not a run, damaged, or written by a later version of the format; a URL that cannot be
            read.
        MissingExtraError: a log of TensorBoard or W&B, or a URL, and the package that reads it is not installed.

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
            return Run(path, _read_meta(path), location)
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


class RunWriter:
    """Appends readings and events to a run folder.

    Args:
        path: The folder; made if it is not there.
        meta: What run.json is to say, beside the schema version and the time.
        resume: Continue the run that is there, if any. Otherwise a run that is there is an error.

    Raises:
        RunError: a run is there and `resume` is False, it is damaged, or the folder cannot be written.
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
            self.meta = _read_meta(self.path)
        else:
            self.meta = {"schema_version": SCHEMA_VERSION, "created": time.time(), **meta}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_meta()
            for name in (READINGS, EVENTS):
                self._files[name] = os.open(self.path / name, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o666)
                if _ends_in_torn_line(self._files[name]):
                    self._torn.add(name)
        except OSError as error:
            self.close()
            raise RunError(f"{self.path}: expected a folder that can be written, found: {error}") from error
        if not self.resumed:
            self.event("start")

    def resume_at(self, step: int) -> None:
        """Say that training goes on at `step`: readings from that step on, written before, are superseded."""
        if READINGS in self._torn:
            if _ends_in_torn_line(self._files[READINGS]):
                self._append(READINGS, "\n")
            self._torn.discard(READINGS)
        self.event("resume", step=step, readings_offset=os.fstat(self._files[READINGS]).st_size)

    def describe(self, **entries: Any) -> None:
        """Add to run.json what was learned later, such as the sites; the file is replaced in one move."""
        self.meta = {**self.meta, **entries}
        self._write_meta()

    def append(self, reading: Reading) -> None:
        """Write one reading: one line, one write."""
        if READINGS in self._torn:
            # A resume marks the place: the last line before it may be torn, any other line may not.
            self.resume_at(reading.step)
        self._append(READINGS, reading.line())
        self.last = self.latest[reading.site] = reading

    def spectra(self, step: int, site: str, **vectors: np.ndarray[Any, Any]) -> None:
        """Add a site's p and q to the step's safetensors file, which is replaced in one move."""
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
            end_of_torn_line = "\n" if _ends_in_torn_line(self._files[EVENTS]) else ""
        self._append(EVENTS, end_of_torn_line + json.dumps(record, allow_nan=False) + "\n")
        self._torn.discard(EVENTS)

    def close(self) -> None:
        """Close the files; safe to call twice."""
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


@contextmanager
def _named(path: Path, location: str) -> Iterator[None]:
    """In errors, call a copy by the URL that it was made of."""
    try:
        yield
    except LogAlignError as error:
        if not location or str(path) not in str(error):
            raise
        raise type(error)(str(error).replace(str(path), shown(location))) from error


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META
    try:
        meta = json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{folder}: expected a run folder, found no {META} in it") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: expected a JSON object, found damage: {error}") from error
    version = meta.get("schema_version") if isinstance(meta, dict) else None
    if not isinstance(version, int):
        raise RunError(f"{path}: expected an object with a whole number schema_version, found {version!r}")
    if version > SCHEMA_VERSION:
        raise RunError(
            f"{path}: expected schema version {SCHEMA_VERSION} or earlier, found {version}; upgrade logalign"
        )
    return dict(meta)


def _ends_in_torn_line(file: int) -> bool:
    """Whether a process that was killed, or a full disk, has left half a line."""
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"


def _objects(path: Path, start: int = 0, end: int | None = None) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of a part of a JSONL file whose last line may be torn, and such as are marked so."""
    data = path.read_bytes()
    first_line = data.count(b"\n", 0, start) + 1
    found = []
    damage: RunError | None = None
    damaged_lines = 0
    for number, line in enumerate(data[start:end].splitlines(), first_line):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(f"not an object but {type(value).__name__}")
        except ValueError as error:
            damaged_lines += 1
            damage = damage or RunError(
                f"{path}, line {number}: expected a JSON object, found damage ({error}); repair or remove that line"
            )
            continue
        if damage is not None and not value.get(AFTER_TORN_LINE):
            raise damage
        damage, damaged_lines = None, 0
        found.append((number, value))
    if damage is not None and damaged_lines > 1:
        raise damage
    return found


def _parts(path: Path, resumes: Iterable[tuple[int, int]]) -> list[list[tuple[int, dict[str, Any]]]]:
    """The lines of the log between resumes, which are given by step and offset."""
    offsets = [offset for _, offset in resumes]
    return [_objects(path, start, end) for start, end in zip([0, *offsets], [*offsets, None], strict=True)]


def _reading(path: Path, number: int, record: Mapping[str, Any]) -> Reading:
    try:
        return reading_of_record(record)
    except InputError as error:
        raise RunError(f"{path}, line {number}: {error}") from error


def _file_readings(path: Path) -> list[Reading]:
    read: Callable[[Path], Iterable[tuple[int, Mapping[str, Any]]]]
    read = _csv_records if path.suffix.lower() in (".csv", ".tsv") else _objects
    try:
        return [_reading(path, number, record) for number, record in read(path)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path}: expected text in JSONL or CSV form, found: {error}") from error


def _csv_records(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        for row in rows:
            yield rows.line_num, {name.strip(): _cell(name.strip(), text) for name, text in row.items() if name}


def _cell(name: str, text: str | None) -> Any:
    text = "" if text is None else text.strip()
    if not text:
        return None
    if name in TEXT_FIELDS:
        return text
    try:
        return float(text)
    except ValueError:
        return text


def _floats(values: Iterable[float | None]) -> np.ndarray[Any, Any]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
