"""Verdicts and rankings on the terminal: what is the case, since when, why, what to do, and what that rests on."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from logalign.diagnosis.ranking import HELD_OUT_LOSS, Ranked, position
from logalign.diagnosis.verdict import Outcome, Verdict, shown
from logalign.report.drifts import UNIT, Drift
from logalign.report.names import short_names

DRIFT_EXPLAINED = (
    "Drift is the change of a sample's loss while the network trains on other samples; above zero they raise it. ± is "
    "one standard error."
)
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
    for label, sentence in (("why", verdict.reason), ("but", verdict.held_out), ("what to do", verdict.suggestion)):
        if sentence:
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


def print_ranking(ranked: Sequence[Ranked], *, console: Console, drifts: Sequence[Drift | None] = ()) -> None:
    """Print runs in their order, with the uncertainty of each score and whether the next one could stand before it.

    Args:
        ranked: The order.
        console: Where to.
        drifts: One for each run; a column where any has one.
    """
    best = ranked[0]
    less_is_better = best.quantity == HELD_OUT_LOSS
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("", justify="right")
    table.add_column("run", overflow="fold")
    table.add_column(best.quantity, justify="right")
    table.add_column("95 %", justify="right")
    has_drift = any(drift is not None for drift in drifts)
    if has_drift:
        table.add_column(f"drift\n({UNIT})", justify="right")
    table.add_column("order")
    names = short_names([each.run for each in ranked])
    for place, (each, name) in enumerate(zip(ranked, names, strict=True), 1):
        after = ranked[place] if place < len(ranked) else None
        table.add_row(
            str(place),
            Text(name),
            f"{each.score:.3f}",
            f"{each.low:.3f} to {each.high:.3f}",
            *([str(drifts[place - 1] or "-")] if has_drift else []),
            "" if each.is_surely_before(after) else "could change with the next",
        )
    console.print(table)
    last = position(best.align, best.step if best.at is None else best.at)
    console.print(
        f"At {last}, the last that all runs have; {'less' if less_is_better else 'more'} is better. The "
        "intervals are the scatter of readings; runs of other seeds lie farther apart.",
        soft_wrap=True,
    )
    if has_drift:
        console.print(DRIFT_EXPLAINED, soft_wrap=True)
