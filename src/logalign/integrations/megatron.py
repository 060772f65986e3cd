"""Megatron-core: finds the output layer among a model's chunks, and the process groups that share it.

`logalign.torch.megatron` knows the layers (rows over tensor-parallel ranks, sequence first, a weight that the model
hands over). This module handles what only the whole model knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from logalign.common.extras import load
from logalign.errors import SiteError
from logalign.recording.monitor import Monitor
from logalign.recording.monitor import watch as watch_module

if TYPE_CHECKING:
    from torch import nn

SUPPORTED = "0.16,0.17"


def watch(model: nn.Module | Sequence[nn.Module], *, vocabulary: int | None = None, **settings: Any) -> Monitor:
    """Watch the output layer of a Megatron-core model over all ranks that have tokens or rows of it.

    Call it at every rank, after the model is built and wrapped and before its first forward. The monitor takes the
    loss mask from the `loss_mask` argument of the model's forward, as `pretrain_gpt.py` passes it. Without that
    argument, call `monitor.mask(loss_mask != 0)` [b, s] before each forward. Labels alone do not say what counts:
    Megatron fills them with 0.

    Args:
        model: The model, wrapped or not (`DistributedDataParallel`, `Float16Module`), or the list of its chunks, as
            `get_model()` returns it.
        vocabulary: The true size of the vocabulary, if padding adds rows to the output layer.
        **settings: Arguments of `logalign.watch()`. By default `mesh` is the model's data- and context-parallel group,
            and `main_call` is the last call of the output layer if the model predicts several tokens (MTP).

    Returns:
        The monitor. At ranks of pipeline stages without the output layer, its `step()` does nothing.

    Raises:
        SiteError: several chunks have an output layer, or none has one and none says that another stage has it.
        MissingExtraError: Megatron-core is not installed, or its release is not supported.
    """
    load("megatron.core", extra="megatron", purpose="watch()", supported=SUPPORTED, package="megatron-core")
    chunk = _chunk_with_head(list(model) if isinstance(model, Sequence) else [model])
    inner = _unwrapped(chunk)
    if settings.get("mesh") is None:
        settings["mesh"] = _token_group(inner)
    if settings.get("main_call") is None:
        # The layers that predict further tokens run first.
        settings["main_call"] = getattr(getattr(inner, "config", None), "mtp_num_layers", None)
    return watch_module(chunk, vocabulary=vocabulary, **settings)


def _chunk_with_head(chunks: Sequence[nn.Module]) -> nn.Module:
    """Return the chunk that has the output layer, or one that says that another stage has it."""
    from megatron.core.tensor_parallel import ColumnParallelLinear  # type: ignore[import-untyped]

    heads, others = [], []
    for chunk in chunks:
        inner = _unwrapped(chunk)
        layers = [
            name
            for name, module in inner.named_modules()
            if name.rpartition(".")[2] == "output_layer" and isinstance(module, ColumnParallelLinear)
        ]
        if layers:
            heads.append(chunk)
        elif getattr(inner, "post_process", None) is False:
            others.append(chunk)
    if len(heads) > 1 or not (heads or others):
        kinds = ", ".join(type(_unwrapped(chunk)).__name__ for chunk in chunks) or "no chunk"
        found = f"{len(heads)} with one" if heads else "none"
        raise SiteError(
            "model: expected a model of Megatron-core, or the list of its chunks, one of which has an output_layer "
            f"(ColumnParallelLinear) unless it is in another pipeline stage, found {found} ({kinds}); name the layer "
            "with logalign.watch(chunk, layers=..., mesh=...)"
        )
    return (heads or others)[0]


def _unwrapped(model: Any) -> nn.Module:
    """Return the model inside its wrappers, which all hold it as `module`."""
    from torch import nn

    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    if not isinstance(model, nn.Module):
        raise SiteError(f"model: expected a torch.nn.Module or a list of them, found {type(model).__name__}")
    return model


def _token_group(model: Any) -> Any:
    """Return the data- and context-parallel ranks, from the model's own groups if it has them."""
    from megatron.core import parallel_state  # type: ignore[import-untyped]

    own = getattr(getattr(model, "pg_collection", None), "dp_cp", None)
    return own if own is not None else parallel_state.get_data_parallel_group(with_context_parallel=True)
