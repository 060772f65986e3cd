"""Row losses: the loss of a few rows of a batch on a few of their tokens, and targets told by the gradient.

Method: the chosen logits are copied, [r, q, V], and the rest is as in any cross entropy. Where targets are not given,
the gradient of the logits tells them, and whether the loss is a cross entropy at all.

Shapes: B rows of a batch, r of them looked at, L tokens of a row, q of them looked at, V logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from logalign.torch import reduce
from logalign.torch.linear import LinearMap

UNBALANCED, NOT_STRAIGHT = 0.02, 0.01
"""The gradient of a cross entropy may differ from what it should be by these shares, which half precision keeps to."""
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


def targets_in(gradient: Tensor, logits: Tensor, logsumexp: Tensor) -> tuple[Tensor, Tensor]:
    """Targets that the gradient of the logits [r, q, V] tells, and where it does, [r, q] each; with their logsumexp.

    The gradient of a cross entropy is `c (p - y)` with p the softmax and y the target, smoothed or not. It sums to
    zero, is lowest at the target, and elsewhere a straight line in p, which is looked at for some of the logits. Where
    a token does not count it is zero.
    """
    lowest, targets = gradient.min(-1)
    total, lowest = gradient.sum(-1, dtype=torch.float32), lowest.float()
    known = (lowest < 0) & (total.abs() <= -2 * UNBALANCED * lowest)
    width = logits.shape[-1]
    if width == 2:
        return targets, known
    some = torch.arange(min(LINE, width), device=logits.device) * width // min(LINE, width)
    others = (some != targets[..., None]).float()
    p, g = torch.exp(logits[..., some].float() - logsumexp[..., None]), gradient[..., some].float()
    count = others.sum(-1, keepdim=True)
    dp, dg = (others * (each - (others * each).sum(-1, keepdim=True) / count) for each in (p, g))
    line = (dp * dg).sum(-1) / dp.square().sum(-1)
    left = (dg - line[..., None] * dp).square().sum(-1)
    known &= left <= NOT_STRAIGHT * dg.square().sum(-1)
    # The line says c, and so does the target: equal to it, or less where it is smoothed.
    share = -lowest / (line * (1 - torch.exp(_at(logits, targets) - logsumexp)))
    return targets, known & (share > SMOOTHED) & (share < 1 + UNBALANCED)
