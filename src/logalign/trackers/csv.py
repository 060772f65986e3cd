"""CSV: one line a reading, in a file that any program reads.

Method: the file has a column for each name, and one write appends a line. A name that appears later, such as a held-out
loss, adds a column: the tracker then writes a new file beside the old one and moves it into place. The alternative, a
line for each number, only ever appends, but is longer and no table.
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from logalign.diagnosis.verdict import Verdict
from logalign.errors import RunError

FILE = "metrics.csv"
FILE_WITHOUT_RUN = "logalign-metrics.csv"
FIRST = ("step", "time")


def open_tracker(folder: Path | None) -> CsvTracker:
    """Return a tracker that appends to `metrics.csv` in the run folder, or to `logalign-metrics.csv` here.

    Raises:
        RunError: the file cannot be written, or is another table.
    """
    path = Path(FILE_WITHOUT_RUN) if folder is None else folder / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return CsvTracker(path)
    except OSError as error:
        raise RunError(f"{path}: expected a file that can be written, found: {error}") from error


class CsvTracker:
    """Appends readings to a CSV file with columns `step`, `time` (seconds since the epoch) and the names.

    Existing lines stay. Where steps go back, a training resumed or began anew, and the later lines supersede earlier
    ones with the same step or a higher one.

    Args:
        path: The file, created if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns = list(FIRST)
        self._file: int | None = None
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole:
            self._columns = next(csv.reader(io.StringIO(whole)))
            if tuple(self._columns[: len(FIRST)]) != FIRST:
                raise RunError(
                    f"{path}: expected a table that begins with {', '.join(FIRST)}, found {', '.join(self._columns)}; "
                    "move it away"
                )
        if whole != text:  # a full disk left the last line unfinished
            self._replace(whole)
        self._open()

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Append one step's line."""
        assert self._file is not None
        new = [name for name in values if name not in self._columns]
        if new or not os.fstat(self._file).st_size:
            self._grow(new)
        self._append([step, time.time(), *(values.get(name, "") for name in self._columns[len(FIRST) :])])

    def tell(self, verdict: Verdict) -> None:
        """Do nothing: the verdict's code is a column."""

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o666)

    def _grow(self, new: list[str]) -> None:
        rows = list(csv.reader(io.StringIO(self.path.read_text(encoding="utf-8"))))[1:] if self.path.is_file() else []
        columns = [*self._columns, *new]
        self.close()
        if rows:
            self._replace(_text([columns, *(row + [""] * (len(columns) - len(row)) for row in rows)]))
            self._open()
        else:
            self._open()
            self._append(columns)
        self._columns = columns

    def _replace(self, text: str) -> None:
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            draft.write_text(text, encoding="utf-8", newline="")
            draft.replace(self.path)
        finally:
            draft.unlink(missing_ok=True)

    def _append(self, cells: Iterable[object]) -> None:
        assert self._file is not None
        data = _text([cells]).encode()
        while data:
            data = data[os.write(self._file, data) :]


def _text(rows: Iterable[Iterable[object]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()
