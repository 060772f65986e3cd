"""Interpret a name in another tool's log: a training or held-out loss, an epoch, a step or a learning rate.

Method: the words of a name decide, so that `train/loss`, `Loss/train`, `train_loss_step` and `TrainLoss` mean the
same. A name with any other word (`train/box_loss`, `best_val_loss`) has none of these meanings. The alternative, a
list of whole names, covers only the projects that it was made from.
"""

from __future__ import annotations

import re
from typing import Literal

Meaning = Literal["loss", "val_loss", "epoch", "step", "lr", "tokens_seen"]

TRAINING = frozenset({"train", "training", "trainer", "trn"})
HELD_OUT = frozenset({"val", "valid", "validation", "eval", "evaluation", "test", "dev"})
PLAIN = frozenset(
    {"epoch", "avg", "average", "mean", "total", "metric", "metrics", "scalar", "scalars", "logs", "logalign"}
)
"""Words that do not change the meaning of a loss."""
OF_A_BATCH = frozenset({"step", "batch", "iter", "running", "smooth", "smoothed"})
"""The same for a training loss, but one batch's loss is no held-out loss."""
KINDS = frozenset({"lm", "nll", "ce", "xent", "cross", "entropy"})
COUNTS = frozenset({"step", "steps", "iter", "iters", "iteration", "iterations", "update", "updates"})
TOKENS = ({"num", "input", "tokens", "seen"}, {"tokens", "seen"})


def words_of(name: str) -> list[str]:
    """Return the words of a name in lower case.

    Example:
        >>> words_of("train/lossStep"), words_of("lr-AdamW/pg1"), words_of("Loss/val")
        (['train', 'loss', 'step'], ['lr', 'adam', 'w', 'pg'], ['loss', 'val'])
    """
    return re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())


def meaning_of(name: str) -> Meaning | None:
    """Return the meaning of a name, or None where the name does not say.

    Example:
        >>> [
        ...     meaning_of(name)
        ...     for name in ("Loss/train", "eval_loss", "trainer/global_step", "lr-AdamW", "train/box_loss")
        ... ]
        ['loss', 'val_loss', 'step', 'lr', None]
    """
    order = words_of(name)
    words = set(order)
    others = words - TRAINING
    if "loss" in words or words & {"nll", "xent"}:
        rest = words - {"loss"} - KINDS - PLAIN
        if rest <= TRAINING | OF_A_BATCH:
            return "loss"
        return "val_loss" if rest <= HELD_OUT else None
    if others in ({"epoch"}, {"epochs"}):
        return "epoch"
    if len(others - {"global"}) == 1 and others - {"global"} <= COUNTS:
        return "step"
    if {"learning", "rate"} <= words or (order and "lr" in (order[0], order[-1])):
        return "lr"
    return "tokens_seen" if others in TOKENS else None
