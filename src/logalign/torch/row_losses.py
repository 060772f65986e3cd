"""Row losses: the loss of a few rows of a batch on a few of their tokens, with targets inferred from the gradient.

Method: the chosen logits [r, q, V] are copied, and the rest is as in any cross entropy. If targets are not given, the
gradient of the logits shows them, and shows if the loss is a cross entropy at all.

Shapes: B rows of a batch, r of them chosen, L tokens of a row, q of them chosen, V logits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from logalign.torch import reduce
from logalign.torch.linear import LinearMap


class Tolerance(NamedTuple):
    """Tolerances for the gradient of a cross entropy in its precision.

    Attributes:
        unbalanced: Its sum, as a share of its size.
        not_straight: The part of it that is not linear in p, as a share.
        fitted: Distance of the target's p from 1 at which only rounding is left of it.
    """

    unbalanced: float
    not_straight: float
    fitted: float


FULL, HALF = Tolerance(0.02, 0.01, 1e-4), Tolerance(0.15, 0.05, 0.05)
SMOOTHED = 0.4
"""Smoothing may lower the gradient at the target to this share."""
LINE = 64
"""Logits used to tell a cross entropy's gradient from others."""


class Chosen(NamedTuple):
    """The chosen rows of a forward, and the chosen tokens of each.

    Attributes:
        places: Row indices, [r].
        hashes: Hashes of these rows, then of further rows that may be tracked.
        tokens: Token indices in each row, [r, q].
        counts: Whether each token counts, [r, q].
        targets: Targets [r, q], or None if unknown.
    """

    places: Tensor
    hashes: Tensor
    tokens: Tensor
    counts: Tensor
    targets: Tensor | None

    def of(self, source: Tensor, shape: tuple[int, int]) -> Tensor:
        """These tokens' entries [r, q, ...] of a tensor with B L tokens."""
        return source.reshape(*shape, source.shape[-1])[self.places[:, None], self.tokens]


def logits_of(hidden: Tensor, mapped: LinearMap) -> Tensor:
    """Logits [r, q, V] of hidden states [r, q, n], in at least float32."""
    rows = reduce.at_least_float32(hidden)
    logits = torch.cat([rows @ block.to(rows.dtype).T for block in mapped.blocks()], dim=-1)
    return logits if mapped.bias is None else logits + mapped.bias.detach().to(logits.dtype)


def losses_of(logits: Tensor, chosen: Chosen, logsumexp: Tensor | None = None) -> Tensor:
    """Mean loss [r] of each row over tokens that count, in nats, or NaN if none does."""
    targets = chosen.targets
    assert targets is not None
    total = torch.logsumexp(logits.float(), dim=-1) if logsumexp is None else logsumexp
    inside = chosen.counts & (targets >= 0) & (targets < logits.shape[-1])
    each = total - _at(logits, torch.where(inside, targets, 0).to(torch.int64))
    return torch.where(inside, each, 0.0).sum(-1) / inside.sum(-1)


def _at(logits: Tensor, targets: Tensor) -> Tensor:
    """The logits [r, q, V] at the targets [r, q]."""
    return logits.gather(-1, targets[..., None])[..., 0].float()


def losses_by_gradient(gradient: Tensor, logits: Tensor, chosen: Chosen, logsumexp: Tensor) -> Tensor:
    """Mean loss [r] of each row with targets from the gradient of the logits [r, q, V], or NaN if it shows none.

    The gradient of a cross entropy is `c (p - y)` with p the softmax and y the target, smoothed or not. It sums to
    zero, is lowest at the target, and is linear in p elsewhere, which is checked on some of the logits. It is zero if a
    token does not count. It is only rounding if p of the target is 1. Such a token counts, with the most likely one as
    its target.

    One token with a gradient of another kind leaves its row without a loss. If only that token were excluded, the rest
    would be a selection that depends on their fit. Known targets are used, and the gradient must agree with them.
    """
    tolerance = FULL if gradient.dtype in (torch.float32, torch.float64) else HALF
    lowest, targets = gradient.min(-1)
    total, lowest = gradient.sum(-1, dtype=torch.float32), lowest.float()
    is_zero = (lowest == 0) & (total == 0)
    known = (lowest < 0) & (total.abs() <= -2 * tolerance.unbalanced * lowest)
    width = logits.shape[-1]
    if width > 2:
        some = torch.arange(min(LINE, width), device=logits.device) * width // min(LINE, width)
        others = (some != targets[..., None]).float()
        p, g = torch.exp(logits[..., some].float() - logsumexp[..., None]), gradient[..., some].float()
        count = others.sum(-1, keepdim=True)
        dp, dg = (others * (each - (others * each).sum(-1, keepdim=True) / count) for each in (p, g))
        line = (dp * dg).sum(-1) / dp.square().sum(-1)
        left = (dg - line[..., None] * dp).square().sum(-1)
        known &= left <= tolerance.not_straight * dg.square().sum(-1)
        # The line gives c. The target gives the same, or less if it is smoothed.
        share = -lowest / (line * (1 - torch.exp(_at(logits, targets) - logsumexp)))
        known &= (share > SMOOTHED) & (share < 1 + tolerance.unbalanced)
    highest, likely = logits.max(-1)
    fitted = (torch.exp(highest.float() - logsumexp) >= 1 - tolerance.fitted) & ~known
    if chosen.targets is None:
        found = chosen._replace(targets=torch.where(fitted, likely, targets), counts=chosen.counts & (known | fitted))
    else:
        found = chosen
        known &= targets == chosen.targets
    stray = (chosen.counts & ~known & ~fitted & ~is_zero).any(-1)
    return torch.where(stray, math.nan, losses_of(logits, found, logsumexp))
