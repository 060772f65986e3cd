"""Outcomes: what a verdict may say, and how each is shown, on a terminal, in a notebook, a report and a tracker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

Outcome = Literal["healthy", "approaching", "overfitting", "memorizing", "generalizing", "diverged", "undecidable"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

ALARMS: tuple[Outcome, ...] = ("overfitting", "memorizing", "diverged")
"""Outcomes that a command fails with, and that `stop=True` stops at."""
OF_OVERFITTING: tuple[Outcome, ...] = ("approaching", "overfitting")
"""Outcomes that name a checkpoint to keep."""
PRECEDENCE: tuple[Outcome, ...] = (
    "diverged",
    "overfitting",
    "memorizing",
    "generalizing",
    "approaching",
    "healthy",
    "undecidable",
)
"""Which of two outcomes stands where both regimes were asked: alarms first, then what has the stronger evidence."""


class Shown(NamedTuple):
    """How an outcome is shown.

    Attributes:
        color: Of charts, pages and notebooks, in hexadecimal; told apart by color-blind eyes, on white and on black.
        style: On a terminal, as Rich names it; near the color.
        mark: One character, for who sees no colors.
        code: For trackers, which draw numbers: the higher the worse, 3 to 5 are alarms.
        exit_status: Of `logalign diagnose` where there was no alarm before; 1 is an error.
    """

    color: str
    style: str
    mark: str
    code: int
    exit_status: int


SHOWN: Mapping[Outcome, Shown] = {
    "healthy": Shown("#009E73", "bold green", "✓", 1, 0),
    "generalizing": Shown("#0072B2", "bold blue", "✓", 0, 0),
    "approaching": Shown("#B87A00", "bold yellow", "▲", 2, 0),
    "overfitting": Shown("#D55E00", "bold red", "✕", 4, 3),
    "memorizing": Shown("#CC79A7", "bold magenta", "✕", 3, 3),
    "diverged": Shown("#AA3377", "bold red", "✕", 5, 3),
    "undecidable": Shown("#7F7F7F", "bold", "?", -1, 4),
}
