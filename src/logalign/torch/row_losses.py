"""Row losses: the loss of a few rows of a batch on a few of their tokens, and targets told by the gradient.

Method: the chosen logits are copied, [r, q, V], and the rest is as in any cross entropy. Where targets are not given,
the gradient of the logits tells them, and whether the loss is a cross entropy at all.

Shapes: B rows of a batch, r of them looked at, L tokens of a row, q of them looked at, V logits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from logalign.torch import reduce
from logalign.torch.linear import LinearMap


class Tolerance(NamedTuple):
    """How far the gradient of a cross entropy may be from what it should be, in its precision.

    Attributes:
        unbalanced: The sum of it, as a share of its size.
        not_straight: The part of it that is no straight line in p, as a share.
        fitted: How far p of the target may be from 1 where nothing is left of it but rounding.
    """

    unbalanced: float
    not_straight: float
    fitted: float


FULL, HALF = Tolerance(0.02, 0.01, 1e-4), Tolerance(0.15, 0.05, 0.05)
SMOOTHED = 0.4
"""A smoothed target may lower the gradient there to this share."""
LINE = 64
"""Logits by which the gradient of a cross entropy is told from others."""


class Chosen(NamedTuple):
    """The rows of a forward that are looked at, and of each the tokens.

    Attributes:
        places: Which rows, [r].
        hashes: Their hashes first, and then those of further rows that may be tracked.
        tokens: Which tokens of each, [r, q].
        counts: Which of these count, [r, q].
        targets: Their targets, [r, q]; None where they are not known.
    """

    places: Tensor
    hashes: Tensor
    tokens: Tensor
    counts: Tensor
    targets: Tensor | None

    def of(self, source: Tensor, shape: tuple[int, int]) -> Tensor:
        """What these tokens have of a tensor with as many as B L tokens: [r, q, ...]."""
        return source.reshape(*shape, source.shape[-1])[self.places[:, None], self.tokens]


def logits_of(hidden: Tensor, mapped: LinearMap) -> Tensor:
    """Logits [r, q, V] of hidden states [r, q, n], in float32 at least."""
    rows = reduce.at_least_float32(hidden)
    logits = torch.cat([rows @ block.to(rows.dtype).T for block in mapped.blocks()], dim=-1)
    return logits if mapped.bias is None else logits + mapped.bias.detach().to(logits.dtype)


def losses_of(logits: Tensor, chosen: Chosen, logsumexp: Tensor | None = None) -> Tensor:
    """Mean loss of each row over its tokens that count, in nats, [r]; NaN where none does."""
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
    """Mean loss of each row, [r], as the gradient of the logits [r, q, V] tells; NaN where it tells none.

    The gradient of a cross entropy is `c (p - y)` with p the softmax and y the target, smoothed or not. It sums to
    zero, is lowest at the target, and elsewhere a straight line in p, which is looked at for some of the logits. Where
    a token does not count it is zero. It is nothing but rounding where p of the target is 1: such a token counts, with
    the most likely one as its target.

    One token whose gradient is another's leaves its row without a loss. Were only the token left out, those that are
    left would be a choice that depends on how well they fit. Targets that are known are used, and the gradient has to
    agree with them.
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
        # The line says c, and so does the target: equal to it, or less where it is smoothed.
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
