"""Finds a module's linear map, for plain layers, convolutions, quantized weights and adapters.

This module imports the map kinds, and none of them imports it. An adapter's base can be of any kind.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from logalign.errors import SiteError
from logalign.torch import adapters, quantized
from logalign.torch.linear import (
    FLOATING,
    MEGATRON_LAYERS,
    NO_LAYERS,
    OBSERVE,
    Dense,
    LinearMap,
    Partitioned,
    Patches,
    bias_of,
    is_loaded,
    kind,
    weight_of,
)


def linear_map(module: nn.Module) -> LinearMap | None:
    """Return the map that a module computes from [..., n] to [..., m], or None if it has no known map.

    Raises:
        SiteError: the module computes a map, but its weight is not readable.
    """
    if is_loaded(module, "torch._dynamo.eval_frame", "OptimizedModule"):
        return linear_map(module._orig_mod)  # type: ignore[arg-type]
    if is_loaded(module, "peft.tuners.tuners_utils", "BaseTunerLayer") or is_loaded(
        module, "peft.utils.other", "AuxiliaryTrainingWrapper"
    ):
        return adapters.adapted(module, linear_map)
    if isinstance(module, NO_LAYERS) or is_loaded(module, MEGATRON_LAYERS, "VocabParallelEmbedding"):
        return None
    weight = weight_of(module)
    if not isinstance(weight, Tensor):
        if isinstance(getattr(module, "qweight", None), Tensor):
            raise _unknown(f"{kind(module)} with a packed qweight")
        return None
    bias = bias_of(module)
    if weight.device.type == "meta" and (weight.ndim == 2 or isinstance(module, nn.modules.conv._ConvNd)):
        raise SiteError(
            f"expected a weight that is in memory, found {kind(module)} on the meta device; make or load its weights "
            f"before watch(); if it is offloaded between forwards, {OBSERVE}"
        )
    if isinstance(module, nn.modules.conv._ConvNd):
        return _convolution(module, weight, bias)
    if weight.numel() == 0:
        return _empty(module, weight, bias)
    found = quantized.dequantized(module, weight, bias)
    if found is not None:
        return found
    if weight.ndim != 2:
        return None
    if not _is_plain(weight):
        raise _unknown(f"{kind(module)} with a weight of type {kind(weight)}")
    if weight.dtype not in FLOATING:
        raise _unknown(f"{kind(module)} with a weight of {weight.dtype}")
    if is_loaded(module, "transformers.pytorch_utils", "Conv1D"):
        return Dense(weight.T, bias, parameter=weight, what="kept as [n, m]")
    if type(module).forward is nn.Linear.forward:
        return Dense(weight, bias)
    return Dense(weight, bias, exact=False, what="with a forward of its own: E_Z from weight and inputs")


def _unknown(found: str) -> SiteError:
    return SiteError(
        "expected a weight whose numbers can be read (floating point, a bitsandbytes or torchao quantization), "
        f"found {found}; {OBSERVE}"
    )


def _is_plain(weight: Tensor) -> bool:
    """Whether a tensor's elements are its values. A subclass that redefines operations may hold anything."""
    cls = type(weight)
    if is_loaded(weight, "torch.distributed.tensor", "DTensor"):
        return True
    # Parameter disables __torch_function__, which is no redefinition.
    functions = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)  # type: ignore[attr-defined]
    function = getattr(cls.__torch_function__, "__func__", cls.__torch_function__)
    return cls.__torch_dispatch__ is Tensor.__torch_dispatch__ and function in functions


def _empty(module: nn.Module, weight: Tensor, bias: Tensor | None) -> LinearMap | None:
    """Map an empty weight, which ZeRO-3 gathers when the layer runs."""
    shape = tuple(getattr(weight, "ds_shape", weight.shape))
    if len(shape) != 2 and not isinstance(module, nn.Linear):
        return None
    if len(shape) != 2 or 0 in shape:
        raise SiteError(
            f"expected a weight [m, n] that is in memory, found {kind(module)} with an empty one {shape}; {OBSERVE}"
        )
    return Partitioned(weight, shape, bias)


def _convolution(module: nn.modules.conv._ConvNd, weight: Tensor, bias: Tensor | None) -> LinearMap:
    if type(module) not in (nn.Conv1d, nn.Conv2d) or module.groups > 1:
        raise SiteError(
            "expected a Conv1d or Conv2d with groups=1, which is one linear map of its patches, found "
            f"{kind(module)} with groups={module.groups}; {OBSERVE}"
        )
    return Patches(module, weight, bias)
