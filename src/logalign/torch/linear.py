"""Linear maps: the `z = W x + b` that a module computes, for any storage of its weight.

The measured quantities of W are sums over its rows, so a map yields its weight in blocks of rows. It adds a low-rank
update or widens a quantized weight one block at a time, and never makes a second copy of the whole.

Method: by type. An unknown type of module or tensor is refused by name. The alternative, measuring it as what it looks
like, is unsafe: a packed 4-bit weight is also a tensor of numbers, but its norm is not the layer's.
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
        name: The layer's name for errors, if known.
        shape: (m, n) of W.
        dtype: The dtype of W, or of its computation.
        device: The device of W.
        parameter: The parameter that is W or its source. Other layers may share it.
        bias: b [m], or None.
        version: A number that changes when W changes in place, or None if unknown.
        what: The kind of W for the site's description, if it is not a plain parameter.
        exact: Whether the module returns exactly `W x + b`. Otherwise W and the inputs give E_Z, as for a layer
            without a forward of its own.
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
        """Yield W in row blocks, in order, without autograd."""

    def error(self, message: str) -> SiteError:
        """Say why W cannot be read."""
        return SiteError(message if self.name is None else f"layer {self.name!r}: {message}")

    def seen(self, inputs: Tensor, outputs: Any) -> tuple[Tensor, Tensor | None]:
        """Return a forward's tensors as the map's inputs [..., n] and outputs [..., m] (None if not exact)."""
        return inputs, outputs if self.exact else None


class Dense(LinearMap):
    """A weight that is one floating-point tensor [m, n].

    Args:
        weight: W.
        bias: b.
        parameter: The parameter that W is a view of, if not W itself.
        exact: Whether the module returns `W x + b`.
        what: A label for W.
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
        """Yield W in row blocks."""
        yield from reduce.blocks(self.weight.detach())


class Partitioned(LinearMap):
    """A weight that is whole only while its layer runs, as under ZeRO-3, with known shape and unknown numbers."""

    def __init__(self, weight: Tensor, shape: tuple[int, int], bias: Tensor | None) -> None:
        self.shape, self.dtype, self.device = shape, weight.dtype, weight.device
        self.parameter, self.bias = weight, bias
        self.what = "partitioned over ranks between forwards"

    def blocks(self) -> Iterator[Tensor]:
        """Refuse.

        Raises:
            SiteError: the weight is absent.
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
        """Yield W in row blocks."""
        yield from reduce.blocks(self._rows)

    def seen(self, inputs: Tensor, outputs: Any) -> tuple[Tensor, Tensor | None]:
        """Return patches [..., positions, n] and outputs [..., positions, m], one patch per output position."""
        module = self._module
        axes = len(module.kernel_size)
        single = inputs.ndim == axes + 1
        if single:
            inputs, outputs = inputs[None], outputs[None]
        # Pads as the module does: `_reversed_padding_repeated_twice` holds its F.pad widths, also for "same".
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
    """The first rows of another map, whose other rows are padding.

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
        """Yield W in row blocks."""
        left = self.shape[0]
        for block in self._whole.blocks():
            if left <= 0:
                return
            yield block[:left]
            left -= block.shape[0]


def weight_of(module: nn.Module) -> Any:
    """Return the module's `weight`, or None without one.

    Every access recomputes a parametrized weight. In training mode, an access would also advance the power iteration
    of spectral normalization by one step. That would change the training.
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
    """Return the module's bias, or None."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def version_of(*tensors: Tensor) -> int | None:
    """A number that changes when one changes in place, or None if unknown."""
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return sum(tensor._version for tensor in tensors)


def is_loaded(thing: object, where: str, name: str) -> bool:
    """Whether a thing is of a package's class. A package not imported has no instances."""
    found = getattr(sys.modules.get(where), name, None)
    return found is not None and isinstance(thing, found)


def kind(thing: object) -> str:
    """Name the type of a module or tensor, with its package unless PyTorch."""
    where = type(thing).__module__.partition(".")[0]
    return type(thing).__name__ if where in ("torch", "__main__", "builtins") else f"{where}'s {type(thing).__name__}"
