"""Outcomes that a verdict may have, and their look on terminals, in notebooks, reports and trackers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

Outcome = Literal["healthy", "approaching", "overfitting", "memorizing", "generalizing", "diverged", "undecidable"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

ALARMS: tuple[Outcome, ...] = ("overfitting", "memorizing", "diverged")
"""Outcomes at which a command fails and `stop=True` stops."""
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
"""The order in which an outcome wins where both regimes judge: alarms first, then stronger evidence."""


class Shown(NamedTuple):
    """The look of an outcome.

    Attributes:
        color: Hexadecimal, for charts, pages and notebooks. Color-blind eyes tell it apart, on white and on black.
        style: Rich style on a terminal, near the color.
        mark: One character, for people who see no colors.
        code: Number that trackers draw: higher is worse, and 3 to 5 are alarms.
        exit_status: `logalign diagnose` exits with it if no alarm came before. 1 is an error.
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
