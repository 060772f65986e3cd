"""The page of a comparison: the order of several runs, above the report that overlays them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from logalign.diagnosis.ranking import Ranking
from logalign.report.drifts import Drift, drifts_of
from logalign.report.figures import RUN_COLORS
from logalign.report.interactive import Part
from logalign.report.run_report import write_run_report
from logalign.report.terminal import ranking_notes, ranking_rows


def write_comparison(ranking: Ranking, out: str | os.PathLike[str]) -> Path:
    """Write one HTML page with the order of runs and the best of them overlaid, and return its path.

    Args:
        ranking: The order from `rank(runs)`.
        out: The HTML file.

    Raises:
        The errors of `write_run_report`.
    """
    drawn = [ranking.opened[each.run] for each in ranking.runs[: len(RUN_COLORS)]]
    return write_run_report(drawn, out, before=[ranking_part(ranking, drawn=len(drawn), drifts=drifts_of(ranking))])


def ranking_part(ranking: Ranking, *, drawn: int, drifts: Sequence[Drift | None] = ()) -> Part:
    """Return the order as a section of the report, in the terms of `print_ranking`."""
    notes = ranking_notes(ranking, has_drift=any(drifts))
    if drawn < len(ranking.runs):
        notes.insert(1, f"Drawn are the best {drawn} of {len(ranking.runs):,} runs.")
    table: list[dict[str, object]] = [
        {name.replace("\n", " ") or "place": text for name, text in row.items()}
        for row in ranking_rows(ranking, drifts)
    ]
    return Part(heading=f"Order by {ranking.quantity}", text=" ".join(notes), table=table)
