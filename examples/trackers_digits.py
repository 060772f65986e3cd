"""Readings in TensorBoard and in a CSV file at once: python examples/trackers_digits.py

Then: tensorboard --logdir trackers-digits, or logalign diagnose trackers-digits/metrics.csv
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

import logalign

FOLDER = "trackers-digits"
EPOCHS = 10


def main():
    """Train a classifier of digits, and show its readings where its other curves are."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    loader = DataLoader(data, batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    writer = SummaryWriter(FOLDER)
    monitor = logalign.watch(model, run=FOLDER, trackers=[writer, "csv"])
    step = 0
    for _ in range(EPOCHS):
        for inputs, targets in loader:
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            writer.add_scalar("loss", loss.item(), step)
            step += 1
            monitor.step(loss=loss, epoch=step / len(loader))
    print(f"lar {monitor.readings[-1].main.lar:.3f}; {monitor.verdict}")
    monitor.close()
    writer.close()


if __name__ == "__main__":
    main()
