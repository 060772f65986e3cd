"""Fine-tuning by the Trainer of Transformers, as people do it.

A pre-trained model, a few hundred sequences, no schedule chosen, and our own callback. The models have the shapes
of Llama and GPT-2 and are pre-trained here, on one text.

Shapes: B = 8 sequences of S = 64 tokens, m = 1,024.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.generalization.configs import Config
from benchmarks.generalization.data import VOCABULARY, Tokens, blocks, tokens_of
from benchmarks.generalization.language import CONTEXT, kept_apart_of, learning_rate, shares_of
from benchmarks.generalization.recorder import Recorder
from logalign.integrations.transformers import LogAlignCallback

BATCH, WIDTH, LAYERS, HEADS = 8, 96, 2, 4
HELD_OUT = 128
PRETRAINING_STEPS, PRETRAINING_BATCH = 1000, 16
READINGS = 100


def build(shape: str) -> PreTrainedModel:
    """A small model of a well-known shape, with its initial weights."""
    if shape == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=CONTEXT,
                n_embd=WIDTH,
                n_layer=LAYERS,
                n_head=HEADS,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=CONTEXT,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def pretrained(shape: str, text: str, work: Path) -> PreTrainedModel:
    """The model that fine-tuning starts from, trained once and kept in the work folder."""
    path = work / f"pretrained-{shape}-{text}.pt"
    torch.manual_seed(1000)
    model = build(shape)
    if not path.exists():
        tokens = torch.from_numpy(tokens_of(text, work)[0])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        generator = np.random.default_rng(1000)
        for step in range(PRETRAINING_STEPS):
            starts = torch.from_numpy(generator.integers(0, len(tokens) - CONTEXT, PRETRAINING_BATCH))
            window = tokens[starts[:, None] + torch.arange(CONTEXT)]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, PRETRAINING_STEPS, 1e-3, "cosine")
            optimizer.zero_grad()
            model(input_ids=window, labels=window).loss.backward()
            optimizer.step()
        draft = path.with_suffix(f".{os.getpid()}")
        torch.save(model.state_dict(), draft)
        draft.replace(path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


class Sequences(Dataset[dict[str, Tensor]]):
    """Rows of a text, each CONTEXT tokens."""

    def __init__(self, tokens: Tokens, count: int) -> None:
        self.rows = torch.from_numpy(tokens[: count * CONTEXT]).view(count, CONTEXT)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Beside(TrainerCallback):
    """Keeps what logalign's callback has read, the rivals' signals of the same step, and the held-out losses."""

    def __init__(
        self, callback: LogAlignCallback, recorder: Callable[[], Recorder], evaluate: Callable[[], Any]
    ) -> None:
        self.callback, self.make, self.evaluate = callback, recorder, evaluate
        self.recorder: Recorder | None = None
        self.row: dict[str, float] | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Begin to watch, once the model is where it will be."""
        if self.recorder is None:
            self.recorder = self.make()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """The gradients are there, and the weights are those of the reading."""
        assert self.recorder is not None
        if self.recorder.is_monitored:
            step = cast(Any, self.callback.monitor).state_dict()["step"]
            self.row = self.recorder.rivals(step, None, None)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """logalign's callback has taken its reading: it is the first of all."""
        if self.row is None or self.recorder is None or self.callback.monitor is None:
            return
        readings = self.callback.monitor.readings[-1]
        main = readings.main
        self.row |= {
            name: float("nan") if v is None else float(v)
            for name, v in (("epoch", main.epoch), ("lr", main.lr), ("loss", main.loss), ("train_loss", main.loss_mean))
        }
        self.recorder.keep(readings, self.row, self.evaluate)
        self.row = None


def train_by_trainer(config: Config, work: Path) -> tuple[Recorder, dict[str, Any]]:
    """Fine-tune, in full or by LoRA, with the Trainer's default schedule: linear to zero."""
    settings = config.settings
    source, target = settings["direction"].split("-to-")
    train, held_out = tokens_of(target, work, tokenizer_of=source)
    count, passes = settings["sequences"], settings["passes"]
    model: nn.Module = pretrained(settings["model"], source, work)
    torch.manual_seed(config.seed)
    head = "lm_head"
    if settings["method"] == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj", "gate_proj", "down_proj"] if settings["model"] == "llama" else ["c_attn", "c_fc"]
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, fan_in_fan_out=settings["model"] == "gpt2")
        model, head = get_peft_model(cast(Any, model), lora), "base_model.model.lm_head"
    per_epoch = -(-count // BATCH)
    steps = per_epoch * passes
    every = max(1, round(steps / READINGS))
    windows = torch.from_numpy(blocks(held_out, CONTEXT - 1, count=HELD_OUT))
    kept_apart = kept_apart_of(train[count * CONTEXT :], count)[:, :CONTEXT]
    callback = LogAlignCallback(every=every, spectra_every=every)

    def losses_of(rows: Tensor) -> Tensor:
        found = []
        for part in torch.split(rows, 32):
            logits = cast(Any, model)(input_ids=part).logits[:, :-1]
            losses = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
            found.append(losses.view(len(part), -1).mean(1))
        return torch.cat(found)

    @torch.no_grad()
    def evaluate() -> dict[str, Any]:
        model.eval()
        found = {"losses": losses_of(windows).numpy(), **shares_of(kept_apart, losses_of)}
        model.train()
        return found

    beside = Beside(
        callback, lambda: Recorder(model, head, steps=steps, every=every, monitor=callback.monitor), evaluate
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            num_train_epochs=passes,
            learning_rate=settings["lr"],
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=config.seed,
        )
        data = Sequences(train, count)
        Trainer(cast(Any, model), arguments, train_dataset=data, callbacks=[callback, beside]).train()
    assert beside.recorder is not None
    return beside.recorder, {"per_epoch": per_epoch}
