"""scikit-learn's digits with some labels drawn at random: an MLP and a small convolutional network.

Held-out labels are always true. Shapes: B = 256 images [8, 8] (all of them where there are fewer), 10 classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from benchmarks.generalization.configs import VISION_STEPS, Config
from benchmarks.generalization.recorder import Recorder

HELD_OUT = 450
BATCH = 256
LR = {"mlp": 2e-3, "cnn": 2e-3}


def network(kind: str) -> tuple[nn.Module, str, list[str]]:
    """The network, the name of its head, and the names of two further layers."""
    if kind == "mlp":
        layers: list[nn.Module] = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
        return nn.Sequential(nn.Flatten(), *layers), "5", ["1", "3"]
    body: list[nn.Module] = [
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    ]
    return nn.Sequential(*body), "8", ["6"]


def train_vision(config: Config, work: Path) -> tuple[Recorder, dict[str, Any]]:
    """Train one network on digits of which a share `noise` has labels drawn anew from all ten classes."""
    settings = config.settings
    kind, steps = settings["model"], VISION_STEPS[settings["model"]]
    generator = np.random.default_rng(config.seed)
    data = load_digits()
    order = generator.permutation(len(data.target))
    held_out, train = order[:HELD_OUT], order[HELD_OUT:][: settings["samples"]]
    labels = data.target[train].copy()
    drawn = generator.permutation(len(train))[: round(settings["noise"] * len(train))]
    labels[drawn] = generator.integers(0, 10, len(drawn))
    images = torch.tensor(data.images / 16.0, dtype=torch.float32)[:, None]
    x, y = images[train], torch.tensor(labels)
    held_x, held_y = images[held_out], torch.tensor(data.target[held_out])
    torch.manual_seed(config.seed)
    model, head, others = network(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR[kind], weight_decay=settings["decay"])
    recorder = Recorder(model, head, steps=steps, every=10, evaluate_every=10, others=others)

    @torch.no_grad()
    def evaluate() -> dict[str, Any]:
        model.eval()
        logits = model(held_x)
        model.train()
        return {
            "losses": F.cross_entropy(logits, held_y, reduction="none").numpy(),
            "val_acc": (logits.argmax(1) == held_y).float().mean(),
        }

    batch = min(BATCH, len(x))
    per_epoch = len(x) // batch
    for step in range(steps):
        epoch, part = divmod(step, per_epoch)
        order_of_epoch = np.random.default_rng([config.seed, epoch]).permutation(len(x))
        chosen = torch.from_numpy(order_of_epoch[part * batch : (part + 1) * batch])
        logits = model(x[chosen])
        losses = F.cross_entropy(logits, y[chosen], reduction="none")
        optimizer.zero_grad()
        losses.mean().backward()
        recorder.step(step, logits, y[chosen], losses, lr=LR[kind], epoch=step / per_epoch, evaluate=evaluate)
        optimizer.step()
    return recorder, {"per_epoch": per_epoch}
