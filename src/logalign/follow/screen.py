"""Lay out the screen: rows of text from a follower and a size, without a terminal.

From top to bottom: the run and its state, the verdict in words, why and what to do, pace and layer, what is wrong, the
curves, the keys. Where there is little room, curves go first, then numbers, and the verdict goes last. All text of a
run is made printable first, and none of it is read as markup.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from rich.text import Text

from logalign.common.markup import measured
from logalign.diagnosis.loss_only import AFTERWARDS
from logalign.diagnosis.outcome import SHOWN
from logalign.follow.following import Follower
from logalign.follow.plot import FEWEST, TerminalCurve, in_ascii, number, plot
from logalign.report.drifts import UNIT, Drift
from logalign.runs.foreign.rows import printable

NARROW = 72
"""Columns under which one plot is drawn instead of four."""
PLOT_ROWS = 6
"""Minimum rows of each of four plots."""
ZOOMED = 100
"""Readings drawn when zoomed in."""
CHOICES = ("all", "LAR", "k", "loss", "drift", "signal")

HELP = (
    ("Tab, → and ←", "which curve: all, LAR, k, loss, drift, the verdict's signal"),
    ("↑ and ↓, z", f"the last {ZOOMED} readings, or all of them"),
    ("?", "this page, and back"),
    ("q, Ctrl-C", "quit; the training goes on"),
    ("", ""),
    ("LAR", "log-alignment ratio, 1 for one shared direction, near 1/2 for unrelated ones; plain and centered"),
    ("k", "effective dimension n^(2 (1 - LAR)), on a logarithmic axis"),
    ("loss", "as passed to step(); the mean since the reading before, where it is recorded; held-out where recorded"),
    ("drift", "how much training on other samples changes a sample's loss"),
    ("signal", "what the verdict rests on, with its thresholds"),
)


@dataclass(frozen=True)
class View:
    """The user's choice of what to see.

    Attributes:
        curve: One of `CHOICES`.
        zoomed: Draw only the last readings.
        help: Explain the keys instead.
    """

    curve: str = "all"
    zoomed: bool = False
    help: bool = False

    def after(self, key: str) -> View:
        """Return the choice after a key.

        Example:
            >>> View().after("right").after("right").after("up")
            View(curve='k', zoomed=True, help=False)
        """
        if key in ("right", "left"):
            step = 1 if key == "right" else -1
            return replace(self, curve=CHOICES[(CHOICES.index(self.curve) + step) % len(CHOICES)], help=False)
        if key in ("up", "down"):
            return replace(self, zoomed=key == "up", help=False)
        if key == "zoom":
            return replace(self, zoomed=not self.zoomed, help=False)
        return replace(self, help=not self.help) if key == "help" else self


def screen(follower: Follower, choice: View, *, width: int, height: int, ascii_only: bool = False) -> list[Text]:
    """Return the rows to show, at most `height`, none wider than `width`.

    Args:
        follower: The source, whose lock is held while it is read.
        choice: The user's view.
        width: Columns of the terminal.
        height: Rows of the terminal.
        ascii_only: For terminals without other letters.
    """
    with follower.lock:
        rows = _rows(follower, choice, width, height, ascii_only)
    for row in rows:
        row.truncate(width, overflow="ellipsis")
    return [in_ascii(row) for row in rows] if ascii_only else rows


def ago(seconds: float) -> str:
    """Format a time span in words.

    Example:
        >>> [ago(seconds) for seconds in (0.4, 59, 61, 7300, 200000)]
        ['0 s', '59 s', '1 min', '2 h 1 min', '2 d 7 h']
    """
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if days < 1 else f"{days} d {hours % 24} h"


def state_words(follower: Follower) -> tuple[str, str]:
    """Return the state of the run in words, and a style."""
    state, age = follower.state, follower.age or 0.0
    if state == "waiting":
        return (follower.waiting or "no reading is there yet", "yellow")
    if state == "catching up":
        return f"catching up, {follower.progress:.0%} read", "cyan"
    if state == "stalled":
        return f"no reading for {ago(age)}", "bold yellow"
    return ("closed, training has ended", "cyan") if state == "closed" else ("running", "green")


def _rows(follower: Follower, choice: View, width: int, height: int, ascii_only: bool) -> list[Text]:
    title, footer = _title(follower, width), _footer(choice, width)
    verdict = _verdict(follower, width, roomy=height >= 30)
    facts, troubles = [*_facts(follower, width), *_drift(follower, ascii_only)], _troubles(follower, width)
    head = [title, *verdict, *facts, *troubles]
    if len(head) + 1 + FEWEST > height or width < 24:
        head = [title, *verdict, *troubles, *facts]
        return [*head[: max(1, height - 1)], footer][: max(1, height)]
    room = height - len(head) - 1
    body = _help(width) if choice.help else _plots(follower, choice, width, room, ascii_only)
    body = body[:room]
    return [*head, *body, *([Text("")] * (room - len(body))), footer]


def _title(follower: Follower, width: int) -> Text:
    words, style = state_words(follower)
    step = f"step {follower.last.step:,} " if follower.last is not None else ""
    state = f" {printable(words)}  {step}"
    room = max(0, width - len(state))
    name = f" logalign follow  {printable(str(follower.path))}"
    name = name if len(name) <= room else f" {printable(str(follower.path))}"
    left = Text(name)
    if left.cell_len > room:
        kept = name[-max(0, room - 1) :] if room > 1 else ""
        left = Text(f"…{kept}"[:room])
        left.truncate(room)
    left.append(" " * max(0, room - left.cell_len)).append(state, style)
    left.stylize("reverse")
    return left


def _verdict(follower: Follower, width: int, *, roomy: bool) -> list[Text]:
    verdict = follower.verdict
    if follower.last is None:
        return [Text(" No verdict yet: no reading has been taken.", "bold")]
    head = Text(" ").append(f" {verdict.outcome.upper()} ", SHOWN[verdict.outcome].style + " reverse")
    regime = f"{verdict.regime} regime" if verdict.regime in ("grokking", "decline") else ""
    regime = "without LAR" if verdict.regime == "loss" else regime
    since = "" if verdict.since_step is None else f"since step {verdict.since_step:,}"
    head.append("  " + ", ".join(each for each in (since, regime) if each), "bold")
    if verdict.step is not None and verdict.step != follower.last.step:
        head.append(f"  (as of step {verdict.step:,})")
    return [
        head,
        *_labeled("why", verdict.reason, width, most=4 if roomy else 2),
        *(_labeled("but", verdict.held_out, width, most=2) if verdict.held_out else []),
        *_labeled("do", verdict.suggestion, width, most=3 if roomy else 2),
    ]


def _labeled(label: str, sentence: str, width: int, *, most: int) -> list[Text]:
    room = max(8, width - 6)
    lines = textwrap.wrap(printable(sentence), room) or [""]
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1][: room - 2].rstrip()} …"]
    return [
        Text(" ").append(f"{label if i == 0 else '':<4}", "bold").append(" " + line) for i, line in enumerate(lines)
    ]


def _facts(follower: Follower, width: int) -> list[Text]:
    last = follower.last
    if last is None:
        return []
    each, pace = follower.history.pace()
    parts = [f"{len(follower.history):,} readings"]
    if each is not None and pace is not None:
        parts += [f"{_rough(each)} s a reading", f"{_rough(pace)} steps/s"]
    if follower.age is not None:
        parts.append(f"last {ago(follower.age)} ago")
    if last.epoch is not None:
        parts.append(f"epoch {number(last.epoch)}")
    elif last.passes is not None:
        parts.append(f"{last.passes:.3g} passes over the data")
    if last.lr is not None:
        parts.append(f"lr {number(last.lr)}")
    if follower.verdict.regime == "loss":
        return [*_joined(parts, width), *_labeled("", f"{AFTERWARDS}.", width, most=2)]
    parts.append("all tokens" if last.kept is None else f"{last.kept:.0%} of tokens kept")
    if last.nonfinite:
        parts.append(f"{last.nonfinite:,} non-finite rows")
    return [*_joined(parts, width), Text(" " + printable(_layer(follower)))]


def _drift(follower: Follower, ascii_only: bool) -> list[Text]:
    """Drift with its standard error and its meaning, or why there is none, or no row where the run does not say."""
    last, drift = follower.last, Drift.of(follower.last)
    if drift is not None:
        shown = measured(drift.value, drift.error, sign="+-" if ascii_only else "±")
        return [Text(" drift ").append(shown, "bold").append(f" {UNIT}: {drift.direction}")]
    if last is not None and last.drift_reason is not None:
        return [Text(f" no drift: {printable(last.drift_reason)}")]
    return []


def _layer(follower: Follower) -> str:
    """Name the layer and how it was found."""
    sites = follower.meta.get("sites")
    site = sites.get(follower.site) if isinstance(sites, dict) else None
    words = f"layer {follower.site}"
    last = follower.last
    if isinstance(site, dict):
        words += f": {site.get('module', '?')}, {site.get('kind', '?')}"
    if last is not None and last.m is not None and last.n is not None:
        words += f" {last.m:,} x {last.n:,}"
    if isinstance(site, dict) and site.get("how"):
        words += f", found by {site['how']}"
    others = len(follower.sites) - 1
    return words + (f"; {others} more recorded" if others > 0 else "")


def _troubles(follower: Follower, width: int) -> list[Text]:
    rows = []
    if follower.trouble is not None:
        rows.append(Text(f" ! {printable(follower.trouble)}", "bold red"))
    if follower.waiting is not None:
        rows.append(Text(f" waiting: {printable(follower.waiting)}", "yellow"))
    elif follower.state == "stalled":
        interval = follower.history.pace()[0]
        usual = "" if interval is None else f", usually {_rough(interval)} s apart"
        rows.append(
            Text(f" ! no reading for {ago(follower.age or 0)}{usual}: is the training still running?", "bold yellow")
        )
    last = follower.last
    if last is not None and last.lar is None and follower.verdict.regime != "loss":
        rows.append(Text(f" ! LAR is undefined: {printable(last.reason or 'no reason given')}", "bold yellow"))
    if follower.warnings:
        step, message = follower.warnings[-1]
        at = "" if step is None else f" at step {step:,}"
        more = f" ({follower.warned} in all)" if follower.warned > 1 else ""
        rows += [
            Text(line, "yellow")
            for line in textwrap.wrap(f" ! warning{at}{more}: {printable(message)}", max(8, width))[:2]
        ]
    return rows


def _rough(value: float) -> str:
    return number(float(f"{value:.2g}"))


def _joined(parts: list[str], width: int) -> list[Text]:
    """Put as many parts into each row as it has room for."""
    rows = [" " + parts[0]]
    for part in parts[1:]:
        if len(rows[-1]) + len(part) + 3 <= width:
            rows[-1] += f" · {part}"
        else:
            rows.append(" " + part)
    return [Text(row) for row in rows]


def _plots(follower: Follower, choice: View, width: int, room: int, ascii_only: bool) -> list[Text]:
    history = follower.history
    if not len(history) or room < FEWEST:
        return []
    last = ZOOMED if choice.zoomed else None
    steps = history.column("step", last)

    def curve(name: str, words: str, style: str, *, dotted: bool = False) -> TerminalCurve:
        return TerminalCurve(words, history.column(name, last), style, dotted)

    def lar(width: int, height: int) -> list[Text]:
        curves = [curve("lar", "plain", "cyan"), curve("lar_centered", "centered", "magenta", dotted=True)]
        return plot("LAR", steps, curves, width=width, height=height)

    def k(width: int, height: int) -> list[Text]:
        curves = [curve("k", "plain", "cyan"), curve("k_centered", "centered", "magenta", dotted=True)]
        return plot("k", steps, curves, width=width, height=height, log=True)

    def loss(width: int, height: int) -> list[Text]:
        curves = [curve("loss", "training", "green"), curve("held_out", "held-out", "red", dotted=True)]
        return plot("loss", steps, curves, width=width, height=height)

    def drift(width: int, height: int) -> list[Text]:
        curves = [curve("drift", UNIT, "cyan")]
        return plot("drift", steps, curves, width=width, height=height, lines=[(0.0, "zero")])

    def signal(width: int, height: int) -> list[Text]:
        found = follower.signal
        if found is None:
            return plot("signal", steps, [], width=width, height=height)
        curves = [curve(found.name, "", "blue")]
        return plot(found.words, steps, curves, width=width, height=height, lines=found.thresholds)

    panels: dict[str, Callable[[int, int], list[Text]]] = {
        "LAR": lar,
        "k": k,
        "loss": loss,
        "drift": drift,
        "signal": signal,
    }
    # k repeats LAR in other units, except to the grokking logic. A recorded drift therefore replaces k.
    if choice.curve == "all" and follower.verdict.regime == "loss":
        upper = room - PLOT_ROWS if room >= 2 * PLOT_ROWS and follower.signal is not None else room
        return loss(width, upper) + (signal(width, room - upper) if upper < room else [])
    has_drift = bool(np.isfinite(history.column("drift")).any())
    second = drift if has_drift and follower.verdict.regime != "grokking" else k
    if choice.curve == "all" and width >= NARROW and room >= 2 * PLOT_ROWS:
        left, upper = width // 2, room // 2
        rows = _beside(lar(left - 1, upper), second(width - left, upper), left)
        return rows + _beside(loss(left - 1, room - upper), signal(width - left, room - upper), left)
    if choice.curve == "all" and width >= NARROW:
        left = width // 2
        return _beside(lar(left - 1, room), second(width - left, room), left)
    return panels["LAR" if choice.curve == "all" else choice.curve](width, room)


def _beside(left: list[Text], right: list[Text], at: int) -> list[Text]:
    rows = []
    for one, other in zip(left, right, strict=True):
        row = one.copy()
        row.append(" " * (at - row.cell_len))
        row.append_text(other)
        rows.append(row)
    return rows


def _help(width: int) -> list[Text]:
    rows = [Text("")]
    for key, words in HELP:
        for i, line in enumerate(textwrap.wrap(words, max(8, width - 18)) or [""]):
            rows.append(Text("  ").append(f"{key if i == 0 else '':<14}", "bold").append(line))
    return rows


def _footer(choice: View, width: int) -> Text:
    zoom = f"last {ZOOMED}" if choice.zoomed else "all readings"
    keys = f" q quit · ←→ curve: {choice.curve} · ↑↓ {zoom} · ? help"
    return Text((keys if len(keys) <= width else " q quit · ? help").ljust(width), "reverse")
