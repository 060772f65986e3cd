"""What the ranks of a test do: one small training by the Trainer, over processes or in one."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from logalign.integrations.transformers import LogAlignCallback

VOCABULARY, LENGTH, ROWS, STEPS = 53, 12, 32, 4
FIELDS = ("step", "lar", "lar_vocab_centered", "lar_token_centered", "lar_centered", "loss", "loss_mean", "tokens")


def rows() -> list[dict[str, Any]]:
    """Token numbers and labels, a third of which do not count."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(2, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = torch.where(torch.rand(ROWS, LENGTH, generator=generator) < 0.3, -100, tokens)
    return [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]


def model(width: int = 16) -> LlamaForCausalLM:
    """A small Llama."""
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )


class ShardedTrainer(Trainer):
    """A Trainer with Accelerate's FSDP2, which Accelerate itself chooses on GPUs only."""

    def create_accelerator_and_postprocess(self) -> None:
        """Tell Accelerate to shard; what it does then is its own."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
        )
        self.is_fsdp_enabled = True


def training(
    folder: Path, batch: int, *, watched: bool = True, kind: type[Trainer] = Trainer, **settings: Any
) -> dict[str, Any]:
    """Train for a few steps with SGD; the readings, and the weights."""
    callback = LogAlignCallback(every=1, layers=["unembedding", "model.layers.0.mlp.down_proj"], run=folder / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=batch,
            max_steps=STEPS,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
            **settings,
        )
        trainer = kind(model(), arguments, train_dataset=rows(), callbacks=[callback] if watched else [])
        trainer.train()
    weights = {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().cpu().clone()
        for name, value in trainer.model.state_dict().items()
    }
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    found: dict[str, Any] = {"weights": weights, "logs": logs, "wrapped": type(trainer.model_wrapped).__name__}
    if watched:
        found["readings"] = {
            (site, reading.step): {name: value for name in FIELDS if (value := getattr(reading, name)) is not None}
            for readings in callback.monitor.readings  # type: ignore[union-attr]
            for site, reading in readings.items()
        }
    return found


def over_ranks(rank: int, world: int, folder: Path, watched: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """`training` at one of several ranks, as a launcher sets it up."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "ACCELERATE_USE_CPU": "true"}
    return training(folder, 4, watched=watched, ddp_backend="gloo", **settings)
