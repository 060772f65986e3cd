"""The ranks that measure a model together, from its wrapper, its weights' layout, or the user."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from logalign.errors import InputError, LogAlignWarning
from logalign.torch import megatron
from logalign.torch.distributed import (
    is_dtensor,
    is_initialized,
    world_size,
)
from logalign.torch.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def find_ranks(
    model: nn.Module, mesh: DeviceMesh | ProcessGroup | None, weights: Sequence[Any], *, is_stage: bool = False
) -> Ranks:
    """Find the ranks that measure a model together. Each of them calls this.

    Args:
        model: The model in training: in DDP, sharded by `fully_shard`, parallelized by DTensor.
        mesh: The ranks with tokens of their own, if no wrapper gives them: a process group, or the data-parallel (and
            context-parallel) axes of a device mesh.
        weights: Weights of the known layers.
        is_stage: Whether the model is a pipeline stage, with other parts on other ranks.

    Raises:
        InputError: If `mesh` is neither.
    """
    if world_size() == 1:
        if mesh is not None and not is_initialized():
            raise InputError("mesh: expected a process group that is up, found none; call init_process_group() first")
        return Ranks()
    tokens, group = _token_ranks(model, mesh)
    own = torch.distributed.get_rank()
    together = {own, *megatron.shards(model)}
    for weight in weights:
        if is_dtensor(weight):
            together |= set(weight.device_mesh.mesh.flatten().tolist())
    if not together <= set(tokens) and len(tokens) > 1:
        every: list[Any] = [None] * len(tokens)
        torch.distributed.all_gather_object(every, together, group=group or _group_of(tokens))
        together = set().union(*every)
    everyone = sorted(together | set(tokens))
    if len(everyone) == 1:
        if mesh is None and not is_stage:
            warnings.warn(
                f"logalign: a process group of {world_size()} ranks is up, but neither DDP, fully_shard, DeepSpeed "
                "nor DTensor says which of them train this model together: readings are of this rank's tokens alone; "
                "pass watch(mesh=...) the data-parallel ranks",
                LogAlignWarning,
                stacklevel=3,
            )
        return Ranks((own,), (own,))
    if group is None or len(everyone) != len(tokens):
        group = _group_of(everyone)
    return Ranks(tokens, everyone, group)


def _token_ranks(model: nn.Module, mesh: Any) -> tuple[list[int], ProcessGroup | None]:
    """Global ranks with tokens of their own, and their process group if there is one."""
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    own = torch.distributed.get_rank()
    if mesh is None:
        mesh = wrapper_of(model)
    if mesh is None:
        return [own], None
    if isinstance(mesh, ProcessGroup):
        return sorted(torch.distributed.get_process_group_ranks(mesh)), mesh
    if isinstance(mesh, DeviceMesh):
        ranks = sorted(mesh.mesh.flatten().tolist())
        return ranks, mesh.get_group() if mesh.ndim == 1 else None
    raise InputError(
        f"mesh: expected a torch.distributed.device_mesh.DeviceMesh or a ProcessGroup, found {type(mesh).__name__}"
    )


def wrapper_of(model: nn.Module) -> DeviceMesh | ProcessGroup | None:
    """The data-parallel ranks from the model's wrapper: DDP, `fully_shard`, Megatron or DeepSpeed."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            group: ProcessGroup = module.process_group
            return group
        if isinstance(module, FSDPModule):
            sharded = module._get_fsdp_state()._fsdp_param_group
            if sharded is not None:
                mesh: DeviceMesh = sharded.mesh_info.mesh
                return mesh
        if (group_of_megatron := megatron.token_ranks(module)) is not None:
            return group_of_megatron
        if type(module).__module__.startswith("deepspeed.") and hasattr(module, "data_parallel_group"):
            group = module.data_parallel_group  # type: ignore[assignment]
            return group
    for parameter in model.parameters():  # inside DeepSpeed's engine, under ZeRO-3
        if hasattr(parameter, "ds_process_group"):
            group = parameter.ds_process_group
            return group
    return None


def _group_of(ranks: Sequence[int]) -> ProcessGroup:
    """A process group of these ranks. Each of them calls this."""
    if len(ranks) == world_size():
        world = torch.distributed.group.WORLD
        assert world is not None
        return world
    group: ProcessGroup = torch.distributed.new_group(list(ranks), use_local_synchronization=True)
    return group
