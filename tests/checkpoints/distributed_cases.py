"""What two ranks do: save a model that lies over both as one checkpoint."""

from __future__ import annotations

import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

ROWS, COLUMNS = 101, 24


class Network(nn.Module):
    """A head alone."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(COLUMNS, ROWS, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.lm_head(x)


def weights() -> dict[str, torch.Tensor]:
    """The same on every rank, and in the test."""
    generator = torch.Generator().manual_seed(0)
    return {
        "lm_head.weight": torch.randn(ROWS, COLUMNS, generator=generator),
        "up.weight": torch.randn(40, 16, generator=generator),
        "down.weight": torch.randn(16, 40, generator=generator).to(torch.bfloat16),
    }


def fsdp(rank: int, world: int, folder: str) -> None:
    """FSDP2: rows over ranks, an odd number of them, and the state of an optimizer beside them."""
    mesh = init_device_mesh("cpu", (world,))
    model = Network()
    model.lm_head.weight.data = weights()["lm_head.weight"].clone()
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    model(torch.ones(2, COLUMNS)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 7}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder)


def sharded(rank: int, world: int, folder: str) -> None:
    """DTensors: by rows, by columns, and by columns of a wide matrix."""
    mesh = init_device_mesh("cpu", (world,))
    placed = {"lm_head.weight": Shard(0), "up.weight": Shard(1), "down.weight": Shard(1)}
    state = {name: distribute_tensor(weights()[name], mesh, [placement]) for name, placement in placed.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder)
