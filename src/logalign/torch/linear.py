"""Linear maps: the `z = W x + b` that a module computes, whatever it keeps its weight as.

What is measured of W are sums over its rows, so a map gives its weight row block by row block: a low-rank update is
added, a quantized weight widened, a block at a time, and no second copy of the whole is ever made.

Method: by type. A module or a tensor of a type that is not known is refused by name, rather than measured as what it
may look like: a packed 4-bit weight is a tensor of numbers, too, and its norm is none of the layer's.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from logalign.errors import SiteError
from logalign.torch import reduce

OBSERVE = "hand it over yourself, with watch(model, layers=[]) and monitor.observe(weight, inputs)"
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NO_LAYERS = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Bilinear,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.modules.lazy.LazyModuleMixin,
)
"""Modules with a weight [m, n] that compute no `W x`."""
MEGATRON_LAYERS = "megatron.core.tensor_parallel.layers"


class LinearMap(ABC):
    """The map `z = W x + b` with W [m, n] and b [m].

    Attributes:
        name: The layer's, where it is known; for errors.
        shape: (m, n) of W.
        dtype: Of W, or of what it is computed in.
        device: Where W is.
        parameter: The parameter that W is, or is made of; what other layers may share.
        bias: b [m], or None.
        version: Changes when W is changed in place; None where that cannot be told.
        what: What W is, where it is no plain parameter; in words for the site's description.
        exact: Whether the module returns `W x + b` as it is. Where it does not, or not only that, E_Z is taken from W
            and the inputs, as where a layer has no forward of its own.
    """

    name: str | None = None
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    parameter: Tensor | None = None
    bias: Tensor | None = None
    version: int | None = None
    what: str | None = None
    exact: bool = True

    @abstractmethod
    def blocks(self) -> Iterator[Tensor]:
        """Consecutive rows of W, in order; free of autograd."""

    def error(self, message: str) -> SiteError:
        """That W cannot be read, and why."""
        return SiteError(message if self.name is None else f"layer {self.name!r}: {message}")

    def seen(self, inputs: Tensor, outputs: Any) -> tuple[Tensor, Tensor | None]:
        """What a forward took and returned, as the map's inputs [..., n] and outputs [..., m]; None if not exact."""
        return inputs, outputs if self.exact else None


class Dense(LinearMap):
    """A weight that is one floating-point tensor [m, n].

    Args:
        weight: W.
        bias: b.
        parameter: The parameter that W is a view of, where it is not W itself.
        exact: Whether the module returns `W x + b`.
        what: What to say of W.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        parameter: Tensor | None = None,
        exact: bool = True,
        what: str | None = None,
    ) -> None:
        m, n = weight.shape
        self.shape, self.dtype, self.device = (m, n), weight.dtype, weight.device
        self.weight, self.bias = weight, bias
        self.parameter = weight if parameter is None else parameter
        self.version = version_of(weight)
        self.exact, self.what = exact, what

    def blocks(self) -> Iterator[Tensor]:
        """Consecutive rows of W."""
        yield from reduce.blocks(self.weight.detach())


class Partitioned(LinearMap):
    """A weight that is whole only while its layer runs, as under ZeRO-3; its shape is known, its numbers are not."""

    def __init__(self, weight: Tensor, shape: tuple[int, int], bias: Tensor | None) -> None:
        self.shape, self.dtype, self.device = shape, weight.dtype, weight.device
        self.parameter, self.bias = weight, bias
        self.what = "partitioned over ranks between forwards"

    def blocks(self) -> Iterator[Tensor]:
        """Refuse.

        Raises:
            SiteError: the weight is not there.
        """
        raise self.error(
            f"expected a weight {self.shape} that is whole while its layer runs, found it empty; gather it (as "
            f"deepspeed.zero.GatheredParameters does) and {OBSERVE}"
        )


class Patches(LinearMap):
    """A convolution: the linear map from the patches of its input, n = channels x kernel, to its output channels."""

    def __init__(self, module: nn.modules.conv._ConvNd, weight: Tensor, bias: Tensor | None) -> None:
        self.shape, self.dtype, self.device = (weight.shape[0], weight[0].numel()), weight.dtype, weight.device
        self.parameter, self.bias, self.version = weight, bias, version_of(weight)
        self.what = f"of patches {' x '.join(map(str, weight.shape[1:]))}"
        self._rows, self._module = weight.detach().flatten(1), module

    def blocks(self) -> Iterator[Tensor]:
        """Consecutive rows of W."""
        yield from reduce.blocks(self._rows)

    def seen(self, inputs: Tensor, outputs: Any) -> tuple[Tensor, Tensor | None]:
        """Patches [..., positions, n] and outputs [..., positions, m]: a patch for each position of the output."""
        module = self._module
        axes = len(module.kernel_size)
        single = inputs.ndim == axes + 1
        if single:
            inputs, outputs = inputs[None], outputs[None]
        # As the module pads: `_reversed_padding_repeated_twice` is what it keeps for F.pad, "same" worked out.
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = F.pad(inputs.detach(), module._reversed_padding_repeated_twice, mode=mode)
        if axes == 1:
            inputs = inputs[:, :, None]
        ones = (1,) * (2 - axes)
        patches = F.unfold(
            inputs, ones + module.kernel_size, dilation=ones + module.dilation, stride=ones + module.stride
        ).transpose(1, 2)
        outputs = outputs.detach().flatten(2).transpose(1, 2)
        return (patches[0], outputs[0]) if single else (patches, outputs)


class FirstRows(LinearMap):
    """The first rows of another map: what is beyond them is padding.

    Args:
        whole: The map.
        rows: How many of its rows count.
    """

    def __init__(self, whole: LinearMap, rows: int) -> None:
        self._whole = whole
        self.shape, self.dtype, self.device = (rows, whole.shape[1]), whole.dtype, whole.device
        self.parameter, self.version, self.what, self.exact = whole.parameter, whole.version, whole.what, whole.exact
        self.bias = None if whole.bias is None else whole.bias[:rows]

    def blocks(self) -> Iterator[Tensor]:
        """Consecutive rows of W."""
        left = self.shape[0]
        for block in self._whole.blocks():
            if left <= 0:
                return
            yield block[:left]
            left -= block.shape[0]


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


def bias_of(module: nn.Module) -> Tensor | None:
    """The module's bias; None without one."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def version_of(*tensors: Tensor) -> int | None:
    """Changes when one of these is changed in place; None where that cannot be told."""
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return sum(tensor._version for tensor in tensors)


def is_loaded(thing: object, where: str, name: str) -> bool:
    """Whether a thing is of a class of a package; one that is not imported has no instances."""
    found = getattr(sys.modules.get(where), name, None)
    return found is not None and isinstance(thing, found)


def kind(thing: object) -> str:
    """The type of a module or tensor, with its package where that is not PyTorch."""
    where = type(thing).__module__.partition(".")[0]
    return type(thing).__name__ if where in ("torch", "__main__", "builtins") else f"{where}'s {type(thing).__name__}"
