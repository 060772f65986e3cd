"""The state of torch.distributed, and one rank's view of tensors spread over several ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def is_initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def world_size() -> int:
    return torch.distributed.get_world_size() if is_initialized() else 1


def is_dtensor(tensor: Any) -> bool:
    if not is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_of(tensor: Any) -> Tensor:
    found: Tensor = tensor.to_local().detach() if is_dtensor(tensor) else tensor
    return found


def whole_of(tensor: Any) -> Any:
    """The whole tensor, gathered or summed by DTensor if it is spread."""
    return tensor.detach().full_tensor() if is_dtensor(tensor) else tensor


def columns_of(tensor: Any, first: int, count: int, of: int) -> Any:
    """These columns of a tensor [..., of] or [..., count]."""
    if tensor is None:
        return None
    if is_dtensor(tensor):
        placement = tensor.placements[0]
        if placement.is_shard(tensor.ndim - 1):
            return tensor.to_local().detach()
        tensor = whole_of(tensor)
    return tensor if tensor.shape[-1] == count != of else tensor[..., first : first + count]


def summed_over(mesh: DeviceMesh) -> Any:
    """A function that sums a tensor over a mesh, by DTensor."""
    from torch.distributed.tensor import DTensor, Partial

    def whole(tensor: Tensor) -> Tensor:
        return DTensor.from_local(tensor, mesh, [Partial()], run_check=False).full_tensor()

    return whole
