"""Quantized weights of 8 and 4 bits, dequantized by blocks of rows.

Supported are bitsandbytes' `Linear8bitLt` and `Linear4bit`, and torchao's tensors. A format that cannot be split into
rows is dequantized as a whole, and the site's description gives the memory for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from logalign.errors import SiteError
from logalign.torch import linear
from logalign.torch.linear import Dense, LinearMap, is_loaded, kind, version_of

SLICED = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
"""Formats of torchao that can be sliced by rows."""
BLOCK = 1 << 20
"""Elements per block of rows."""


def dequantized(module: nn.Module, weight: Tensor, bias: Tensor | None) -> LinearMap | None:
    """The map of a module with a quantized weight of a known type, or None for any other weight.

    Raises:
        SiteError: If the type is known, but not quantized yet.
    """
    if is_loaded(module, "bitsandbytes.nn.modules", "Linear4bit"):
        return FourBit(module, weight, bias)
    if is_loaded(module, "bitsandbytes.nn.modules", "Linear8bitLt"):
        return _eight_bit(module, weight, bias)
    if is_loaded(weight, "torchao.utils", "TorchAOBaseTensor"):
        return TorchAO(weight, bias)
    return None


class EightBit(LinearMap):
    """A weight in bitsandbytes' 8-bit form: int8 `Q [m, n]` and a scale `s [m]`, `W = Q s / 127`."""

    exact = False  # its forward rounds the inputs to 8 bits, too

    def __init__(self, quantized: Tensor, scale: Tensor, bias: Tensor | None, parameter: Tensor) -> None:
        m, n = quantized.shape
        self.shape, self.dtype, self.device = (m, n), scale.dtype, quantized.device
        self.bias, self.parameter, self.version = bias, parameter, version_of(quantized)
        self.what = "of 8 bits (bitsandbytes), inputs as they are before rounding"
        self._quantized, self._scale = quantized.detach(), scale.detach()

    def blocks(self) -> Iterator[Tensor]:
        """Consecutive rows of W."""
        count = max(1, BLOCK // self.shape[1])
        for rows, scale in zip(torch.split(self._quantized, count), torch.split(self._scale, count), strict=True):
            yield rows.to(scale.dtype) * (scale / 127)[:, None]


class FourBit(LinearMap):
    """A weight in bitsandbytes' 4-bit forms: two codes per byte, one scale per block of consecutive elements.

    Args:
        module: The layer.
        weight: Its packed weight.
        bias: b.

    Raises:
        SiteError: If the weight is not quantized yet, or is packed for inference when read.
    """

    def __init__(self, module: Any, weight: Any, bias: Tensor | None) -> None:
        state = getattr(weight, "quant_state", None) or module.quant_state
        if state is None:
            raise SiteError(
                f"expected a {kind(module)} that is quantized, found one that is not yet; move the model to its device "
                "before watch(), which quantizes it"
            )
        m, n = state.shape
        self.shape, self.dtype, self.device = (m, n), state.dtype, weight.device
        self.bias, self.parameter, self.version = bias, weight, version_of(weight)
        self.what = f"of 4 bits ({state.quant_type}, bitsandbytes)"
        self._packed, self._state = weight.detach(), state
        # If a scale spans the end of a row, bitsandbytes dequantizes the whole, as for the layer itself: its CPU
        # kernel (0.50) gives other numbers for a part.
        self._is_sliced = n % state.blocksize == 0
        if not self._is_sliced:
            self.what += _as_a_whole(self)

    def blocks(self) -> Iterator[Tensor]:
        """Consecutive rows of W."""
        functional: Any = importlib.import_module("bitsandbytes.functional")
        packed, state, (m, n) = self._packed, self._state, self.shape
        if getattr(state, "packing_format_for_cpu", False):
            raise self.error(
                "expected 4-bit weights in rows, found them packed for inference on a CPU, as bitsandbytes does in a "
                "forward in eval mode (no gradient passes them either); model.state_dict() unpacks them in place"
            )
        if not self._is_sliced:
            yield from Dense(functional.dequantize_4bit(packed, state)).blocks()
            return
        scales = state.absmax
        if state.nested:
            scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
        codes = packed.reshape(-1).view(torch.uint8)
        step = max(1, BLOCK // n)
        for first in range(0, m, step):
            count = min(step, m - first)
            start, end = first * n, (first + count) * n
            part = functional.QuantState(
                absmax=scales[start // state.blocksize : end // state.blocksize],
                shape=torch.Size((count, n)),
                dtype=state.dtype,
                blocksize=state.blocksize,
                quant_type=state.quant_type,
                code=state.code,
            )
            yield functional.dequantize_4bit(codes[start // 2 : end // 2, None], part)


class TorchAO(LinearMap):
    """A torchao tensor as weight, which dequantizes itself."""

    exact = False  # some of these formats round the inputs, too

    def __init__(self, weight: Any, bias: Tensor | None) -> None:
        m, n = weight.shape
        self.shape, self.dtype, self.device = (m, n), weight.dtype, weight.device
        self.bias, self.parameter = bias, weight
        self._weight, self._is_sliced = weight.detach(), type(weight).__name__ in SLICED
        self.what = f"quantized ({kind(weight)}), inputs as they are before rounding"
        if not self._is_sliced:
            self.what += _as_a_whole(self)

    def blocks(self) -> Iterator[Tensor]:
        """Consecutive rows of W."""
        if not self._is_sliced:
            yield from Dense(self._weight.dequantize()).blocks()
            return
        step = max(1, BLOCK // self.shape[1])
        for first in range(0, self.shape[0], step):
            yield self._weight[first : first + step].dequantize()


def _as_a_whole(mapped: LinearMap) -> str:
    m, n = mapped.shape
    return f", widened as a whole: {m * n * mapped.dtype.itemsize / 2**20:.1f} MiB at a reading"


def _eight_bit(module: Any, weight: Any, bias: Tensor | None) -> LinearMap:
    scale = getattr(weight, "SCB", None)
    scale = module.state.SCB if scale is None else scale
    if weight.dtype == torch.int8 and scale is not None:
        return EightBit(weight.data, scale, bias, weight)
    if module.state.has_fp16_weights and weight.is_floating_point():
        return Dense(weight, bias, exact=False, what="rounded to 8 bits in its forward, measured before")
    raise SiteError(
        f"expected a {kind(module)} that is quantized, found one that is not yet; move the model to its device before "
        f"watch(), which quantizes it; or {linear.OBSERVE}"
    )
