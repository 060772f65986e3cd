"""Draw curves with axes in a terminal, in braille dots, two by four in a character.

Method: readings are sorted into columns of dots, and each column joins its lowest and highest value, so that no extreme
is lost however many readings there are. NumPy does the sorting. The alternative, plotext, draws such plots too. Its
release 6 dropped the calls of its release 5, and this module needs little of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.text import Text

Vector = np.ndarray[Any, Any]

BRAILLE = 0x2800
BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""The dot of a braille character by column and row."""
GUTTER = 8
"""Characters left of the axis."""
FEWEST = 3
"""Rows of characters under which no plot is drawn."""


@dataclass(frozen=True)
class TerminalCurve:
    """A curve of a plot.

    Attributes:
        name: Name in the legend.
        values: One for each step, NaN where undefined.
        style: One of the terminal's sixteen colors.
        dotted: Draw with gaps, to distinguish it without colors.
    """

    name: str
    values: Vector
    style: str
    dotted: bool = False


def plot(
    title: str,
    steps: Vector,
    curves: Sequence[TerminalCurve],
    *,
    width: int,
    height: int,
    log: bool = False,
    lines: Sequence[tuple[float, str]] = (),
    ascii_only: bool = False,
) -> list[Text]:
    """Draw curves over steps.

    Args:
        title: First text in the first row, before the names and last values of the curves.
        steps: [readings], increasing.
        curves: Up to a few.
        width: In characters, axis labels included.
        height: In rows, title and steps included, and at least `FEWEST`.
        log: Make the vertical axis logarithmic.
        lines: Horizontal lines (value, name), drawn where they fit.
        ascii_only: For terminals without braille.
    Returns:
        `height` rows.
    """
    rows, columns = height - 2, max(1, width - GUTTER - 1)
    drawn = [(curve, _scaled(curve.values, log)) for curve in curves]
    known = [values[np.isfinite(values)] for _, values in drawn]
    if rows < 1 or not sum(each.size for each in known):
        blank = [Text(" " * (GUTTER - 1)).append("│", "bright_black") for _ in range(max(0, rows))]
        if blank:
            blank[0].append(" not recorded yet", "bright_black")
            blank[0].truncate(width)
        return _ascii([_heading(title, curves, lines, width), *blank, Text("")][:height], ascii_only)
    low, high = min(each.min() for each in known if each.size), max(each.max() for each in known if each.size)
    low, high = _with_lines(low, high, [_scaled_line(value, log) for value, _ in lines])
    if high - low < 1e-9 * max(1.0, abs(low)):
        low, high = low - 0.5 * max(1e-6, abs(low) * 1e-3), high + 0.5 * max(1e-6, abs(high) * 1e-3)
    canvas = _Canvas(columns, rows, float(steps[0]), float(steps[-1]), low, high)
    hidden, names = [], {}
    for value, name in lines:
        at = _scaled_line(value, log)
        if at is None or not low <= at <= high:
            hidden.append((value, name))
        else:
            full = f"{name} {number(value)}" if value else name  # the axis says where zero is
            names[canvas.line(at, "yellow")] = full if len(full) <= columns // 2 else name
    for curve, values in drawn:
        canvas.curve(steps, values, curve.style, dotted=curve.dotted)
    labels = _labels(low, high, rows, log)
    body = [
        Text(f"{labels.get(row, ''):>{GUTTER - 2}.{GUTTER - 2}} ").append("┤" if row in labels else "│", "bright_black")
        + _named(canvas.row(row), names.get(row, ""))
        for row in range(rows)
    ]
    heading = _heading(title, curves, hidden, width)
    return _ascii([heading, *body, _step_labels(steps, columns)], ascii_only)


def number(value: float | None) -> str:
    """Format a number in few characters: at most four significant digits, a dash for None.

    Example:
        >>> [number(value) for value in (0.51234, 12.3456, 1234567, 0.00001234, -0.0301, None)]
        ['0.5123', '12.35', '1.23e6', '1.23e-5', '-0.0301', '-']
    """
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    digits, power = f"{value:.2e}".split("e")
    return f"{digits}e{int(power)}"


def _heading(title: str, curves: Sequence[TerminalCurve], lines: Sequence[tuple[float, str]], width: int) -> Text:
    heading = Text().append(title, "bold")
    for curve in curves:
        known = curve.values[np.isfinite(curve.values)]
        if not known.size:
            continue
        mark = "╌╌" if curve.dotted else "──"
        part = Text(" ").append(mark, curve.style).append(f" {curve.name} " if curve.name else " ")
        part.append(number(float(known[-1])), "bold")
        heading.append_text(part)
    for value, name in lines:
        heading.append_text(Text(" ").append("┈┈", "yellow").append(f" {name} {number(value)}"))
    heading.truncate(width, overflow="ellipsis")
    return heading


def _named(row: Text, name: str) -> Text:
    """Write a threshold's name over its line, on the left, so that the latest values stay visible."""
    return row if not name or len(name) > row.cell_len else Text(name, "yellow") + row[len(name) :]


def _scaled(values: Vector, log: bool) -> Vector:
    if not log:
        return values
    scaled: Vector = np.full(values.shape, np.nan)
    positive = np.isfinite(values) & (values > 0)
    scaled[positive] = np.log10(values[positive])
    return scaled


def _scaled_line(value: float, log: bool) -> float | None:
    if not log:
        return value
    return math.log10(value) if value > 0 else None


def _with_lines(low: float, high: float, lines: Sequence[float | None]) -> tuple[float, float]:
    """Widen the range to nearby thresholds, but not so far that the curve becomes flat."""
    for line in lines:
        if line is not None and line - high < 3 * max(high - low, 0.1 * abs(line)) and line > high:
            high = line
        elif line is not None and low - line < 3 * max(high - low, 0.1 * abs(line)) and line < low:
            low = line
    return low, high


def _labels(low: float, high: float, rows: int, log: bool) -> dict[int, str]:
    """Return the axis labels by row: the ends, and what fits between."""
    shown = {0: high, rows - 1: low} if rows > 1 else {0: high}
    if log and high - low >= 1:
        for power in range(math.ceil(low), math.floor(high) + 1):
            row = round((high - power) / (high - low) * (rows - 1))
            if all(abs(row - other) > 1 for other in shown):
                shown[row] = float(power)
    elif rows >= 5:
        shown[(rows - 1) // 2] = high - (high - low) * ((rows - 1) // 2) / (rows - 1)
    return {row: number(10.0**value if log else value) for row, value in shown.items()}


def _step_labels(steps: Vector, columns: int) -> Text:
    first, last = f"{steps[0]:,.0f}", f"step {steps[-1]:,.0f}"
    text = " " * (GUTTER - 1) + "└" + first
    space = GUTTER + columns - len(text) - len(last)
    return Text((text + " " * space + last if space > 0 else text)[: GUTTER + columns], "bright_black")


def _ascii(rows: list[Text], ascii_only: bool) -> list[Text]:
    return [in_ascii(row) for row in rows] if ascii_only else rows


SUBSTITUTES = {"│": "|", "┤": "+", "└": "+", "─": "-", "╌": ".", "┈": ".", "…": "~", "·": "-"}


def in_ascii(text: Text) -> Text:
    """Convert a row for a terminal that has ASCII only: dots to . ' and :, other letters to question marks."""

    def letter(each: str) -> str:
        dots = ord(each) - BRAILLE
        if 0 <= dots < 256:
            upper, lower = dots & 0x1B, dots & 0xE4
            return ":" if upper and lower else "'" if upper else "." if lower else " "
        return each if each.isascii() else SUBSTITUTES.get(each, "?")

    return Text("".join(map(letter, text.plain)), style=text.style, spans=text.spans)


class _Canvas:
    """Dots, and for each character the style of the last dot drawn in it."""

    def __init__(self, columns: int, rows: int, first: float, last: float, low: float, high: float) -> None:
        self.columns, self.rows = columns, rows
        self.first, self.last, self.low, self.high = first, last, low, high
        self.dots = np.zeros((4 * rows, 2 * columns), dtype=bool)
        self.styles = np.zeros((rows, columns), dtype=np.int64)
        self.names: list[str] = [""]

    def line(self, value: float, style: str) -> int:
        """Draw a horizontal line, and return its row of characters."""
        row = int(self._row(np.array([value]))[0])
        self.dots[row, ::4] = True
        self._color(np.full(self.columns, row), np.arange(0, 2 * self.columns, 2), style)
        return row // 4

    def curve(self, steps: Vector, values: Vector, style: str, *, dotted: bool) -> None:
        known = np.isfinite(values)
        if not known.any():
            return
        gaps = np.cumsum(~known)[known]
        columns, rows = self._column(steps[known]), self._row(values[known])
        starts = np.flatnonzero(np.diff(columns, prepend=-1))
        ends = np.append(starts[1:], len(columns)) - 1
        top, bottom = np.minimum.reduceat(rows, starts), np.maximum.reduceat(rows, starts)
        at = columns[starts]
        tall, wide = [], []
        for i in range(len(at)):
            for row in range(top[i], bottom[i] + 1):
                tall.append(row)
                wide.append(at[i])
            if i + 1 < len(at) and gaps[ends[i]] == gaps[starts[i + 1]]:
                x0, x1, y0, y1 = at[i], at[i + 1], rows[ends[i]], rows[starts[i + 1]]
                points = max(x1 - x0, abs(y1 - y0))
                for j in range(1, points):
                    wide.append(x0 + round(j * (x1 - x0) / points))
                    tall.append(y0 + round(j * (y1 - y0) / points))
        down, across = np.array(tall), np.array(wide)
        if dotted:
            keep = (across // 2) % 2 == 0
            keep[-1] = True
            down, across = down[keep], across[keep]
        self.dots[down, across] = True
        self._color(down, across, style)

    def row(self, row: int) -> Text:
        dots = self.dots[4 * row : 4 * row + 4]
        codes = np.full(self.columns, BRAILLE)
        for column in range(2):
            for line in range(4):
                codes += dots[line, column::2] * BITS[column][line]
        text = Text()
        styles = self.styles[row]
        starts = np.flatnonzero(np.diff(styles, prepend=-1))
        for start, end in zip(starts, [*starts[1:], self.columns], strict=True):
            letters = "".join(" " if code == BRAILLE else chr(code) for code in codes[start:end].tolist())
            text.append(letters, self.names[styles[start]] or None)
        return text

    def _color(self, rows: Vector, columns: Vector, style: str) -> None:
        if style not in self.names:
            self.names.append(style)
        self.styles[rows // 4, columns // 2] = self.names.index(style)

    def _column(self, steps: Vector) -> Vector:
        span = self.last - self.first
        share = (steps - self.first) / span if span > 0 else np.zeros(len(steps))
        return np.clip(np.round(share * (2 * self.columns - 1)), 0, 2 * self.columns - 1).astype(np.int64)

    def _row(self, values: Vector) -> Vector:
        share = (self.high - values) / (self.high - self.low)
        return np.clip(np.round(share * (4 * self.rows - 1)), 0, 4 * self.rows - 1).astype(np.int64)
