"""Small networks on images, tables and texts: clean and noisy labels, several losses, schedules and shapes of network.

Shapes: B samples, m outputs; logits [B, m]; losses [B], one a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.generalization.configs import Config
from benchmarks.generalization.language import multiplier
from benchmarks.generalization.recorder import Recorder
from benchmarks.generalization.samples import VOCABULARY, samples_of

PASSES = 40
EVERY = 10
LR = {"mlp": 2e-3, "cnn": 2e-3, "resnet": 2e-3, "bag": 5e-3, "lstm": 3e-3}
WIDTH = 128

Loss = Callable[[Tensor, Tensor], Tensor]


class Residual(nn.Module):
    """Two convolutions and a way past them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.second(F.relu(self.norm(self.first(x)))))


class Reader(nn.Module):
    """Words, then their mean or the last state of an LSTM, then a head."""

    def __init__(self, kind: str, outputs: int) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.cells = nn.LSTM(WIDTH, WIDTH, batch_first=True) if kind == "lstm" else None
        self.head = nn.Linear(WIDTH, outputs)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        return cast(Tensor, self.head(x.mean(1) if self.cells is None else self.cells(x)[0].mean(1)))


def network(kind: str, sample: Tensor, outputs: int) -> tuple[nn.Module, str]:
    """A network of this kind for samples of this shape, and the name of its head."""
    if kind in ("bag", "lstm"):
        return Reader(kind, outputs), "head"
    if kind == "mlp":
        body: list[nn.Module] = [nn.Flatten(), nn.Linear(sample.numel(), WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)]
    elif kind == "cnn":
        body = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
        body += [nn.Flatten(), nn.Linear(512, WIDTH)]
    else:
        body = [nn.Conv2d(1, 32, 3, padding=1), Residual(32), nn.ReLU(), nn.MaxPool2d(2), Residual(32), nn.ReLU()]
        body += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, WIDTH)]
    layers = [*body, nn.ReLU(), nn.Linear(WIDTH, outputs)]
    return nn.Sequential(*layers), str(len(layers) - 1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[B]."""
    return F.cross_entropy(logits, targets, reduction="none")


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, weighted by the square of how far the prediction is off; [B]."""
    losses = cross_entropy(logits, targets)
    return (1 - torch.exp(-losses)).square() * losses


def smoothed(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy with a tenth of every target spread over all classes; [B]."""
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error, of targets of variance 1; [B]."""
    return (outputs[:, 0] - targets).square()


def binary(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of yes and no, the mean over all tags; [B]."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)


TRAINED_BY: dict[str, tuple[Loss, Loss, float]] = {
    "cross entropy": (cross_entropy, cross_entropy, 1.0),
    "focal": (focal, cross_entropy, 1.0),
    "smoothing": (smoothed, cross_entropy, 1.0),
    "hundredfold": (cross_entropy, cross_entropy, 100.0),
    "squares": (squares, squares, 1.0),
    "binary": (binary, binary, 1.0),
}
"""What is trained by, what is held against the held-out samples, and by what the first is multiplied."""


def train_small(config: Config, work: Path) -> tuple[Recorder, dict[str, Any]]:
    """Train one small network."""
    settings = config.settings
    data = samples_of(settings, config.seed)
    x, y = data.train
    loss, judged, scale = TRAINED_BY[settings.get("loss", "cross entropy")]
    torch.manual_seed(config.seed)
    model, head = network(settings["model"], x[0], data.outputs)
    peak = settings.get("lr", LR[settings["model"]])
    optimizer: torch.optim.Optimizer
    if settings.get("optimizer") == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=peak)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=settings["decay"])
    batch = settings["batch"]
    per_epoch = len(x) // batch
    steps = PASSES * per_epoch
    classifies = y.dtype == torch.int64
    recorder = Recorder(model, head, steps=steps, every=EVERY, evaluate_every=EVERY, classifies=classifies)
    smallest = max(1, round(len(data.kept_apart[0]) / 5))

    @torch.no_grad()
    def evaluate() -> dict[str, Any]:
        model.eval()
        logits = model(data.held_out[0])
        found = {"losses": judged(logits, data.held_out[1]).numpy()}
        apart = judged(model(data.kept_apart[0]), data.kept_apart[1])
        found |= {"val1_loss": apart[:smallest].mean(), "val5_loss": apart.mean()}
        if classifies:
            found["val_acc"] = (logits.argmax(1) == data.held_out[1]).float().mean()
        model.train()
        return found

    for step in range(steps):
        epoch, part = divmod(step, per_epoch)
        order = np.random.default_rng([config.seed, epoch]).permutation(len(x))
        chosen = torch.from_numpy(order[part * batch : (part + 1) * batch])
        rate = peak * multiplier(step / steps, settings["schedule"])
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs = shifted(x[chosen]) if settings.get("augment") else x[chosen]
        logits = model(inputs)
        losses = loss(logits, y[chosen])
        optimizer.zero_grad()
        (scale * losses.mean()).backward()
        recorder.step(
            step,
            logits,
            y[chosen],
            losses,
            lr=rate,
            epoch=step / per_epoch,
            evaluate=evaluate,
            scale=scale,
            give_losses=not classifies,
        )
        optimizer.step()
    return recorder, {"per_epoch": per_epoch}


def shifted(images: Tensor) -> Tensor:
    """Each image moved by up to one pixel in both directions."""
    padded = F.pad(images, (1, 1, 1, 1))
    size = images.shape[-1]
    rows, columns = torch.randint(0, 3, (2, len(images)))
    return torch.stack(
        [
            image[:, r : r + size, c : c + size]
            for image, r, c in zip(padded, rows.tolist(), columns.tolist(), strict=True)
        ]
    )
