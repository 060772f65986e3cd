"""Print verdicts and rankings on the terminal: the outcome, since when, why, what to do, and the evidence."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from logalign.diagnosis.comparable import position
from logalign.diagnosis.loss_only import AFTERWARDS
from logalign.diagnosis.outcome import SHOWN
from logalign.diagnosis.ranking import ESTIMATE, LAR, LOSS_AND_LAR, PASSES, Quantity, Ranking
from logalign.diagnosis.verdict import Verdict, shown
from logalign.report.drifts import UNIT, Drift
from logalign.report.names import short_names

DRIFT_EXPLAINED = (
    "Drift is the change of a sample's loss while the network trains on other samples; above zero they raise it. ± is "
    "one standard error."
)
ABOVE = "held-out loss above the first\n(nats, 95 %)"
RESTS_ON: dict[Quantity, str] = {
    ESTIMATE: "The estimate tells the order, not the loss: intervals are of the difference to the first run.",
    LOSS_AND_LAR: "They tell the order, and no number of nats.",
    PASSES: "Passes are too short for readings to tell more, so no order is sure: take readings more often.",
    LAR: "No order is sure by it alone: pass loss= and epoch= to step().",
}


def print_verdict(verdict: Verdict, *, name: str, console: Console, verbose: bool = False) -> None:
    """Print a verdict for people, with colors only where the console has them.

    Args:
        verdict: The verdict.
        name: The run's name.
        console: The output.
        verbose: Also print the verdict's numbers, evidence and limits.
    """
    headline = Text(f"{name}: ").append(verdict.headline(), style=SHOWN[verdict.outcome].style)
    console.print(headline, soft_wrap=True)
    for label, sentence in _sentences(verdict):
        if sentence:
            console.print(_paragraph(label, sentence))
    if not verbose:
        if AFTERWARDS in verdict.limits:
            console.print(_paragraph("-", AFTERWARDS))
        return
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


def _sentences(verdict: Verdict) -> list[tuple[str, str]]:
    return [
        ("why", verdict.reason),
        ("how sure", verdict.sure),
        ("but", verdict.held_out),
        ("what to do", verdict.suggestion),
    ]


def _paragraph(label: str, sentence: str) -> Table:
    """A label with wrapped text beside it."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    grid.add_row(Text(label if label == "-" else f"{label}:", style="bold"), Text(sentence))
    return grid


def print_ranking(ranking: Ranking, *, console: Console, drifts: Sequence[Drift | None] = ()) -> None:
    """Print runs in order, whether the next one could stand before each, and which were left out.

    Args:
        ranking: The order.
        console: The output.
        drifts: One for each run. The column appears where any has one.
    """
    rows = ranking_rows(ranking, drifts)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in rows[0]:
        is_number = name not in ("run", "order")
        table.add_column(name, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number)
    for row in rows:
        table.add_row(*map(Text, row.values()))
    console.print(table)
    for sentence in ranking_notes(ranking, has_drift=any(drifts)):
        console.print(Text(sentence), soft_wrap=True)


def ranking_rows(ranking: Ranking, drifts: Sequence[Drift | None] = ()) -> list[dict[str, str]]:
    """Return the rows of the ranking table, as texts by column."""
    rows = []
    names = short_names([each.run for each in ranking.runs])
    for place, (each, name) in enumerate(zip(ranking.runs, names, strict=True)):
        row = {"": str(place + 1), "run": name}
        if ranking.quantity == ESTIMATE:
            row[ABOVE] = "-" if each.low is None else f"{each.low:.2f} to {each.high:.2f}"
        if any(drifts):
            row[f"drift\n({UNIT})"] = str(drifts[place] or "-")
        rows.append({**row, "order": "" if each.is_sure else "could change with the next"})
    return rows


def ranking_notes(ranking: Ranking, *, has_drift: bool = False) -> list[str]:
    """Explain in sentences the order's evidence, and name each run left out."""
    place = position(ranking.align, ranking.at)
    notes = [
        f"Best first, by {ranking.quantity}, at {place}, the last that all runs have. {RESTS_ON[ranking.quantity]}"
    ]
    if has_drift:
        notes.append(DRIFT_EXPLAINED)
    return notes + [f"left out: {run}: {why}" for run, why in ranking.left_out.items()]
