"""Read what was added to a run since the last look, from any writer, on any disk.

Method: each look asks the file system for sizes, and reads only what lies behind the offset of the look before. No file
stays open between looks, so that a shared disk's server may come and go. The alternative, the kernel's notifications,
misses what another machine writes.

Another tool's log is read anew, as a whole, whenever one of its files changes.

Anything other than plain growth makes a look read from the beginning: a replaced or cut file, a line that was taken as
whole and then went on, a resume that supersedes readings already given. At every moment the readings given since the
last restart equal those of `open_run(path).readings`, errors included. For CSV files, they equal those of whole lines.
"""

from __future__ import annotations

import copy
import csv
import errno
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from logalign.errors import InputError, RunError
from logalign.runs.foreign.formats import is_log_file, reader_of
from logalign.runs.foreign.rows import printable
from logalign.runs.log import AFTER_TORN_LINE, EVENTS, META, READINGS
from logalign.runs.reading import TEXT_FIELDS, Reading, reading_of_record
from logalign.runs.run import open_run

BLOCK = 1 << 20
"""Maximum bytes of one look, so that a long run comes in pieces."""
REMEMBERED = 64
TABLES = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True, kw_only=True)
class Grown:
    """The result of one look.

    Attributes:
        readings: New ones, in order, without those that a resume has superseded.
        events: New ones.
        restarted: True if all earlier results are void and these are the first again.
        done: Bytes of the readings that have been read.
        behind: Bytes that exist and were not read yet.
        waiting: Why there is nothing to read: no run exists yet, or no longer. None where one exists.
    """

    readings: list[Reading] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    restarted: bool = False
    done: int = 0
    behind: int = 0
    waiting: str | None = None


class Tail:
    """Follows a run folder, a JSONL or CSV file with columns `step` and `lar`, or another tool's log.

    Args:
        path: Where it is or will be.

    Attributes:
        meta: The contents of run.json at the last look, empty where there is none.

    Example:
        >>> Tail("no/such/run").look().waiting
        'nothing is there yet'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.meta: Mapping[str, Any] = {}
        self._had = False
        self._reset()

    def look(self, most: int = BLOCK) -> Grown:
        """Read what was added, about `most` bytes at most.

        An error changes nothing, and the next look begins where this one did.

        Raises:
            RunError: no run of logalign, damaged, or of a later version.
            OSError: the disk did not answer. A later look may succeed.
        """
        state = copy.deepcopy(self.__dict__)
        try:
            try:
                return self._look(most)
            except _ChangedError:
                self._reset()
                return replace(self._look(most), restarted=True)
        except (_ChangedError, OSError, RunError) as error:
            self.__dict__.update(state)
            if isinstance(error, RunError):
                raise RunError(printable(str(error))) from error
            if isinstance(error, _ChangedError):
                raise OSError(errno.EAGAIN, "it changes while it is read", str(self.path)) from error
            raise

    def _reset(self) -> None:
        self._lines = _Lines()
        self._events = _Lines()
        self._meta_stamp: tuple[int, ...] | None = None
        self._resumes: list[tuple[int, int]] = []
        self._passed = 0  # number of resumes before what was read
        self._highest = -1  # highest step given
        self._table: list[str] | None = None
        self._foreign: tuple[tuple[int, ...], ...] | None = None  # last stamps of another tool's files
        self._given: list[Reading] = []  # readings of another tool's log

    def _look(self, most: int) -> Grown:
        why = self._missing()
        if why is not None:
            return Grown(waiting=why)
        if (read := self._reader()) is not None:
            return self._anew(read)
        self._had = True
        if self.path.is_dir():
            return self._folder(most)
        readings, behind = self._rows(most) if self.path.suffix.lower() in TABLES else self._objects(self.path, most)
        return Grown(readings=readings, done=self._lines.offset, behind=behind)

    def _missing(self) -> str | None:
        """Return why there is nothing to read."""
        gone = "it is gone" if self._had else "nothing is there yet"
        try:
            is_folder = (self.path.stat().st_mode & 0o170000) == 0o040000
        except (FileNotFoundError, NotADirectoryError):
            return gone
        if not is_folder:
            if not self._had and self.path.stat().st_size == 0:
                return "the file is empty yet"
            return None
        try:
            (self.path / META).stat()
        except FileNotFoundError:
            if self._had:
                if self._foreign is None:
                    return f"its {META} is gone"
                return gone if reader_of(self.path) is None else None
            found = sorted(each.name for each in self.path.iterdir() if not each.name.startswith("."))
            if not found:
                return f"the folder is empty yet, without {META}"
            if reader_of(self.path) is not None:
                return None
            names = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
            raise RunError(f"{self.path}: expected a run folder, found no {META} in it, but {names}") from None
        return None

    def _reader(self) -> Callable[[Path], list[Reading]] | None:
        """Return the reader of another tool's log, or None for a run of logalign."""
        if self._had and self._foreign is None:
            return None
        return None if (self.path / META).exists() else reader_of(self.path)

    def _anew(self, read: Callable[[Path], list[Reading]]) -> Grown:
        files = [self.path] if self.path.is_file() else sorted(self.path.rglob("*"))
        logs = [each for each in files if each == self.path or is_log_file(each.relative_to(self.path).as_posix())]
        stamps = tuple(_stamp(each.stat()) for each in logs)
        if stamps == self._foreign:
            return Grown(done=1)
        readings, before = read(self.path), self._given
        self._had, self._foreign, self._given = True, stamps, readings
        if readings[: len(before)] == before:
            return Grown(readings=readings[len(before) :], done=1)
        return Grown(readings=readings, restarted=True, done=1)

    def _folder(self, most: int) -> Grown:
        stamp = _stamp(os.stat(self.path / META))
        if stamp != self._meta_stamp:
            self.meta = open_run(self.path).meta
            self._meta_stamp = stamp
        # The events read below hold every resume that precedes what lies before this size.
        log = self.path / READINGS
        try:
            size = os.stat(log).st_size
        except FileNotFoundError:
            size = 0
        events = [event for _, event in self._events.read(self.path / EVENTS)]
        for event in events:
            if event.get("event") == "resume":
                self._resume(event)
        readings, behind = self._objects(log, most, end=size)
        return Grown(readings=readings, events=events, done=self._lines.offset, behind=behind)

    def _resume(self, event: Mapping[str, Any]) -> None:
        step, offset = event.get("step"), event.get("readings_offset")
        if type(step) is not int or type(offset) is not int:
            raise RunError(
                f"{self.path / EVENTS}: expected a resume event with whole numbers step and readings_offset, "
                f"found {json.dumps(event)}; repair or remove that line"
            )
        if offset < self._lines.given or self._highest >= step:
            raise _ChangedError
        self._resumes.append((step, offset))

    def _objects(self, path: Path, most: int, end: int | None = None) -> tuple[list[Reading], int]:
        """Return new readings of a JSONL file, and how many bytes remain."""
        given: list[Reading] = []
        while True:
            boundary = self._resumes[self._passed][1] if self._passed < len(self._resumes) else None
            superseded = min((step for step, _ in self._resumes[self._passed :]), default=None)
            for number, record in self._lines.read(path, most=most, end=end, boundary=boundary):
                reading = _reading(path, number, record)
                if superseded is None or reading.step < superseded:
                    given.append(reading)
                    self._highest = max(self._highest, reading.step)
            if boundary is None or self._lines.offset < boundary:
                return given, self._lines.behind
            self._passed += 1

    def _rows(self, most: int) -> tuple[list[Reading], int]:
        """Return new readings of a CSV file, from whole lines only, because half a number looks like a number."""
        text = self._lines.text(self.path, most)
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=TABLES[self.path.suffix.lower()], strict=False)
        readings = []
        try:
            for row in rows:
                if not row:
                    continue
                if self._table is None:
                    self._table = [name.strip() for name in row]
                    continue
                record = {name: _cell(name, cell) for name, cell in zip(self._table, row, strict=False) if name}
                readings.append(_reading(self.path, self._lines.line - text.count("\n") + rows.line_num - 1, record))
        except csv.Error as error:
            raise RunError(f"{self.path}: expected text in JSONL or CSV form, found: {error}") from error
        return readings, self._lines.behind


class _ChangedError(Exception):
    """The bytes read before have changed."""


@dataclass
class _Lines:
    """The position in one growing file of lines.

    Attributes:
        offset: Bytes that are done. A line without an end yet is not.
        line: Number of the line that begins there.
        behind: Bytes that exist and were not read.
        whole: A last line that was given before its end was there.
        damage: A damaged line that may be the last of a killed process.
        damaged: Number of damaged lines at the end.
        mark: The last bytes before the offset, which distinguish growth from replacement.
        stamp: The file system's answer at the last look.
    """

    offset: int = 0
    line: int = 1
    behind: int = 0
    whole: bytes = b""
    damage: str | None = None
    damaged: int = 0
    mark: bytes = b""
    stamp: tuple[int, ...] | None = None

    @property
    def given(self) -> int:
        """Number of bytes whose lines have been given."""
        return self.offset + len(self.whole)

    def read(
        self, path: Path, *, most: int | None = None, end: int | None = None, boundary: int | None = None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (line number, object) of what was added.

        Args:
            path: The file. A missing file counts as empty.
            most: Maximum bytes to read, by default all. A longer line is read whole.
            end: Where to stop for now.
            boundary: Where a killed process stopped. The line before may be torn.
        """
        block, reaches_end = self._block(path, most, end, boundary)
        at_boundary = boundary is not None and self.offset + len(block) >= boundary
        done = block.rfind(b"\n") + 1
        for line in block[:done].splitlines():
            if self.whole:
                if line != self.whole:
                    raise _ChangedError
                self.whole = b""
            else:
                yield from self._object(path, self.line, line)
            self.line += 1
        rest = block[done:]
        if self.whole and rest.rstrip(b"\r") != self.whole:
            raise _ChangedError
        self._advance(block[:done])
        is_new = bool(rest) and not self.whole
        if at_boundary:
            if is_new:
                yield from self._object(path, self.line, rest)
            self._check_damage(0)
            self.whole, self.damage, self.damaged = b"", None, 0
            self._advance(rest)
        elif is_new and reaches_end:
            record, _ = _parsed(rest)
            if record is None:
                self._check_damage(1)
            else:
                yield from self._object(path, self.line, rest)
                self.whole = rest.rstrip(b"\r")
        else:
            self._check_damage(0)

    def text(self, path: Path, most: int) -> str:
        """Return what was added, in whole lines with balanced quotes only."""
        block, _ = self._block(path, most, None, None)
        done = block.rfind(b"\n") + 1
        if block[:done].count(b'"') % 2:
            done = 0
        try:
            text = block[:done].decode("utf-8-sig" if self.offset == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise RunError(f"{path}: expected text in JSONL or CSV form, found: {error}") from error
        self.line += block.count(b"\n", 0, done)
        self._advance(block[:done])
        return text

    def _block(self, path: Path, most: int | None, end: int | None, boundary: int | None) -> tuple[bytes, bool]:
        """Return the bytes behind the offset, and whether they reach the end of the file at the look."""
        try:
            found = os.stat(path)
        except FileNotFoundError:
            if self.offset or self.whole:
                raise _ChangedError from None
            return b"", True
        stamp = _stamp(found)
        stop = found.st_size if end is None else min(end, found.st_size)
        if self.stamp is not None and (self.stamp[:2] != stamp[:2] or found.st_size < self.given):
            raise _ChangedError
        if self.stamp == stamp and not self.behind and stop <= self.given and boundary is None:
            return self.whole, True
        size = stop if boundary is None else min(stop, boundary)
        length = max(0, size - self.offset)
        if most is not None:
            length = min(length, most)
        with path.open("rb") as file:
            file.seek(self.offset - len(self.mark))
            if file.read(len(self.mark)) != self.mark:
                raise _ChangedError
            block = file.read(length)
            while most is not None and len(block) == length < size - self.offset and b"\n" not in block:
                length = min(2 * length, size - self.offset)
                block += file.read(length - len(block))
        self.stamp = stamp
        self.behind = max(0, stop - self.offset - len(block))
        reaches_end = self.offset + len(block) >= size
        return block, reaches_end

    def _advance(self, done: bytes) -> None:
        self.offset += len(done)
        self.mark = (self.mark + done[-REMEMBERED:])[-REMEMBERED:]

    def _object(self, path: Path, number: int, line: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
        record, why = _parsed(line)
        if record is None:
            self.damaged += 1
            self.damage = self.damage or (
                f"{path}, line {number}: expected a JSON object, found damage ({why}); repair or remove that line"
            )
            return
        if self.damage is not None and not record.get(AFTER_TORN_LINE):
            raise RunError(self.damage)
        self.damage, self.damaged = None, 0
        yield number, record

    def _check_damage(self, torn: int) -> None:
        """Raise RunError for damage in any but the last line."""
        if self.damage is not None and self.damaged + torn > 1:
            raise RunError(self.damage)


def _parsed(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """Return the object of a line, or why it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return None, str(error)
    return (value, "") if isinstance(value, dict) else (None, f"not an object but {type(value).__name__}")


def _reading(path: Path, number: int, record: Mapping[str, Any]) -> Reading:
    try:
        return reading_of_record(record)
    except (InputError, OverflowError) as error:
        raise RunError(f"{path}, line {number}: {error}") from error


def _cell(name: str, text: str) -> Any:
    text = text.strip()
    if not text:
        return None
    if name in TEXT_FIELDS:
        return text
    try:
        return float(text)
    except ValueError:
        return text


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
