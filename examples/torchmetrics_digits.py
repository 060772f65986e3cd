"""LAR beside the accuracy, on training and on held-out data: python examples/torchmetrics_digits.py"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from logalign.integrations.torchmetrics import LogAlignmentRatio


def loaders():
    """1,280 images to train on, in another order each epoch, and the rest."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    parts = [TensorDataset(images[part], labels[part]) for part in (slice(1280), slice(1280, None))]
    return DataLoader(parts[0], batch_size=128, shuffle=True), DataLoader(parts[1], batch_size=128)


def main():
    """Train, and measure both parts after every fifth epoch, where the weights stand still."""
    torch.manual_seed(0)
    body, head = nn.Sequential(nn.Linear(64, 128), nn.ReLU()), nn.Linear(128, 10)
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=2e-3)
    metrics = MetricCollection(
        {
            "accuracy": MulticlassAccuracy(10, average="micro"),
            "lar": LogAlignmentRatio(head.weight.shape),
            "lar_centered": LogAlignmentRatio(head.weight.shape, form="lar_centered"),
        }
    )
    train, held_out = loaders()
    for epoch in range(1, 16):
        for images, labels in train:
            loss = F.cross_entropy(head(body(images)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % 5:
            continue
        for part, loader in (("train", train), ("held out", held_out)):
            metrics.reset()
            with torch.no_grad():
                for images, labels in loader:
                    hidden = body(images)
                    logits = head(hidden)
                    layer = {"weight": head.weight, "inputs": hidden, "outputs": logits, "bias": head.bias}
                    metrics.update(preds=logits, target=labels, **layer)
            values = ", ".join(f"{name} {value:.3f}" for name, value in metrics.compute().items())
            print(f"epoch {epoch:2}, {part}: {values}")


if __name__ == "__main__":
    main()
