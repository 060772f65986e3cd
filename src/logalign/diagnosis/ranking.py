"""Ranking: which of several trainings generalizes best, by what their own readings say, without held-out data.

Method: one quantity for all runs of a comparison, the first of these that every run can give:

1. **Estimated held-out loss**: the training loss, plus all that it dropped at the beginnings of passes, which is what
   was memorized. For data that comes in passes of several readings; where none has repeated, nothing was memorized.
2. **Vocabulary-centered LAR** (plain, where that was not recorded): the more directions the head needs, the less of
   what it fits is a rule. For runs on the same data that fit it about equally well, as with label noise.

The alternative, the training loss, orders neither: it is lowest for the run that memorized most. Compare runs of one
task at equal steps: an estimate is of the training distribution of its own run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from logalign.diagnosis.epochs import memorized
from logalign.diagnosis.series import FORM_NAMES
from logalign.diagnosis.trend import Vector, noise
from logalign.errors import InputError
from logalign.readings import UNEMBEDDING
from logalign.runlog import Run, open_run
from logalign.samples.passes import passes_of

LAST_READINGS = 10
"""Readings at the end of a run whose mean LAR is compared."""
SIGMAS = 1.96
HELD_OUT_LOSS = "estimated held-out loss"

Align = Literal["step", "tokens", "epoch"]
ALIGNMENTS: Mapping[str, str] = {"step": "step", "tokens": "tokens_seen", "epoch": "epoch"}
"""The column of each."""

RunLike = str | os.PathLike[str] | Run


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One run in an order.

    Attributes:
        run: The run's path.
        score: The quantity that was compared.
        low: Lower end of its 95 % interval, from the scatter of readings; how far runs of other seeds lie is not in it.
        high: Upper end.
        quantity: "estimated held-out loss", where less is better, or a form of LAR, where more is.
        step: This run's last step that was compared.
        align: Along what the runs were aligned: "step", "tokens" or "epoch".
        at: Where on it they were judged, the last that all of them have; with "step", the step.
    """

    run: str
    score: float
    low: float
    high: float
    quantity: str
    step: int
    align: Align = "step"
    at: float | None = None

    def is_surely_before(self, after: Ranked | None) -> bool:
        """Whether the intervals of this run and of the one after it in the order lie apart; so for the last run."""
        if after is None:
            return True
        return self.high < after.low if self.quantity == HELD_OUT_LOSS else self.low > after.high

    def record(self) -> dict[str, Any]:
        """The entry as an object that strict JSON can hold."""
        return {
            "run": self.run,
            "score": self.score,
            "low": self.low,
            "high": self.high,
            "quantity": self.quantity,
            "step": self.step,
            "align": self.align,
            "at": self.step if self.at is None else self.at,
        }


def rank(runs: Sequence[RunLike], *, site: str | None = None, align: Align = "step") -> list[Ranked]:
    """Order runs by estimated generalization, best first.

    Args:
        runs: Two or more run folders, JSONL or CSV files, or opened runs of one task.
        site: The layer that is compared; the runs' main one by default.
        align: "step", "tokens" (the field tokens_seen) or "epoch" (passes over the data): along what the runs are
            aligned. Steps do not compare where batches have other sizes.

    Returns:
        One entry a run. All runs are judged at the last step, token or epoch that all of them have reached, so that a
        longer run is not taken for a better one.

    Raises:
        RunError: a run cannot be read.
        InputError: fewer than two runs, the same run twice, layers that do not compare (`scores`), fewer than ten
            readings with a defined LAR before the last step in common, or a run without what they are aligned on.
    """
    if align not in get_args(Align):
        raise InputError(f"align: expected one of {', '.join(get_args(Align))}, found {align!r}")
    opened = [run if isinstance(run, Run) else open_run(run) for run in runs]
    names = [run.name for run in opened]
    if len(opened) < 2:
        raise InputError(f"expected at least two runs to compare, found {len(opened)}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"expected different runs, found {twice[0]} twice")
    columns = [_with_passes(run.columns(site or str(run.meta.get("main", UNEMBEDDING)))) for run in opened]
    for name, each in zip(names, columns, strict=True):
        if np.isfinite(each["lar"]).sum() < LAST_READINGS:
            found = int(np.isfinite(each["lar"]).sum())
            raise InputError(f"{name}: expected at least {LAST_READINGS} readings with a defined LAR, found {found}")
        if not np.isfinite(each[ALIGNMENTS[align]]).any():
            raise InputError(
                f"{name}: expected readings with {ALIGNMENTS[align]} to align the runs on, found none; align on steps"
            )
    last = min(float(np.nanmax(each[ALIGNMENTS[align]])) for each in columns)
    parts = [_until(each, ALIGNMENTS[align], last) for each in columns]
    for name, each in zip(names, parts, strict=True):
        if np.isfinite(each["lar"]).sum() < LAST_READINGS:
            raise InputError(
                f"{name}: expected at least {LAST_READINGS} readings up to {position(align, last)}, the last that all "
                f"runs have, found {int(np.isfinite(each['lar']).sum())}"
            )
    quantity, scored = scores(parts)
    ranked = [
        Ranked(
            run=name,
            score=score,
            low=score - SIGMAS * error,
            high=score + SIGMAS * error,
            quantity=quantity,
            step=int(part["step"].max()),
            align=align,
            at=last,
        )
        for name, part, (score, error) in zip(names, parts, scored, strict=True)
    ]
    less_is_better = quantity == HELD_OUT_LOSS
    return sorted(ranked, key=lambda each: (each.score if less_is_better else -each.score, each.run))


def _with_passes(columns: Mapping[str, Vector]) -> dict[str, Vector]:
    """With the passes over the data as the epoch, where samples tell them."""
    return {**columns, "epoch": passes_of(columns["step"], columns["passes"], columns["epoch"])}


def position(align: Align, at: float) -> str:
    """A place on what runs are aligned on, in words.

    Example:
        >>> position("step", 1200.0), position("tokens", 5e6), position("epoch", 1.5)
        ('step 1,200', '5,000,000 tokens', 'epoch 1.5')
    """
    if align == "epoch":
        return f"epoch {at:.4g}"
    return f"step {at:,.0f}" if align == "step" else f"{at:,.0f} tokens"


def scores(parts: Sequence[Mapping[str, Vector]]) -> tuple[str, list[tuple[float, float]]]:
    """The quantity that several runs are compared by, and (score, standard error) of each.

    Args:
        parts: Columns of each run as `Run.columns()` gives them, up to the step at which all are judged.

    Raises:
        InputError: layers whose numbers do not compare: other vocabularies, or, where LAR decides, other fan-ins.
    """
    _check_equal(parts, "m", "one vocabulary: losses and LARs of different ones do not compare")
    scored = [_held_out_loss(columns) for columns in parts]
    known = [score for score in scored if score is not None]
    if len(known) == len(parts):
        return HELD_OUT_LOSS, known
    _check_equal(parts, "n", "one fan-in, for LARs are compared here: passes are too short for an estimate of the loss")
    form = "lar_vocab_centered" if all(_defined(each, "lar_vocab_centered") for each in parts) else "lar"
    return FORM_NAMES[form], [_lar_at_end(each[form]) for each in parts]


def _check_equal(parts: Sequence[Mapping[str, Vector]], name: str, what: str) -> None:
    found = sorted({value for columns in parts if (value := _first(columns[name])) is not None})
    if len(found) > 1:
        raise InputError(f"expected layers of {what}, found {name} = {', '.join(map(str, found))}")


def _held_out_loss(columns: Mapping[str, Vector]) -> tuple[float, float] | None:
    """The estimate with its standard error, or None where it cannot be had."""
    found = memorized(columns["epoch"], loss_of(columns))
    return None if found is None else (found.held_out_loss, found.error)


def loss_of(columns: Mapping[str, Vector]) -> Vector:
    """The mean loss since the reading before, where it was recorded, else that of the reading's own step."""
    means = columns["loss_mean"]
    loss: Vector = np.where(np.isfinite(means), means, columns["loss"])
    return loss


def _lar_at_end(lar: Vector) -> tuple[float, float]:
    values = lar[np.isfinite(lar)][-LAST_READINGS:]
    return float(values.mean()), float(noise(values) / np.sqrt(values.size))


def _until(columns: Mapping[str, Vector], axis: str, last: float) -> dict[str, Vector]:
    kept = columns[axis] <= last
    return {name: values[kept] for name, values in columns.items()}


def _defined(columns: Mapping[str, Vector], name: str) -> bool:
    return bool(np.isfinite(columns[name]).sum() >= LAST_READINGS)


def _first(values: Vector) -> int | None:
    known = values[np.isfinite(values)]
    return int(known[0]) if known.size else None
