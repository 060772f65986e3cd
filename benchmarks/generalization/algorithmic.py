"""Modular arithmetic: networks that memorize, and with weight decay and data enough generalize much later.

Full batch. Shapes: T pairs [T, 2], labels [T], logits [T, p]; n = width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.generalization.configs import ALGORITHMIC_STEPS, Config
from benchmarks.generalization.recorder import Recorder
from logalign.demos.dimension import function_dimension
from logalign.demos.gpt import Block
from logalign.demos.grokking import Adder

LR = {"mlp": 5e-3, "transformer": 2e-3}


class Transformer(nn.Module):
    """One transformer block over (a, b, =), with an unembedding of the last position."""

    def __init__(self, p: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(p + 1, width)
        self.positions = nn.Embedding(3, width)
        self.block = Block(width, 4)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, p, bias=False)
        self.equals = p

    def forward(self, pairs: Tensor) -> Tensor:
        tokens = F.pad(pairs, (0, 1), value=self.equals)
        x = self.block(self.tokens(tokens) + self.positions.weight)
        return cast(Tensor, self.head(self.norm(x[:, -1])))


def pairs_of(operation: str, p: int) -> tuple[Tensor, Tensor]:
    """All p * p pairs and what the operation gives."""
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    a, b = pairs.unbind(1)
    results = {"add": a + b, "sub": a - b, "mul": a * b}
    return pairs, results[operation] % p


def train_algorithmic(config: Config, work: Path) -> tuple[Recorder, dict[str, Any]]:
    """Train one network on a share of all pairs."""
    settings = config.settings
    kind, p, steps = settings["model"], settings["p"], settings.get("steps") or ALGORITHMIC_STEPS[settings["model"]]
    pairs, labels = pairs_of(settings["operation"], p)
    order = torch.randperm(p * p, generator=torch.Generator().manual_seed(config.seed))
    size = round(settings["share"] * p * p)
    x, y, held_x, held_y = pairs[order[:size]], labels[order[:size]], pairs[order[size:]], labels[order[size:]]
    torch.manual_seed(config.seed)
    width = settings["width"]
    model: nn.Module = Adder(p, width) if kind == "mlp" else Transformer(p, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR[kind], weight_decay=settings["decay"], betas=(0.9, 0.98))
    others = ["body.2"] if kind == "mlp" else ["block.mlp.2"]
    recorder = Recorder(model, "head", steps=steps, every=10, evaluate_every=10, others=others)
    counted = settings["operation"] in ("add", "sub")
    held_logits: Tensor | None = None

    @torch.no_grad()
    def evaluate() -> dict[str, Any]:
        nonlocal held_logits
        model.eval()
        held_logits = model(held_x)
        model.train()
        return {
            "losses": F.cross_entropy(held_logits, held_y, reduction="none").numpy(),
            "val_acc": (held_logits.argmax(1) == held_y).float().mean(),
        }

    for step in range(steps):
        logits = model(x)
        losses = F.cross_entropy(logits, y, reduction="none")
        optimizer.zero_grad()
        losses.mean().backward()
        recorder.step(step, logits, y, losses, lr=LR[kind], epoch=float(step), evaluate=evaluate)
        optimizer.step()
    facts: dict[str, Any] = {"per_epoch": 1}
    if counted and held_logits is not None:
        # Of the last evaluation, at the same weights as the last reading.
        found = function_dimension(held_logits.double().numpy(), np.asarray(held_y))
        facts |= {"dimension": found.dimension, "dimension_additive": found.additive_dimension}
        facts["dimension_energy"] = found.energy_dimension
    return recorder, facts
