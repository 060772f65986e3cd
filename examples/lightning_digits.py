"""Lightning on digits of which 60 % have a random label, ended by the verdict: python examples/lightning_digits.py

No validation data is used to end the training; the held-out half is only looked at afterwards.
"""

import tempfile

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from logalign.integrations.lightning import LogAlignCallback

NOISE = 0.6


def digits():
    """640 images to train on, 60 % of them with a random label, and 640 others with their own."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(labels))
    images, labels = images[order], labels[order]
    noisy = labels[:640].clone()
    random = torch.rand(640) < NOISE
    noisy[random] = torch.randint(0, 10, (int(random.sum()),))
    return TensorDataset(images[:640], noisy), (images[640:1280], labels[640:1280])


class Classifier(pl.LightningModule):
    """A network of three layers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)

    def forward(self, images):
        """Logits of ten classes."""
        return self.head(self.body(images))

    def training_step(self, batch, batch_idx):
        """Cross entropy."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self):
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def held_out(model, images, labels):
    """Loss and accuracy on images that were not trained on."""
    model.eval()
    with torch.no_grad():
        logits = model(images)
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(-1) == labels).float().mean())


def main():
    """Train to the end and until the verdict, and say what was held out."""
    folder = tempfile.mkdtemp(prefix="logalign-lightning-")
    for stop in (False, True):
        pl.seed_everything(0, verbose=False)
        training, (images, labels) = digits()
        model = Classifier()
        watcher = LogAlignCallback(stop=stop)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=60,
            logger=CSVLogger(folder, name="stopped" if stop else "to-the-end"),
            log_every_n_steps=1,
            callbacks=[watcher],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(model, DataLoader(training, batch_size=64, shuffle=True))
        loss, accuracy = held_out(model, images, labels)
        lar = watcher.monitor.readings[-1].main.lar
        print(f"{trainer.global_step} steps, LAR {lar:.3f}; held out: loss {loss:.2f}, accuracy {accuracy:.2f}")
        print(watcher.monitor.verdict.headline())
    print(f"curves: {trainer.logger.log_dir}/metrics.csv, column logalign/lar and others")


if __name__ == "__main__":
    main()
