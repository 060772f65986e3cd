"""A verdict on the terminal: what is the case, since when, why, what to do, and what that rests on."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from logalign.diagnosis.verdict import Outcome, Verdict, shown

STYLES: dict[Outcome, str] = {
    "healthy": "bold green",
    "generalizing": "bold green",
    "approaching": "bold yellow",
    "overfitting": "bold red",
    "memorizing": "bold red",
    "undecidable": "bold",
}


def print_verdict(verdict: Verdict, *, name: str, console: Console) -> None:
    """Print a verdict for people; colors only where the console has them.

    Args:
        verdict: What was found.
        name: Of the run.
        console: Where to.
    """
    headline = Text(f"{name}: ").append(verdict.headline(), style=STYLES[verdict.outcome])
    console.print(headline, soft_wrap=True)
    for label, sentence in (("why", verdict.reason), ("what to do", verdict.suggestion)):
        console.print(_paragraph(label, sentence))
    known = {label: value for label, value in verdict.evidence.items() if value is not None}
    if known:
        table = Table("evidence", box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("value", justify="right")
        for label, value in known.items():
            table.add_row(Text(label.replace("_", " ")), shown(value))
        console.print()
        console.print(table)
    for label, sentences in (("rests on", verdict.basis), ("limits", verdict.limits)):
        if sentences:
            console.print()
            console.print(Text(label, style="bold"))
            for sentence in sentences:
                console.print(_paragraph("-", sentence))


def _paragraph(label: str, sentence: str) -> Table:
    """A label with a text that is wrapped beside it."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    grid.add_row(Text(label if label == "-" else f"{label}:", style="bold"), Text(sentence))
    return grid
