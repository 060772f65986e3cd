"""Build small HTML for notebooks: a card with facts, tables and curves, with escaped text and no scripts.

Method: elements hold their own styles, colors are middle tones or come from the page (`currentColor`), and curves are
SVG. The alternative is a style sheet that asks whether the page is dark. Untrusted notebooks lose it, and it is wrong
where the notebook's theme is not the system's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

BLUE, ORANGE = "#3b8fd4", "#d9772b"
"""Legible on white and on black."""
BUCKETS = 150
"""A longer curve shows the lowest and the highest value of this many stretches."""
WIDTH, HEIGHT = 420, 120
MOST_DIGITS = 6
LINE = "1px solid rgba(128,128,128,.35)"
CELL = "padding:2px 12px 2px 0;text-align:left;vertical-align:top"


class Drawn(NamedTuple):
    """One curve: its name, color and points, where a None value is a gap."""

    name: str
    color: str
    x: Sequence[float]
    y: Sequence[float | None]


def card(title: str, *parts: str, color: str = "currentColor") -> str:
    """Return a card with a title in text and parts in this module's HTML.

    Example:
        >>> "<b>" in card("<b>", facts({"a": 1}))
        False
    """
    heading = f'<div style="font-weight:600;color:{color};margin-bottom:4px">{escape(title)}</div>'
    return (
        f'<div style="border:{LINE};border-radius:6px;padding:8px 12px;max-width:720px;display:inline-block;'
        f'text-align:left">{heading}{"".join(parts)}</div>'
    )


def text(label: str, sentence: str) -> str:
    """Return a sentence after its label."""
    return f'<div style="margin:2px 0"><b>{escape(label)}</b> {escape(sentence)}</div>'


def facts(entries: Mapping[str, object]) -> str:
    """Return names and values, a line each."""
    rows = "".join(
        f'<tr style="background:none"><th style="{CELL};font-weight:400;opacity:.7">{escape(str(name))}</th>'
        f'<td style="{CELL}">{escape(str(value))}</td></tr>'
        for name, value in entries.items()
    )
    return f'<table style="border:0;margin:0;font-size:inherit">{rows}</table>'


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table with a header."""
    head = "".join(f'<th style="{CELL};border-bottom:{LINE}">{escape(name)}</th>' for name in header)
    body = "".join(
        '<tr style="background:none">'
        + "".join(f'<td style="{CELL}">{escape(str(cell))}</td>' for cell in row)
        + "</tr>"
        for row in rows
    )
    return f'<table style="border:0;margin:0;font-size:inherit"><tr style="background:none">{head}</tr>{body}</table>'


def listed(sentences: Sequence[str]) -> str:
    """Return sentences as a list, or nothing where there are none."""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<ul style="margin:2px 0">{items}</ul>' if items else ""


def folded(label: str, part: str) -> str:
    """Return HTML that shows when its label is clicked, or nothing where it is empty."""
    return f'<details style="margin:2px 0"><summary>{escape(label)}</summary>{part}</details>' if part else ""


def curves(drawn: Sequence[Drawn], *, x_name: str) -> str:
    """Return curves over one axis with the ends of both axes, or nothing where no point is known."""
    thinned = [each._replace(x=x, y=y) for each in drawn for x, y in [_thinned(each.x, each.y)]]
    known = [
        (x, y) for each in thinned for x, y in zip(each.x, each.y, strict=True) if y is not None and math.isfinite(y)
    ]
    if not known:
        return ""
    left, right = min(x for x, _ in known), max(x for x, _ in known)
    low, high = min(y for _, y in known), max(y for _, y in known)

    def place(x: float, y: float) -> str:
        across = (x - left) / (right - left) if right > left else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        return f"{50 + across * (WIDTH - 58):.1f},{HEIGHT - 22 - up * (HEIGHT - 32):.1f}"

    lines = []
    for each in thinned:
        parts: list[list[str]] = [[]]
        for x, y in zip(each.x, each.y, strict=True):
            if y is not None and math.isfinite(y):
                parts[-1].append(place(x, y))
            elif parts[-1]:
                parts.append([])
        style = f'fill="none" stroke="{each.color}" stroke-width="1.5" stroke-linecap="round"'
        # A single point becomes a line to itself with round ends.
        lines += [
            f'<polyline {style} points="{" ".join(part if len(part) > 1 else part * 2)}"/>' for part in parts if part
        ]
    labels = "".join(
        f'<text x="{x}" y="{y}" font-size="10" fill="currentColor" opacity=".7" text-anchor="{anchor}">'
        f"{escape(label)}</text>"
        for x, y, anchor, label in (
            (46, 14, "end", f"{high:.3g}"),
            (46, HEIGHT - 18, "end", f"{low:.3g}"),
            (50, HEIGHT - 6, "start", f"{left:,.6g}"),
            (WIDTH - 8, HEIGHT - 6, "end", f"{x_name} {right:,.6g}"),
        )
    )
    names = " ".join(f'<span style="color:{each.color}">{escape(each.name)}</span>' for each in drawn)
    return (
        f'<div style="margin-top:4px">{names}</div><svg width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" style="max-width:100%">{"".join(lines)}{labels}</svg>'
    )


def number(value: float | None, form: str = ".4g") -> str:
    """Return a number for display, or a dash where there is none.

    Example:
        >>> number(0.123456), number(1234567, ","), number(None)
        ('0.1235', '1,234,567', '-')
    """
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def measured(value: float, error: float | None, *, sign: str = "±") -> str:
    """Return a number with its standard error, to two digits of the error.

    Example:
        >>> measured(-0.03127, 0.01024), measured(0.1234567, None), measured(2.0, 0.0)
        ('-0.031 ± 0.010', '0.1235', '2')
    """
    if error is None or not error > 0:
        return f"{value:.4g}"
    digits = min(MOST_DIGITS, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} {sign} {error:.{digits}f}"


def _thinned(x: Sequence[float], y: Sequence[float | None]) -> tuple[list[float], list[float | None]]:
    if len(y) <= 2 * BUCKETS:
        return list(x), list(y)
    kept: list[int] = []
    for i in range(BUCKETS):
        rows = range(len(y) * i // BUCKETS, len(y) * (i + 1) // BUCKETS)
        known = [(value, row) for row in rows if (value := y[row]) is not None and math.isfinite(value)]
        # A stretch without a known value becomes one gap.
        kept += sorted({min(known)[1], max(known)[1]}) if known else [rows[0]]
    return [x[row] for row in kept], [y[row] for row in kept]
