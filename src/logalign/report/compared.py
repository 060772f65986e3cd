"""The page of a comparison: the order of several runs above the report that lays them over each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from logalign.diagnosis.ranking import HELD_OUT_LOSS, Ranked, position
from logalign.report.drifts import UNIT, Drift, drifts_of
from logalign.report.figures import RUN_COLORS
from logalign.report.interactive import Part
from logalign.report.names import short_names
from logalign.report.run_report import write_run_report
from logalign.report.terminal import DRIFT_EXPLAINED
from logalign.runlog import Run


def write_comparison(runs: Sequence[Run], ranked: Sequence[Ranked], out: str | os.PathLike[str]) -> Path:
    """Write one HTML page with the order of runs, and the best of them drawn over each other; return its path.

    Args:
        runs: The runs.
        ranked: Their order, as `rank(runs)` gives it.
        out: The HTML file.

    Raises:
        As of `write_run_report`.
    """
    by_name = {run.name: run for run in runs}
    drawn = [by_name[each.run] for each in ranked[: len(RUN_COLORS)]]
    return write_run_report(drawn, out, before=[ranking_part(ranked, drawn=len(drawn), drifts=drifts_of(runs, ranked))])


def ranking_part(ranked: Sequence[Ranked], *, drawn: int, drifts: Sequence[Drift | None] = ()) -> Part:
    """The order as a section of the report, as `print_ranking` has it on the terminal."""
    best = ranked[0]
    less_is_better = best.quantity == HELD_OUT_LOSS
    last = position(best.align, best.step if best.at is None else best.at)
    text = (
        f"At {last}, the last that all runs have; {'less' if less_is_better else 'more'} is better. The intervals are "
        "the scatter of readings; runs of other seeds lie farther apart."
    )
    if drawn < len(ranked):
        text += f" Drawn are the best {drawn} of {len(ranked):,} runs."
    has_drift = any(drift is not None for drift in drifts)
    if has_drift:
        text += f" {DRIFT_EXPLAINED}"
    table: list[dict[str, object]] = []
    names = short_names([each.run for each in ranked])
    for place, (each, name) in enumerate(zip(ranked, names, strict=True), 1):
        after = ranked[place] if place < len(ranked) else None
        table.append(
            {
                "place": place,
                "run": name,
                best.quantity: each.score,
                "95 %": f"{each.low:.3f} to {each.high:.3f}",
                **({f"drift ({UNIT})": drifts[place - 1] and str(drifts[place - 1])} if has_drift else {}),
                "order": "" if each.is_surely_before(after) else "could change with the next",
            }
        )
    return Part(heading=f"Order by {best.quantity}", text=text, table=table)
