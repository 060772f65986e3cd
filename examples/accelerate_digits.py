"""A plain loop under Accelerate, with micro-batches and a checkpoint: python examples/accelerate_digits.py

On two processes: torchrun --nproc_per_node 2 examples/accelerate_digits.py
"""

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from logalign import watch

EPOCHS, MICRO_BATCHES = 20, 2
FOLDER = Path(tempfile.gettempdir()) / "logalign-accelerate"


def loader():
    """The digits of scikit-learn."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    return DataLoader(data, batch_size=32, shuffle=True)


def main():
    """Train with micro-batches, and log to TensorBoard from the main process."""
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=MICRO_BATCHES, log_with="tensorboard", project_dir=FOLDER
    )
    set_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    model, optimizer, batches = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=2e-3), loader())
    accelerator.init_trackers("digits")
    monitor = watch(model, every=10, trackers=accelerator)
    accelerator.register_for_checkpointing(monitor)
    for epoch in range(EPOCHS):
        for index, (images, labels) in enumerate(batches):
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                monitor.step(loss=loss, epoch=epoch + index / len(batches))
    accelerator.save_state(FOLDER / "checkpoint")
    accelerator.print(f"step {monitor.readings[-1].main.step}: LAR {monitor.readings[-1].main.lar:.3f}")
    accelerator.print(monitor.verdict.headline())
    accelerator.print(f"curves: tensorboard --logdir {FOLDER}")
    monitor.close()
    accelerator.end_training()


if __name__ == "__main__":
    main()
