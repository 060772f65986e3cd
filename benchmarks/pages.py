"""Tables of benchmarks: printed for people, and put into the pages of docs/ between two markers."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

Rows = Sequence[Mapping[str, str]]


def markdown(rows: Rows, *, numbers: bool = False) -> str:
    """A Markdown table. All columns but the first are right-aligned where they hold numbers."""
    header = list(rows[0])
    align = ["---" if i == 0 or not numbers else "---:" for i in range(len(header))]
    lines = [header, align, *([row[name] for name in header] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured_here(*what: str) -> str:
    """Date, machine and versions in one line, to stand above a table of timings."""
    here = (str(datetime.date.today()), f"{os.cpu_count()} cores", platform.machine(), *what)
    return f"*{', '.join(here)}*"


def show(rows: Rows, *, title: str | None = None, width: int | None = None) -> None:
    """Print a table on the terminal."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*row.values())
    Console(width=width).print(table)


def put(page: Path, part: str, text: str) -> None:
    """Replace what stands between a page's markers, `<!-- begin: PART -->` and `<!-- end: PART -->`.

    Raises:
        SystemExit: the page lacks the markers.
    """
    page.write_text(replaced(page, page.read_text(), part, text))


def replaced(page: Path, content: str, part: str, text: str) -> str:
    """The content of a page with another text between the markers of a part.

    Raises:
        SystemExit: the content lacks the markers.
    """
    begin, end = f"<!-- begin: {part} -->", f"<!-- end: {part} -->"
    between = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not between.search(content):
        raise SystemExit(f"{page}: expected the markers {begin} and {end}, found none")
    return between.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", content)
