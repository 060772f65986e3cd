"""Small GPTs on fresh and on repeated text, and the fine-tuning of one text's model on another text.

Shapes: B = 16 sequences of S = 64 tokens, m = 1,024.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.generalization.configs import FINETUNING_STEPS, LANGUAGE_STEPS, Config
from benchmarks.generalization.data import VOCABULARY, Tokens, blocks, rare_types, tokens_of
from benchmarks.generalization.recorder import Recorder
from logalign.demos.gpt import GPT

BATCH, CONTEXT, LAYERS, HEADS = 16, 64, 2, 4
HELD_OUT, MOST_KEPT_APART = 128, 200
EVERY = 10
WARM_UP = 50
PRETRAINING_STEPS, PRETRAINING_WIDTH = 1000, 96


def train_language(config: Config, work: Path) -> tuple[Recorder, dict[str, Any]]:
    """Train one GPT from scratch."""
    settings = config.settings
    train, held_out = tokens_of(settings["text"], work)
    steps = settings.get("steps", LANGUAGE_STEPS)
    unique = settings["unique"] or steps * BATCH * CONTEXT + 1
    torch.manual_seed(config.seed)
    model: nn.Module
    if settings.get("model") == "lstm":
        model, others = LSTM(VOCABULARY, settings["width"]), []
    else:
        model = GPT(
            vocabulary=VOCABULARY,
            width=settings["width"],
            layers=LAYERS,
            heads=HEADS,
            context=CONTEXT,
            tied=settings["tied"],
            dropout=settings["dropout"],
        )
        others = ["blocks.0.query_key_value", f"blocks.{LAYERS - 1}.mlp.2"]
    return _train(
        model,
        "lm_head",
        others,
        train[:unique],
        train[unique:],
        held_out,
        steps=steps,
        lr=settings["lr"],
        schedule=settings["schedule"],
        decay=settings["decay"],
        seed=config.seed,
        scale=settings.get("scale", 1.0),
        smoothing=settings.get("smoothing", 0.0),
    )


class LSTM(nn.Module):
    """Two layers of an LSTM whose unembedding is its embedding."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.cells = nn.LSTM(width, width, 2, batch_first=True)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.05)
        self.lm_head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.lm_head(self.cells(self.tokens(tokens))[0]))


def train_finetuning(config: Config, work: Path) -> tuple[Recorder, dict[str, Any]]:
    """Fine-tune, in full or by LoRA, the model of one text on a part of the other text."""
    settings = config.settings
    source, target = settings["direction"].split("-to-")
    train, held_out = tokens_of(target, work, tokenizer_of=source)
    steps = settings.get("steps", FINETUNING_STEPS)
    unique = settings["unique"] or steps * BATCH * CONTEXT + 1
    model: nn.Module = pretrained(source, work)
    torch.manual_seed(config.seed)
    prefix = ""
    if settings["method"] == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["query_key_value", "attention_out", "mlp.0", "mlp.2"]
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, lora_dropout=0.0)
        model = get_peft_model(model, lora)  # type: ignore[arg-type]
        prefix = "base_model.model."
    return _train(
        model,
        f"{prefix}lm_head",
        [],
        train[:unique],
        train[unique:],
        held_out,
        steps=steps,
        every=settings.get("every", EVERY),
        lr=settings["lr"],
        schedule="constant",
        decay=0.1,
        seed=config.seed,
    )


def pretrained(text: str, work: Path) -> GPT:
    """The model that fine-tuning starts from, trained once and kept in the work folder."""
    path = work / f"pretrained-{text}.pt"
    model = GPT(vocabulary=VOCABULARY, width=PRETRAINING_WIDTH, layers=LAYERS, heads=HEADS, context=CONTEXT)
    if not path.exists():
        train, _ = tokens_of(text, work)
        torch.manual_seed(1000)
        model = GPT(vocabulary=VOCABULARY, width=PRETRAINING_WIDTH, layers=LAYERS, heads=HEADS, context=CONTEXT)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
        source = batches(train, seed=1000)
        for step in range(PRETRAINING_STEPS):
            inputs, targets, _ = next(source)
            _set_lr(optimizer, learning_rate(step, PRETRAINING_STEPS, 1e-3, "cosine"))
            optimizer.zero_grad()
            F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
            optimizer.step()
        draft = path.with_suffix(f".{os.getpid()}")
        torch.save(model.state_dict(), draft)
        draft.replace(path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def _train(
    model: nn.Module,
    head: str,
    others: list[str],
    tokens: Tokens,
    unseen: Tokens,
    held_out: Tokens,
    *,
    steps: int,
    lr: float,
    schedule: str,
    decay: float,
    seed: int,
    every: int = EVERY,
    scale: float = 1.0,
    smoothing: float = 0.0,
) -> tuple[Recorder, dict[str, Any]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, betas=(0.9, 0.95))
    windows = torch.from_numpy(blocks(held_out, CONTEXT, count=HELD_OUT))
    kept_apart = kept_apart_of(unseen, (len(tokens) - 1) // CONTEXT)
    rare = torch.from_numpy(rare_types(tokens))
    recorder = Recorder(model, head, steps=steps, every=every, evaluate_every=20, others=others)

    def losses_of(windows: Tensor) -> Tensor:
        return torch.cat(
            [
                F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten(), reduction="none")
                .view(len(part), -1)
                .mean(1)
                for part in torch.split(windows, 32)
            ]
        )

    @torch.no_grad()
    def evaluate() -> dict[str, Any]:
        model.eval()
        found = {"losses": losses_of(windows).numpy(), **shares_of(kept_apart, losses_of)}
        model.train()
        return found

    source = batches(tokens, seed=seed)
    for step in range(steps):
        inputs, targets, epoch = next(source)
        rate = learning_rate(step, steps, lr, schedule)
        _set_lr(optimizer, rate)
        recorder.rare(targets, rare)
        logits = model(inputs)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing)
        optimizer.zero_grad()
        (scale * losses.mean()).backward()
        recorder.step(step, logits, targets, losses, lr=rate, epoch=epoch, evaluate=evaluate, scale=scale)
        optimizer.step()
    return recorder, {"epochs": epoch, "per_epoch": (len(tokens) - 1) // CONTEXT // BATCH}


def learning_rate(step: int, steps: int, peak: float, schedule: str) -> float:
    """Linear warm-up, then constant, a cosine down to a tenth of the peak, or one of three ways down to zero."""
    if step < WARM_UP:
        return peak * (step + 1) / WARM_UP
    share = (step - WARM_UP) / max(1, steps - WARM_UP)
    if schedule != "cosine":
        return peak * multiplier(share, schedule)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)


def multiplier(share: float, schedule: str) -> float:
    """What the learning rate is multiplied by after this share of the steps; "wsd0" falls in the last fifth."""
    falls = {
        "constant": 1.0,
        "linear0": 1 - share,
        "cosine0": (1 + math.cos(math.pi * share)) / 2,
        "wsd0": min(1.0, (1 - share) / 0.2),
    }
    return falls[schedule]


def kept_apart_of(unseen: Tokens, sequences: int) -> Tensor:
    """Sequences that a user would keep out of the training, a twentieth as many as it has; the first fifth of them,
    a hundredth. Where the text is used up, none."""
    count = min(MOST_KEPT_APART, max(1, round(sequences / 20)))
    if len(unseen) < count * CONTEXT + 1:
        return torch.empty(0, CONTEXT + 1, dtype=torch.int64)
    return torch.from_numpy(unseen[np.arange(count)[:, None] * CONTEXT + np.arange(CONTEXT + 1)])


def shares_of(kept_apart: Tensor, losses_of: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """The mean losses of a hundredth and of a twentieth, kept apart."""
    if not len(kept_apart):
        return {}
    losses = losses_of(kept_apart)
    return {"val1_loss": float(losses[: max(1, round(len(losses) / 5))].mean()), "val5_loss": float(losses.mean())}


def batches(tokens: Tokens, *, seed: int) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield inputs [B, S], targets [B, S] and the epoch of every step; a new order every epoch."""
    data = torch.from_numpy(tokens)
    count = (len(tokens) - 1) // CONTEXT
    per_epoch = count // BATCH
    step = 0
    while True:
        order = torch.from_numpy(np.random.default_rng([seed, step // per_epoch]).permutation(count))
        for first in torch.split(order[: per_epoch * BATCH], BATCH):
            window = data[first[:, None] * CONTEXT + torch.arange(CONTEXT + 1)]
            yield window[:, :-1], window[:, 1:], step / per_epoch
            step += 1


def _set_lr(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
