"""Write one self-contained HTML page: text, tables and figures, with nothing loaded from anywhere.

The page is static: it inlines figures as SVG and has no script. A content security policy in the page enforces this,
so that a run's name or settings can never run as code. The demos tell a story on this page. `interactive` writes the
page of `logalign report`, at the price of two megabytes of script.
"""

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING

from logalign.common.version import __version__
from logalign.errors import InputError, MissingExtraError
from logalign.report.figures import house_style

try:
    import jinja2
except ImportError as error:
    raise MissingExtraError('reports need jinja2: pip install "logalign[report]"') from error

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Section:
    """One part of a page: a heading, its text, and below it a figure, a table or both.

    Args:
        heading: the section's heading.
        text: plain text. A blank line begins a new paragraph. A paragraph that begins with "- " is a list, with an item
            at every line that begins so.
        figure: drawn below the text.
        table: one mapping a row. The columns are the keys in the order of their first appearance.
        alt: the figure in words, for people who cannot see it. The default is the label that the figure carries.
    """

    heading: str
    text: str
    figure: "Figure | None" = None
    table: list[dict[str, object]] | None = None
    alt: str = ""


def write_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    lead: str,
    sections: Sequence[Section],
    facts: Mapping[str, str],
) -> Path:
    """Write a page and return its path.

    Args:
        path: the HTML file. Missing folders are made, and an older file is replaced in one step.
        title: the page's title and first heading.
        lead: the answer in words, one or two paragraphs under the title.
        sections: in order.
        facts: name and value, shown as a list after the sections.

    Raises:
        InputError: the file cannot be written.
    """
    shown = [
        {
            "heading": section.heading,
            "blocks": _blocks(section.text),
            "svg": None if section.figure is None else _svg(section.figure, f"f{i}"),
            "alt": _alt(section),
            "table": _table(section.table),
        }
        for i, section in enumerate(sections)
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((files("logalign.report") / "page.html").read_text(encoding="utf-8"))
    html = template.render(title=title, lead=_blocks(lead), sections=shown, facts=dict(facts), version=__version__)
    return _replace(Path(path), html)


def _alt(section: Section) -> str:
    label = "" if section.figure is None else str(section.figure.get_label())
    return section.alt or label or section.heading


def _blocks(text: str) -> list[dict[str, object]]:
    """Split plain text into paragraphs and lists."""
    blocks: list[dict[str, object]] = []
    for part in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in part.splitlines() if line.strip()]
        if not lines:
            continue
        if lines[0].startswith("- "):
            items = re.split(r"\n- ", "\n".join(lines).removeprefix("- "))
            blocks.append({"list": True, "lines": items})
        else:
            blocks.append({"list": False, "lines": lines})
    return blocks


def _svg(figure: "Figure", prefix: str) -> str:
    """Render a figure to SVG with ids that are unique on the page.

    Matplotlib numbers ids anew in every figure. An HTML document with two equal ids shows the first one's shapes
    twice.
    """
    buffer = io.StringIO()
    with house_style():
        # No date and no creator: the same run gives the same bytes.
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)


def _table(rows: list[dict[str, object]] | None) -> dict[str, object] | None:
    if not rows:
        return None
    header = list(dict.fromkeys(key for row in rows for key in row))
    numeric = [all(_is_number(row.get(key)) or row.get(key) is None for row in rows) for key in header]
    body = [list(zip([_cell(row.get(key)) for key in header], numeric, strict=True)) for row in rows]
    return {"header": list(zip(header, numeric, strict=True)), "body": body}


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _cell(value: object) -> str:
    """Format a table cell: four significant digits, an en dash for a missing value."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{int(value):,}"
    if isinstance(value, Real):
        number = float(value)
        if not math.isfinite(number):
            return "–" if math.isnan(number) else str(number)
        return f"{number:.4g}" if abs(number) < 10_000 else f"{number:,.0f}"
    return str(value)


def _replace(path: Path, text: str) -> Path:
    """Write beside the target and move the file over it, so that no reader sees half a page."""
    if path.is_dir():
        raise InputError(f"expected a file to write the report to; {path} is a folder: give a name such as report.html")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place for the report") from error
    return path
