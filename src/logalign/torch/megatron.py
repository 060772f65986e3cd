"""Layers of Megatron-core, whose parts over tensor-parallel ranks are plain tensors and a process group.

Its tensors are sequence first, [s, b, n], and its layers return a pair (outputs, bias). A column-parallel layer has
some rows of W. Under sequence parallelism it gets a slice of the sequence and gathers it itself. This module does the
same, with one more all-gather of the inputs in a measured forward. The alternative is to keep the sums of each slice
apart from the outputs' sums. It saves the all-gather, but inputs and outputs elsewhere would be of different tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from logalign.errors import SiteError
from logalign.torch.linear import MEGATRON_LAYERS as LAYERS
from logalign.torch.linear import OBSERVE, Dense, LinearMap, is_loaded, version_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ColumnParallel(LinearMap):
    """A `ColumnParallelLinear`: this rank's rows of W [m, n], after those of lower tensor-parallel ranks.

    Args:
        module: The layer.
        weight: The rows that its forward multiplies by.
    """

    def __init__(self, module: Any, weight: Tensor) -> None:
        bias = None if module.skip_bias_add else module.bias
        self.own = Dense(weight.detach(), None if bias is None else bias.detach())
        self.shape, self.dtype, self.device = (module.output_size, module.input_size), weight.dtype, weight.device
        self.parameter, self.bias, self.version = weight, self.own.bias, version_of(weight)
        self.ranks, self.group = ranks_of(module), module.tp_group
        self.first_row = weight.shape[0] * (self.group.rank() if len(self.ranks) > 1 else 0)
        self._is_sliced = module.sequence_parallel and not module.explicit_expert_comm

    def blocks(self) -> Iterator[Tensor]:
        """Consecutive rows of this rank's part of W."""
        yield from self.own.blocks()

    def seen(self, inputs: Tensor, outputs: Any) -> tuple[Tensor, Tensor | None]:
        """Inputs [b, s, n] of the whole sequence, and outputs [b, s, m] or this rank's part. Masks are [b, s]."""
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        inputs = inputs.detach()
        if self._is_sliced:
            slices = [torch.empty_like(inputs) for _ in self.ranks]
            torch.distributed.all_gather(slices, inputs.contiguous(), group=self.group)
            inputs = torch.cat(slices)
        return _batch_first(inputs), None if outputs is None else _batch_first(outputs.detach())

    def whole_row_sum(self, row_sum: Tensor) -> Tensor:
        """The sum of all rows [n] from each rank's sum."""
        whole = row_sum.clone()
        torch.distributed.all_reduce(whole, group=self.group)
        return whole


def megatron_map(module: nn.Module, shared: Callable[[], Tensor] | None = None) -> ColumnParallel | None:
    """The map of a layer of Megatron-core, or None for any other module.

    Args:
        module: The layer.
        shared: Returns the weight that the model passes to the layer's forward, if it does.

    Raises:
        SiteError: If the layer's columns are split, or its weight comes from an unknown place.
    """
    if is_loaded(module, LAYERS, "RowParallelLinear") and len(ranks_of(module)) > 1:
        raise SiteError(
            "expected a layer of Megatron-core whose rows are split over ranks, found RowParallelLinear, whose columns "
            f"are; {OBSERVE}"
        )
    if not is_loaded(module, LAYERS, "ColumnParallelLinear"):
        return None
    weight = module.weight if shared is None else shared()
    if not isinstance(weight, Tensor):
        raise SiteError(
            "expected a ColumnParallelLinear with a weight, or inside of a model with "
            f"shared_embedding_or_output_weight(), found one without; watch the whole model, or {OBSERVE}"
        )
    return ColumnParallel(module, weight)


def shared_weight(model: nn.Module, layer: nn.Module) -> Callable[[], Tensor] | None:
    """The function that returns the weight a model passes to its output layer, or None if the layer uses its own.

    It is called only if weights are tied: an untied model returns the input embedding.
    """
    if not is_loaded(layer, LAYERS, "ColumnParallelLinear"):
        return None
    for owner in model.modules():
        shares = getattr(owner, "share_embeddings_and_output_weights", False)
        if getattr(owner, "output_layer", None) is layer and shares:
            return owner.shared_embedding_or_output_weight  # type: ignore[return-value]
    return None


def is_chunk_without_head(model: Any) -> bool:
    """Whether a model is a pipeline chunk whose head is at other ranks or in other chunks."""
    inner = model
    while isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    return is_loaded(inner, "megatron.core.transformer.module", "MegatronModule") and (
        getattr(inner, "post_process", None) is False
    )


def token_ranks(module: nn.Module) -> ProcessGroup | None:
    """The data- and context-parallel ranks of Megatron's DistributedDataParallel, or None for any other module."""
    if is_loaded(module, "megatron.core.distributed", "DistributedDataParallel"):
        group: ProcessGroup = module.dp_cp_group  # type: ignore[assignment]
        return group
    return None


def shards(model: nn.Module) -> set[int]:
    """Global ranks that share the rows of the model's layers."""
    if LAYERS not in sys.modules:
        return set()
    layers = (module for module in model.modules() if is_loaded(module, LAYERS, "ColumnParallelLinear"))
    return {rank for layer in layers if not layer.is_expert for rank in ranks_of(layer)}


def ranks_of(layer: Any) -> tuple[int, ...]:
    """Global ranks with a column-parallel layer's rows, in order."""
    # No group if torch.distributed is not up.
    return (0,) if layer.tp_group is None else tuple(torch.distributed.get_process_group_ranks(layer.tp_group))


def _batch_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1) if tensor.ndim == 3 else tensor
