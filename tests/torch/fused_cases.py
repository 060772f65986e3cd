"""What the ranks of a test do whose model multiplies by the head's weight itself; see parallel_cases.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F

from tests.torch import parallel_cases as cases


class Body(nn.Module):
    """All of a model but its head."""

    def __init__(self, model: cases.Model) -> None:
        super().__init__()
        self.embedding, self.blocks, self.norm = model.embedding, model.blocks, model.norm

    def forward(self, ids: Tensor) -> Tensor:
        """The last hidden state [B, T, n]."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.norm(x)
        return found


class Fused(nn.Module):
    """A model as Transformers builds them, whose head's own forward does not run."""

    def __init__(self) -> None:
        super().__init__()
        model = cases.model_of()
        self.base_model, self.lm_head = Body(model), model.lm_head

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [B, T, m], by hand."""
        hidden, weight = self.base_model(ids), self.lm_head.weight
        if isinstance(weight, DTensor):
            hidden = DTensor.from_local(hidden, weight.device_mesh, [Replicate()])
            return F.linear(hidden, weight).full_tensor()
        return F.linear(hidden, weight)


def ddp(rank: int, world: int, watched: bool) -> cases.Result:
    """DistributedDataParallel."""
    model = nn.parallel.DistributedDataParallel(Fused())
    return cases.run(model, cases.rows_of(rank, world), world, watched=watched)


def fsdp(rank: int, world: int, watched: bool, **options: Any) -> cases.Result:
    """`fully_shard` of blocks and model."""
    from torch.distributed.fsdp import fully_shard

    model = Fused()
    for block in model.base_model.blocks:
        fully_shard(block)
    fully_shard(model, **options)
    return cases.run(model, cases.rows_of(rank, world), world, watched=watched)


def tensor_parallel(rank: int, world: int, watched: bool) -> cases.Result:
    """The head's rows are split, and all ranks have the same tokens."""
    model = Fused()
    parallelize_module(model.lm_head, init_device_mesh("cpu", (world,)), ColwiseParallel())
    return cases.run(model, [cases.data(step) for step in range(cases.STEPS)], 1.0, watched=watched)


def fsdp_resharding(rank: int, world: int, watched: bool) -> cases.Result:
    """The model's own parameters, the head's among them, are sharded again as soon as its forward is over."""
    return fsdp(rank, world, watched, reshard_after_forward=True)
