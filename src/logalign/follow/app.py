"""`logalign follow`: full screen on a terminal, one line a reading elsewhere, or the current state once.

One thread looks at the run, so that a disk that does not answer freezes no screen and keeps nobody from quitting.
"""

from __future__ import annotations

import os
import re
import select
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

from rich.console import Console

from logalign.diagnosis.baseline import Baseline
from logalign.diagnosis.detector import AskedRegime
from logalign.diagnosis.verdict import Verdict
from logalign.errors import RunError
from logalign.follow.following import Follower
from logalign.follow.history import curves_of
from logalign.follow.plot import number
from logalign.follow.screen import View, screen, state_words
from logalign.runs.foreign.rows import printable
from logalign.runs.reading import Reading

INTERVAL = 1.0
"""Seconds between looks."""
BETWEEN_PIECES = 0.005
"""Seconds between pieces of a long run, in which the screen is drawn."""
ONCE_HEIGHT = 28


def follow(
    path: str | Path, *, baseline: Baseline | None = None, regime: AskedRegime = "auto", once: bool = False
) -> int:
    """Show a run while it grows, until the user quits.

    Args:
        path: A run folder, a JSONL or a CSV file, which need not exist yet.
        baseline: See `Detector`.
        regime: See `Detector`.
        once: Print the current state and return.

    Returns:
        The exit status: 0, or 128 and the number of the signal that ended it.

    Raises:
        RunError: it is no run that can be followed, or it is damaged, or with `once`, there is none.
    """
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)) and not Path(path).exists():
        raise RunError(f"{printable(str(path))}: expected a path on a disk of this machine; logalign report reads URLs")
    follower = Follower(path, baseline=baseline, regime=regime)
    if once:
        _print_once(follower)
        return 0
    if _is_terminal():
        return _full_screen(follower)
    return _print_lines(follower, sys.stdout, sys.stderr)


def line_of(reading: Reading, verdict: Verdict) -> str:
    """Format a reading and the verdict after it as one line of name=value.

    Example:
        >>> reading = Reading(step=120, lar=0.5, n=64, loss=2.25)
        >>> line_of(
        ...     reading, Verdict(outcome="healthy", regime="decline", step=120, since_step=0, reason="", suggestion="")
        ... )
        'step=120 lar=0.5 lar_centered=- k=64 loss=2.25 verdict=healthy since=0'
    """
    curves = curves_of(reading)
    drifts = {"drift": reading.drift, "drift_error": reading.drift_error} if reading.drift is not None else {}
    drift = "".join(f" {name}={number(value)}" for name, value in drifts.items())
    held_out = "" if curves["held_out"] is None else f" val_loss={number(curves['held_out'])}"
    since = "-" if verdict.since_step is None else verdict.since_step
    return (
        f"step={reading.step} lar={number(curves['lar'])} lar_centered={number(curves['lar_centered'])} "
        f"k={number(curves['k'])} loss={number(curves['loss'])}{held_out}{drift} "
        f"verdict={verdict.outcome} since={since}"
    )


def _is_terminal() -> bool:
    return (
        sys.platform != "win32"
        and sys.stdin.isatty()
        and sys.stdout.isatty()
        and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")
    )


def _print_once(follower: Follower) -> None:
    follower.look()
    while follower.behind and follower.trouble is None:
        follower.look()
    if follower.trouble is not None or follower.waiting is not None:
        raise RunError(f"{printable(str(follower.path))}: {printable(follower.trouble or follower.waiting or '')}")
    console = Console(highlight=False)
    ascii_only = not (console.encoding or "").lower().startswith("utf")
    rows = screen(follower, View(), width=console.width, height=ONCE_HEIGHT, ascii_only=ascii_only)
    for row in rows[:-1]:  # without the keys
        console.print(row, no_wrap=True, overflow="crop", soft_wrap=True)


def _print_lines(follower: Follower, out: TextIO, messages: TextIO) -> int:
    """Print a line for every reading, from the first on, and print everything else to `messages`."""
    told = ""
    try:
        while True:
            for reading, verdict in follower.look():
                print(line_of(reading, verdict), file=out)
            out.flush()
            words = follower.trouble or (
                "" if follower.state in ("running", "catching up") else state_words(follower)[0]
            )
            kind = words if follower.state != "stalled" or follower.trouble else "stalled"
            if kind != told and words:
                print(f"logalign follow {printable(str(follower.path))}: {printable(words)}", file=messages, flush=True)
            told = kind
            if not follower.behind or follower.trouble is not None:
                _wait(out)
    except BrokenPipeError:
        # Python's final flush must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        return 0


def _wait(out: TextIO) -> None:
    """Wait for the next look, unless nobody reads the output any more."""
    if sys.platform == "win32":
        time.sleep(INTERVAL)
        return
    waiting = select.poll()
    waiting.register(out.fileno(), 0)  # poll always reports errors
    if waiting.poll(1000 * INTERVAL):
        raise BrokenPipeError


def _full_screen(follower: Follower) -> int:
    from logalign.follow.terminal import EndedError, Terminal

    choice, failed = View(), _Failure()
    stop = threading.Event()
    terminal = Terminal()
    looker = threading.Thread(
        target=_look_on, args=(follower, terminal.wake, stop, failed), name="logalign-follow", daemon=True
    )
    status = 0
    try:
        with terminal:
            looker.start()
            while failed.error is None:
                width, height = terminal.size
                terminal.draw(screen(follower, choice, width=width, height=height, ascii_only=terminal.ascii_only))
                keys = terminal.keys(INTERVAL)
                if "quit" in keys:
                    break
                for key in keys:
                    choice = choice.after(key)
    except EndedError as ended:
        status = ended.status
    finally:
        stop.set()
    if failed.error is not None:
        raise failed.error
    return status


class _Failure:
    """The error that ended the looking, for the thread that draws."""

    error: BaseException | None = None


def _look_on(follower: Follower, wake: object, stop: threading.Event, failed: _Failure) -> None:
    assert callable(wake)
    try:
        while not stop.is_set():
            had, behind = follower.last, follower.behind
            follower.look()
            if follower.last is not had or follower.behind != behind:
                wake()
            stop.wait(BETWEEN_PIECES if follower.behind and follower.trouble is None else INTERVAL)
    except BaseException as error:
        failed.error = error
        wake()
