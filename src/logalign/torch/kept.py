"""Kept: hashes and losses of samples on the device, from one reading to the next.

Nothing here waits for the device, so no control flow depends on the hashes. On overflow, the samples with the highest
hashes are dropped first, because they are the first to be untracked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from logalign.torch.reduce import wide
from logalign.torch.rows import HIGHEST

MOST = 4096
"""Visits kept between two readings."""
PIECES = 64
"""Tensors kept before they are joined."""
BITS = 21
"""Bits of a hash in each of three numbers: float32 holds integers up to 2**24."""
COLUMNS = 5
"""Numbers in a packed visit: three for its hash, its loss, and its step from 1, or 0 if there is no visit."""


class Visit(NamedTuple):
    """Visits of one step, on the host."""

    step: int
    hashes: np.ndarray[Any, np.dtype[np.int64]]
    losses: np.ndarray[Any, np.dtype[np.float64]]


class Kept:
    """The visits since the last reading.

    Attributes:
        threshold: Samples with a higher hash are the first to be dropped.
    """

    def __init__(self) -> None:
        self.threshold = HIGHEST
        self._pieces: list[tuple[Tensor, Tensor, Tensor]] = []  # steps, hashes, losses

    def add(self, step: int, hashes: Tensor, losses: Tensor) -> None:
        """Keep visits of a step: hashes [r] and losses [r] on one device."""
        self._pieces.append((torch.full_like(hashes, step), hashes, losses.detach().float()))
        if len(self._pieces) > PIECES:
            self._pieces = [self._joined(MOST, hashes.device)]

    def mark(self) -> int:
        """A place to return to, if only visits of one forward follow."""
        return len(self._pieces)

    def undo(self, mark: int) -> None:
        """Drop visits added since."""
        del self._pieces[mark:]

    def clear(self) -> None:
        """Drop all."""
        self._pieces = []

    def take(self, device: torch.device, *, first: int, count: int | None = None) -> Tensor:
        """Pack all visits for one transfer, [visits, COLUMNS], and drop them.

        Args:
            device: The tensor's device.
            first: The step from which steps are counted.
            count: Number of visits in the tensor, or None for as many as were kept.
        """
        most = MOST if count is None else count
        dtype = wide(device)
        packed = torch.zeros((0, COLUMNS), dtype=dtype, device=device)
        if self._pieces:
            steps, hashes, losses = self._joined(most, device)
            low = (1 << BITS) - 1
            parts = [hashes & low, (hashes >> BITS) & low, hashes >> (2 * BITS), losses, steps - first + 1]
            packed = torch.stack([each.to(dtype) for each in parts], dim=1)
        self.clear()
        if count is None or packed.shape[0] == count:
            return packed
        return torch.cat([packed, packed.new_zeros((count - packed.shape[0], COLUMNS))])

    def state(self) -> list[list[Any]]:
        """All visits as step, hash and loss (None if not finite), without dropping them."""
        if not self._pieces:
            return []
        steps, hashes, losses = (each.tolist() for each in self._joined(MOST, torch.device("cpu")))
        return [
            [step, each, loss if math.isfinite(loss) else None]
            for step, each, loss in zip(steps, hashes, losses, strict=True)
        ]

    def load(self, state: Sequence[Sequence[Any]]) -> None:
        """Restore a result of `state()`."""
        self.clear()
        if state:
            steps, hashes = (torch.tensor([each[i] for each in state], dtype=torch.int64) for i in range(2))
            losses = torch.tensor([math.nan if each[2] is None else each[2] for each in state])
            self._pieces.append((steps, hashes, losses))

    def _joined(self, most: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        steps, hashes, losses = (
            torch.cat([each.to(device) for each in column]) for column in zip(*self._pieces, strict=True)
        )
        if hashes.numel() > most:
            kept = torch.topk(torch.where(hashes > self.threshold, HIGHEST, hashes), most, largest=False).indices
            steps, hashes, losses = steps[kept], hashes[kept], losses[kept]
        return steps, hashes, losses


def unpack(packed: np.ndarray[Any, Any], *, first: int) -> list[Visit]:
    """Unpack visits from a host tensor [visits, COLUMNS], by step, in order."""
    rows = np.asarray(packed, dtype=np.float64).reshape(-1, COLUMNS)
    rows = rows[rows[:, 4] > 0]
    low, middle, high = (rows[:, i].astype(np.int64) for i in range(3))
    hashes = low | (middle << BITS) | (high << (2 * BITS))
    steps = rows[:, 4].astype(np.int64) - 1 + first
    return [Visit(int(step), hashes[steps == step], rows[steps == step, 3]) for step in np.unique(steps)]
