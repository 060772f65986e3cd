"""Pipeline stages: only the last has the unembedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from logalign.runs.reading import UNEMBEDDING
from logalign.torch import megatron
from logalign.torch.distributed import (
    is_initialized,
)

if TYPE_CHECKING:
    pass


class Stage(NamedTuple):
    """A pipeline stage for `watch()`.

    Attributes:
        module: Its module.
        layers: Layers to find in it, with the unembedding only in the last stage, or None if none is left.
        is_trying: Whether the current forward only infers shapes, on memory without data.
    """

    module: Any
    layers: str | Sequence[str] | None
    is_trying: Callable[[], bool] | None


def stage_of(model: Any, layers: str | Sequence[str]) -> Stage:
    """The stage of a `PipelineStage`. Anything else is a whole model."""
    if not is_initialized():
        return Stage(model, layers, None)
    if megatron.is_chunk_without_head(model):
        return Stage(model, None, lambda: False)
    from torch.distributed.pipelining.stage import _PipelineStageBase

    if not isinstance(model, _PipelineStageBase):
        return Stage(model, layers, None)
    if not model.is_last:
        layers = [] if isinstance(layers, str) else [name for name in layers if name != UNEMBEDDING]
    return Stage(model.submod, layers or None, lambda: model._stage_meta.outputs is None)
