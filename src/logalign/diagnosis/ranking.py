"""Ranking: orders several trainings by generalization from their own readings, without held-out data.

Method: one quantity orders all runs of a comparison, the first of these that fits them:

1. **Training loss and LAR**, in classifiers with fewer than six readings a pass: `loss + 10 (1 - LAR)`. LAR falls as
   the network fits single samples. A training loss that remains also remains on other samples.
2. **Estimated held-out loss**: the training loss plus all its drops where passes begin. The drops are about equal to
   the memorized loss.
3. **Passes over the data**, where they are too short for the estimate and runs differ in them: fewer are better.
4. **LAR** alone, where losses or passes were not recorded.

The last two are never sure. The estimate orders runs well but does not measure the held-out loss: it is off by half a
nat and more. Held-out data differ from the training data, and no training loss shows by how much. That part is the
same for all runs of a task. So the result is how far a run's held-out loss lies above the first run's, as an interval
that held for 95 % of runs whose recipe it was not fitted on. `python -m benchmarks.generalization compare` fits and
scores the constants below.

The alternative, the training loss alone, orders neither kind: it is lowest for the run that memorized most.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from logalign.diagnosis.comparable import Align, Columns, aligned, columns_of, first, keep_equal, leave_out
from logalign.diagnosis.epochs import MIN_READINGS, memorized
from logalign.diagnosis.robust import Vector
from logalign.errors import InputError, RunError
from logalign.runs.remote import shown
from logalign.runs.run import Run, RunLike, open_run

SIGMAS = 2.5
"""An order by the estimate is sure where two estimates differ by more than so many errors of the difference."""
LOW, HIGH, CLOSE = 0.05, 1.0, 0.4
"""Where estimates differ by `d`, held-out losses differ by `LOW d` (unsure: `-CLOSE`) to `HIGH d + CLOSE`."""
NATS_PER_LAR = 10.0
"""Weight of a LAR that is lower by one, beside the training loss of a classifier."""
MARGIN = 0.2
"""An order by training loss and LAR is sure beyond this margin, in runs that saw their data equally often."""
SEEN_INTO = 6.0
"""Readings that a classifier's pass needs. With fewer, the three before its start overlap those after it."""
EQUAL_PASSES = 1.1
"""Largest ratio of passes over the data that count as equal."""
Quantity = Literal["estimated held-out loss", "training loss and LAR", "passes over the data", "LAR"]
ESTIMATE: Quantity = "estimated held-out loss"
LOSS_AND_LAR: Quantity = "training loss and LAR"
PASSES: Quantity = "passes over the data"
LAR: Quantity = "LAR"


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One run in a ranking.

    Attributes:
        run: The run's path.
        score: Quantity of the order, lower is better. It only orders the runs of one comparison.
        low: Nats by which its held-out loss lies above the first run's, lower end of a 95 % interval. None for the
            first run, and where the order is not by the estimate.
        high: Upper end.
        is_sure: True if it surely stands before the next run, and for the last.
        step: Its last compared step.
    """

    run: str
    score: float
    low: float | None = None
    high: float | None = None
    is_sure: bool = True
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Runs in order, best first.

    Attributes:
        runs: The runs.
        opened: Opened runs by path.
        left_out: Reason why a run was left out, by its path.
        quantity: Quantity that orders them.
        align: Axis of the alignment: "step", "tokens" or "epoch".
        at: Point on it where they were judged, the last that all have.
    """

    runs: Sequence[Ranked]
    opened: Mapping[str, Run]
    left_out: Mapping[str, str]
    quantity: Quantity
    align: Align
    at: float

    def records(self) -> list[dict[str, Any]]:
        """Return every run as a strict JSON object: in order, then those that were left out."""
        common = {"quantity": self.quantity, "align": self.align, "at": self.at}
        ranked = [
            {
                "run": each.run,
                "low": each.low,
                "high": each.high,
                "is_sure": each.is_sure,
                "step": each.step,
                "left_out": None,
                **common,
            }
            for each in self.runs
        ]
        nothing = dict.fromkeys(("low", "high", "is_sure", "step"))
        return ranked + [{"run": run, **nothing, "left_out": why, **common} for run, why in self.left_out.items()]


def rank(runs: Sequence[RunLike], *, site: str | None = None, align: Align = "step") -> Ranking:
    """Order runs by estimated generalization, best first.

    Args:
        runs: Two or more run folders, JSONL or CSV files, or opened runs of one task.
        site: The layer that is compared; the runs' main one by default.
        align: Axis of the alignment: "step", "tokens" (the field tokens_seen) or "epoch" (passes over the data). Steps
            do not compare where batch sizes differ.

    Returns:
        The order. It judges all runs at the last step, token or epoch that all have reached, so that a longer run does
        not seem better. It leaves out a run that does not compare, with the reason. Such a run cannot be read, has
        diverged, has no readings of the layer, fewer than ten up to there, or none of the compared quantity, or ends
        before a third of what half of the runs have reached.

    Raises:
        InputError: if there are fewer than two runs, one run twice, or fewer than two that compare.
    """
    if align not in get_args(Align):
        raise InputError(f"align: expected one of {', '.join(get_args(Align))}, found {align!r}")
    if len(runs) < 2:
        raise InputError(f"expected at least two runs to compare, found {len(runs)}")
    names = [each.name if isinstance(each, Run) else shown(str(each)) for each in runs]
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise InputError(f"expected different runs, found {twice[0]} twice")
    opened: dict[str, Run] = {}
    left_out: dict[str, str] = {}
    parts: dict[str, Columns] = {}
    for name, run in zip(names, runs, strict=True):
        try:
            opened[name] = run if isinstance(run, Run) else open_run(run)
            parts[name] = columns_of(opened[name], site)
        except (RunError, InputError) as error:
            left_out[name] = str(error).removeprefix(f"{name}: ")
    parts, at = aligned(parts, left_out, align)
    quantity = choose(parts, left_out)
    ranked = order(parts, quantity)
    compared = {each.run: opened[each.run] for each in ranked}
    return Ranking(runs=ranked, opened=compared, left_out=left_out, quantity=quantity, align=align, at=at)


def choose(parts: dict[str, Columns], left_out: dict[str, str]) -> Quantity:
    """Choose the first quantity that fits.

    Args:
        parts: Columns of each run from `columns_of`, up to where all are judged. Runs that do not compare are removed.
        left_out: Receives the reasons.

    Raises:
        InputError: if fewer than two runs compare.
    """
    keep_equal(parts, left_out, "m")
    classifies = all(first(part["m"]) <= first(part["n"]) for part in parts.values())
    if classifies and any(_readings_per_pass(part) < SEEN_INTO for part in parts.values()):
        wanted = [LOSS_AND_LAR, LAR, PASSES]
    else:
        wanted = [ESTIMATE, LAR] if _pass_equally_often(parts) else [ESTIMATE, PASSES, LAR]
    for quantity in wanted:
        lacking = {name: why for name, part in parts.items() if (why := _lacks(part, quantity))}
        able = [part for name, part in parts.items() if name not in lacking]
        if 2 * len(able) <= len(parts):
            continue
        if quantity == ESTIMATE and any(estimate(part) is None for part in able):
            continue
        leave_out(parts, left_out, lacking)
        if "lar" in NEEDED[quantity]:
            keep_equal(parts, left_out, "n")
        return quantity
    raise InputError(
        f"expected runs with at least {MIN_READINGS} readings of loss and epoch, or of LAR, found too few; pass loss= "
        "and epoch= to monitor.step()"
    )


def order(parts: Mapping[str, Columns], quantity: Quantity) -> list[Ranked]:
    """Order runs by a quantity that all of them have, best first.

    Args:
        parts: Columns of each run from `columns_of`, up to where all are judged.
        quantity: Quantity that orders them.
    """
    scores = {name: _score(part, quantity) for name, part in parts.items()}
    names = sorted(scores, key=lambda name: (scores[name], name))
    is_equal = _pass_equally_often(parts)
    ranked = []
    for name, after in zip(names, [*names[1:], None], strict=True):
        first_score, first_error = scores[names[0]]
        score, error = scores[name]
        is_sure, low, high = True, None, None
        if after is not None:
            apart, margin = scores[after][0] - score, SIGMAS * math.hypot(error, scores[after][1])
            is_sure = (
                apart > margin if quantity == ESTIMATE else quantity == LOSS_AND_LAR and is_equal and apart > MARGIN
            )
        if quantity == ESTIMATE and name != names[0]:
            low, high = interval(score - first_score, math.hypot(error, first_error))
        step = int(parts[name]["step"].max())
        ranked.append(Ranked(run=name, score=score, low=low, high=high, is_sure=is_sure, step=step))
    return ranked


def estimate(columns: Columns) -> tuple[float, float] | None:
    """Estimate the held-out loss with its standard error from the scatter of readings, or return None."""
    found = memorized(columns["epoch"], columns["loss"])
    return None if found is None else (found.held_out_loss, found.error)


def interval(difference: float, error: float) -> tuple[float, float]:
    """Return the 95 % interval of a run's held-out loss above the first run's.

    Args:
        difference: Difference of their estimates.
        error: Standard error of the difference, from the scatter of readings.

    Example:
        >>> interval(2.0, 0.25), interval(0.5, 0.25)
        ((0.1, 2.4), (-0.4, 0.9))
    """
    low = LOW * difference if difference > SIGMAS * error else -CLOSE
    return low, HIGH * difference + CLOSE


NEEDED: Mapping[Quantity, Sequence[str]] = {
    ESTIMATE: ("loss", "epoch"),
    LOSS_AND_LAR: ("loss", "lar"),
    PASSES: ("epoch",),
    LAR: ("lar",),
}
"""The columns that each quantity needs."""


def _lacks(columns: Columns, quantity: Quantity) -> str | None:
    """Say what a run lacks for a quantity, or return None where nothing is missing."""
    for name in NEEDED[quantity]:
        count = int(np.isfinite(columns[name]).sum())
        if count < MIN_READINGS:
            return f"{count} readings with {'a defined LAR' if name == 'lar' else name}, fewer than {MIN_READINGS}"
    if quantity == ESTIMATE and (np.diff(columns["epoch"][np.isfinite(columns["epoch"])]) < 0).any():
        return "passes over the data that go back"
    return None


def _score(columns: Columns, quantity: Quantity) -> tuple[float, float]:
    """Return a run's score (lower is better) and its standard error, 0 if unknown."""
    if quantity == ESTIMATE:
        estimated = estimate(columns)
        assert estimated is not None, "choose() has looked"
        return estimated
    if quantity == PASSES:
        return _passes(columns), 0.0
    lar = _last(columns["lar"])
    return (-lar if quantity == LAR else _last(columns["loss"]) + NATS_PER_LAR * (1 - lar)), 0.0


def _pass_equally_often(parts: Mapping[str, Columns]) -> bool:
    """Return whether all runs saw their data about equally often, False if any is unknown."""
    passes = [_passes(part) for part in parts.values()]
    return bool(np.max(passes) <= EQUAL_PASSES * np.min(passes))


def _last(values: Vector) -> float:
    """Average the last ten defined values."""
    return float(values[np.isfinite(values)][-MIN_READINGS:].mean())


def _passes(columns: Columns) -> float:
    known = columns["epoch"][np.isfinite(columns["epoch"])]
    return float(known[-1]) if known.size else math.nan


def _readings_per_pass(columns: Columns) -> float:
    """Count readings a pass, infinite if unknown: no short pass was seen."""
    known = columns["epoch"][np.isfinite(columns["epoch"])]
    return (known.size - 1) / float(np.ptp(known)) if known.size > 1 and np.ptp(known) > 0 else math.inf
