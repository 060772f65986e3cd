"""Pipeline stages, of which the last alone has the unembedding."""

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
    """A pipeline stage as `watch()` needs it.

    Attributes:
        module: Its module.
        layers: Which layers to look for in it: no unembedding but in the last stage; None where nothing is left.
        is_trying: Whether the forward under way only finds out shapes, on memory that holds no data.
    """

    module: Any
    layers: str | Sequence[str] | None
    is_trying: Callable[[], bool] | None


def stage_of(model: Any, layers: str | Sequence[str]) -> Stage:
    """The stage that a `PipelineStage` is; anything else is a model that is no stage."""
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
