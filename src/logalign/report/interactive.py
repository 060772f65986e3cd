"""Write the interactive report: one HTML file that loads nothing, with the chart library and the numbers inside.

The library is plotly.js. It offers panels with hover, zoom and log axes that follow the page's colors. It is well
maintained and installs as a Python package, so this repository holds no copy. It is large: 4.8 MB. Packed with gzip and
base64 it is 2.0 MB, which the browser unpacks itself (DecompressionStream: Chrome 80, Firefox 113, Safari 16.4). A
smaller library would save 1.9 MB of a file that is sent once. It would cost the log axes, the heat map and the hover
over all curves, which this module would have to implement.

Every panel has a static figure (SVG) beside it for print, and for places where the script does not run: an older
browser, a mail preview, a stricter policy.

The content security policy names the hashes of the two scripts, ours and plotly's. Any other script, in a run's name or
settings, does not run even if escaping fails. The page can load nothing and send nothing.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from logalign.common.extras import load
from logalign.common.version import __version__
from logalign.diagnosis.outcome import SHOWN
from logalign.diagnosis.verdict import Verdict
from logalign.errors import InputError
from logalign.report.figures import house_style
from logalign.report.page import _blocks, _replace, _svg, _table
from logalign.report.panels import Panel, Tables, label

AXES = {
    "step": {"title": "step", "format": ",d"},
    "tokens": {"title": "tokens", "format": ".4s"},
    "epoch": {"title": "epoch", "format": ".3~f"},
}
DPI = 300


@dataclass(frozen=True, kw_only=True)
class Part:
    """A section of the report: heading, plain text in the format of `page.Section`, panels below it, a table."""

    heading: str
    text: str = ""
    panels: Sequence[Panel] = ()
    table: list[dict[str, object]] | None = None


@dataclass(frozen=True, kw_only=True)
class Card:
    """The verdict on one run."""

    verdict: Verdict
    name: str = ""
    notes: Sequence[str] = field(default=())


def write_interactive(
    path: str | os.PathLike[str],
    *,
    title: str,
    cards: Sequence[Card],
    parts: Sequence[Part],
    facts: Sequence[tuple[str, Mapping[str, str]]],
    tables: Tables,
) -> Path:
    """Write the page and return its path.

    Args:
        path: The HTML file. Missing folders are made, and an older file is replaced in one step.
        title: The page's title and first heading.
        cards: The verdicts, on top.
        parts: Sections in order.
        facts: Headings, and names and values below them, after the parts.
        tables: The numbers that the panels name.

    Raises:
        InputError: the file cannot be written.
        MissingExtraError: plotly is not installed.
    """
    library = plotly_script()
    script = (files("logalign.report") / "report.js").read_text(encoding="utf-8")
    panels = [panel.spec for part in parts for panel in part.panels]
    axes = [axis for axis in AXES if all(axis in table for table in tables.held.values())]
    data = {"tables": tables.held, "panels": panels, "axes": {axis: AXES[axis] for axis in axes}}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((files("logalign.report") / "report.html").read_text(encoding="utf-8"))
    html = template.render(
        title=title,
        cards=[_card(card) for card in cards],
        parts=[_part(part, i) for i, part in enumerate(parts)],
        facts=[(heading, dict(each)) for heading, each in facts],
        axes=axes,
        outcomes={outcome: shown.color for outcome, shown in SHOWN.items()},
        hashes=[content_hash(script), content_hash(library)],
        script=script,
        data=embedded_json(data),
        packed=packed(library),
        version=__version__,
    )
    return _replace(Path(path), html)


def write_figures(folder: str | os.PathLike[str], parts: Sequence[Part]) -> list[Path]:
    """Write each figure as PNG, at 300 dots an inch, and as SVG, and return the files.

    Raises:
        InputError: a file cannot be written.
    """
    folder = Path(folder)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for key, figure in _figures([panel for part in parts for panel in part.panels]).items():
            with house_style():
                for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                    target = folder / f"{key}.{suffix}"
                    figure.savefig(target, dpi=DPI, metadata=metadata)
                    written.append(target)
    except OSError as error:
        raise InputError(f"cannot write figures into {folder}: {error.strerror}; choose another folder") from error
    return written


def plotly_script() -> str:
    """Return the text of plotly.js from the installed package.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    offline = load("plotly.offline", extra="report", purpose="a report", supported="5.24,8")
    text: str = offline.get_plotlyjs()
    return text


def packed(text: str) -> str:
    """Pack a text as gzip in base64, with the same bytes for the same text."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode("ascii")


def content_hash(script: str) -> str:
    """Hash a script as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode('ascii')}'"


def embedded_json(data: object) -> str:
    """Encode strict JSON in which no HTML parser sees a tag, a comment or an entity."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _card(card: Card) -> dict[str, Any]:
    verdict = card.verdict
    since = []
    if verdict.since_step is not None:
        since.append(f"since step {verdict.since_step:,}")
    if verdict.step is not None:
        since.append(f"last reading at step {verdict.step:,}")
    if verdict.regime in ("grokking", "decline"):
        since.append(f"{verdict.regime} regime")
    if verdict.regime == "loss":
        since.append("without LAR")
    earlier = ", ".join(map(str, verdict.earlier))
    facts = [("Why", verdict.reason), ("Earlier", earlier and f"{earlier}."), ("How sure", verdict.sure)]
    facts.append(("But", verdict.held_out))
    facts.append(("What to do", verdict.suggestion))
    return {
        "name": card.name,
        "outcome": verdict.outcome,
        "mark": SHOWN[verdict.outcome].mark,
        "since": ", ".join(since),
        "facts": [(label, _sentence(text)) for label, text in facts if text],
        "notes": list(card.notes),
        "details": [
            *(f"Rests on: {each}." for each in verdict.basis),
            *(f"Limit: {each}." for each in verdict.limits),
        ],
    }


def _sentence(text: str) -> str:
    """Capitalize a text, but not a symbol such as k."""
    return text if text[1:2] == " " else text[:1].upper() + text[1:]


def _part(part: Part, i: int) -> dict[str, Any]:
    spectra = next((panel.spec["spectra"] for panel in part.panels if "spectra" in panel.spec), None)
    return {
        "id": f"part-{i}",
        "heading": part.heading,
        "blocks": _blocks(part.text),
        "panels": [{"key": panel.key, "alt": panel.spec["alt"]} for panel in part.panels],
        "figures": [
            {"svg": _svg(figure, key), "alt": str(figure.get_label())} for key, figure in _figures(part.panels).items()
        ],
        "spectra": spectra
        and {"layers": [each["name"] for each in spectra["sites"]], "last": len(spectra["steps"]) - 1},
        "table": _table(part.table),
    }


def _figures(panels: Sequence[Panel]) -> dict[str, Any]:
    """Map names to figures, which several panels may share."""
    return {panel.spec.get("static", panel.key): panel.figure for panel in panels}


__all__ = ["Card", "Part", "label", "write_figures", "write_interactive"]
