"""What the ranks of a test do: torchtitan's own Trainer on its Llama 3, made small, watched or not.

torchtitan 0.3 has no CPU among its devices, and calls one function that PyTorch 2.13 has not: `on_cpu()` gives both.
Attention is its `ScaledDotProductAttention`, for the flexible one has no backward on a CPU.
"""

from __future__ import annotations

import os
import types
import warnings
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import logalign

STEPS, BATCH, LENGTH, CHUNKS, VOCABULARY = 3, 4, 16, 2, 2048
Result = dict[str, Any]


def on_cpu(rank: int, world: int, port: int) -> None:
    """What torchtitan expects of a device and of its launcher, before it is imported and makes its process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch._utils._get_available_device_type = lambda: "cpu"  # type: ignore[assignment]
    memory = types.SimpleNamespace(total_memory=2**30)
    device = {
        "current_device": lambda: 0,
        "get_device_name": lambda _=None: "cpu",
        "get_device_properties": lambda _=None: memory,
        "reset_peak_memory_stats": lambda: None,
        "empty_cache": lambda: None,
        "memory_stats": lambda _=None: {},
    }
    for name, value in device.items():
        setattr(torch.cpu, name, value)
    if not hasattr(torch.distributed, "set_timeout"):
        torch.distributed.set_timeout = lambda *_: None


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [B, L] of all ranks; some labels count for nothing."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels = ids.roll(-1, 1)
    labels[torch.rand(BATCH, LENGTH, generator=generator) < 0.3] = -100
    return ids, labels


def config_of(
    folder: Path,
    *,
    fsdp: int = 1,
    tp: int = 1,
    chunked: bool = True,
    checkpoint: bool = False,
    steps: int = STEPS,
    accumulate: int = 1,
) -> Any:
    """A config as torchtitan's users write them."""
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    class Tokenizer(BaseTokenizer):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config: Any, **_: Any) -> None:
            super().__init__()

        def encode(self, *_: Any, **__: Any) -> list[int]:
            return []

        def decode(self, *_: Any, **__: Any) -> str:
            return ""

        def get_vocab_size(self) -> int:
            return VOCABULARY

    class Loader(BaseDataLoader):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            pass

        def __init__(self, config: Any, *, dp_world_size: int, dp_rank: int, **_: Any) -> None:
            self._ranks, self._rank, self._step = dp_world_size, dp_rank, 0

        def __iter__(self) -> Any:
            while True:
                ids, labels = (each.chunk(self._ranks)[self._rank] for each in data(self._step))
                self._step += 1
                for part_ids, part_labels in zip(ids.chunk(accumulate), labels.chunk(accumulate), strict=True):
                    positions = torch.arange(LENGTH).expand_as(part_ids).contiguous()
                    yield {"input": part_ids, "positions": positions}, part_labels

        def state_dict(self) -> dict[str, Any]:
            return {"step": self._step}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self._step = state["step"]

    config = llama3_debugmodel()
    config.dump_folder = str(folder)
    config.tokenizer, config.dataloader = Tokenizer.Config(), Loader.Config()
    model = config.model_spec.model
    model.layers = model.layers[:2]
    for layer in model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.loss.num_chunks = CHUNKS
    if not chunked:
        config.loss = config.loss.loss_fn
    config.training.disable_cuda_graphs = True
    config.training.steps = steps
    config.training.seq_len = LENGTH
    config.training.local_batch_size = BATCH // fsdp // accumulate
    config.training.global_batch_size = BATCH
    config.training.mixed_precision_param = "float32"
    config.lr_scheduler.warmup_steps, config.lr_scheduler.decay_ratio = 1, 0.0
    config.parallelism.data_parallel_shard_degree = fsdp
    config.parallelism.tensor_parallel_degree = tp
    config.parallelism.spmd_backend = "partial_dtensor"
    config.debug.seed = 0
    config.metrics.log_freq = 1
    config.metrics.enable_tensorboard = True
    config.validator.enable = False
    config.checkpoint.enable = checkpoint
    config.checkpoint.interval = 2
    return config


def train(rank: int, world: int, port: int, folder: Path, watched: bool, settings: dict[str, Any]) -> Result:
    """Train; the readings, the weights, and what was told."""
    on_cpu(rank, world, port)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        from logalign.integrations import torchtitan

        config = config_of(folder, **settings)
        trainer = (torchtitan.watched(config, every=1) if watched else config).build()
        for module in trainer.model_parts[0].modules():
            if hasattr(module, "set_force_sum_reduction_for_comms"):
                module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sums
        _fill(trainer.model_parts[0])
        seen: list[torch.Tensor] = []
        weights: list[torch.Tensor] = []
        if watched and world == 1:
            trainer.model_parts[0].lm_head.register_forward_hook(lambda head, x, _: _keep(head, x[0], seen, weights))
        trainer.train()
        trained = {
            name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
            for name, value in trainer.model_parts[0].named_parameters()
        }
        monitor = trainer.monitor if watched else None
        trainer.close()
    torch.distributed.destroy_process_group()
    return {
        "readings": [asdict(taken.main) for taken in monitor.readings] if monitor else [],
        "sites": monitor.sites if monitor else {},
        "weights": trained,
        "truths": _truths(seen, weights) if settings.keys() <= {"chunked"} else [],
        "told": [str(each.message) for each in told if "logalign" in str(each.message)],
    }


def _fill(model: Any) -> None:
    """Weights that depend on the parameter's name alone: on a CPU each rank draws its own."""
    from torch.distributed.tensor import distribute_tensor

    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        whole = 0.05 * torch.randn(parameter.shape, generator=generator) + float("norm" in name)
        if hasattr(parameter, "device_mesh"):
            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        with torch.no_grad():
            parameter.copy_(whole)


def _keep(head: Any, inputs: torch.Tensor, seen: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
    seen.append(inputs.detach().double())
    weights.append(head.weight.detach().double().clone())


def _truths(seen: list[torch.Tensor], weights: list[torch.Tensor]) -> list[float]:
    """LAR by the public function, of what the head saw of each step."""
    calls = len(seen) // STEPS
    return [
        logalign.lar(
            weights[step * calls],
            torch.cat(seen[step * calls : (step + 1) * calls], dim=1),
            mask=data(step)[1] != -100,
        )
        for step in range(STEPS if calls else 0)
    ]


def refused(rank: int, world: int, port: int, folder: Path, what: str) -> str:
    """The error of a wrong set-up."""
    on_cpu(rank, world, port)
    from logalign.integrations import torchtitan

    config = config_of(folder)
    try:
        if what == "graphs":
            config.training.disable_cuda_graphs = False
        elif what == "backend":
            config.parallelism.tensor_parallel_degree = 2
            config.parallelism.spmd_backend = "spmd_types"
        elif what == "config":
            config = config.training
        torchtitan.watched(config).build()
    except logalign.errors.LogAlignError as error:
        return str(error)
    return "not refused"
