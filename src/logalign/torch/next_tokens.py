"""Next tokens: inputs shifted by one as targets if nothing else gives them, and a check against the loss.

A compiled model without labels shows neither targets nor a gradient. Most such models predict the next token. So this
module assumes that, and compares the losses of the rows with the loss that `step()` gets. The comparison detects a
wrong assumption as soon as training has learned something.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

ROWS = 64
"""Rows compared at a time."""
SHARE, SHARE_OF_LABELS, ERRORS = 0.1, 0.5, 4.0
"""Allowed difference of the two means: a share, larger with labels, plus this many standard errors."""


def following(rows: Tensor, mask: Tensor | None, shape: tuple[int, int], *, ignored: int) -> Tensor | None:
    """The inputs shifted by one, [B, L], or None if not tokens."""
    if rows.is_floating_point() or rows.shape != shape or shape[1] < 2:
        return None
    targets = torch.full_like(rows, ignored, dtype=torch.int64)
    targets[:, :-1] = rows[:, 1:]
    if mask is not None and mask.shape == rows.shape:
        targets[:, :-1].masked_fill_(mask[:, 1:] == 0, ignored)
    return targets


class Agreement:
    """Checks if row losses with the next tokens as targets agree with the training loss.

    Attributes:
        is_asked: Whether any targets were used without a gradient to confirm them.
        is_assumed: Whether they are the next tokens, not labels.
        refuted: Why the targets are wrong, or None if nothing contradicts them.
    """

    def __init__(self) -> None:
        self.is_asked = self.is_assumed = False
        self.refuted: str | None = None
        self._rows: list[float] = []
        self._means: list[float] = []

    def add(self, losses: Iterable[float]) -> None:
        """Add losses of rows since the last reading."""
        if self.is_asked:
            self._rows += [float(each) for each in losses if math.isfinite(each)]

    def compare(self, loss: float | None) -> None:
        """Compare with the mean training loss since the last reading."""
        if not self._rows or self.refuted is not None:
            return
        if loss is None:
            if not self.is_assumed:
                return
            self.refuted = "no loss is passed to step() that could tell whether targets are the next tokens"
            return
        self._means.append(loss)
        if len(self._rows) < ROWS:
            return
        own, expected = float(np.mean(self._rows)), float(np.mean(self._means))
        error = float(np.std(self._rows)) / math.sqrt(len(self._rows))
        share = SHARE if self.is_assumed else SHARE_OF_LABELS
        if abs(own - expected) > share * abs(expected) + ERRORS * error:
            what = "targets are not the next tokens" if self.is_assumed else "the head's outputs are not what is scored"
            self.refuted = f"{what}: with those the loss is {own:.4g}, and step() gets {expected:.4g}"
        self._rows, self._means = [], []
