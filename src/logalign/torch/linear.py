"""Linear maps: the `z = W x + b` that a module computes, whatever it keeps its weight as.

What is measured of W are sums over its rows, so a map gives its weight row block by row block: a low-rank update is
added, a quantized weight widened, a block at a time, and no second copy of the whole is ever made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from logalign.torch import reduce


class LinearMap(ABC):
    """The map `z = W x + b` with W [m, n] and b [m].

    Attributes:
        shape: (m, n) of W.
        dtype: Of W, or of what it is computed in.
        device: Where W is.
        bias: b [m], or None.
        version: Changes when W is changed in place; None where that cannot be told.
        what: What W is, where it is no plain parameter; in words for the site's description.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    bias: Tensor | None = None
    version: int | None = None
    what: str | None = None

    @abstractmethod
    def blocks(self) -> Iterator[Tensor]:
        """Consecutive rows of W, in order; free of autograd."""


class Dense(LinearMap):
    """A weight that is one floating-point tensor [m, n]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        m, n = weight.shape
        self.shape, self.dtype, self.device = (m, n), weight.dtype, weight.device
        self.weight, self.bias = weight, bias
        self.version = None if weight.is_inference() else weight._version

    def blocks(self) -> Iterator[Tensor]:
        """Consecutive rows of W."""
        yield from reduce.blocks(self.weight.detach())


def linear_map(module: nn.Module) -> LinearMap | None:
    """The map that a module computes from [..., n] to [..., m]; None for one that computes none, as far as known."""
    other = nn.Embedding | nn.EmbeddingBag | nn.Bilinear | nn.modules.lazy.LazyModuleMixin
    if isinstance(module, other):
        return None
    weight = weight_of(module)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        return None
    if type(module).__name__ == "Conv1D":  # that of Transformers' GPT-2 keeps [in, out]
        return None
    return Dense(weight, getattr(module, "bias", None))


def weight_of(module: nn.Module) -> Any:
    """What the module calls its weight; None without one.

    A parametrized weight is computed anew on every access, and spectral normalization would take one more step of its
    power iteration if it were asked in training mode: that would change the training.
    """
    if not parametrize.is_parametrized(module, "weight"):
        return getattr(module, "weight", None)
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    steps = [step for step in parametrizations["weight"].modules() if step.training]
    for step in steps:
        step.training = False
    try:
        return module.weight
    finally:
        for step in steps:
            step.training = True
