"""A script as a user has it, which Lightning's own launcher starts once more for every further process.

lightning_ddp.py PACKAGE FOLDER DEVICES [until-an-alarm | sharded]
"""

import importlib
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def main(package: str, folder: Path, devices: int, mode: str = "resumed") -> None:
    pl = importlib.import_module(package)
    loggers = importlib.import_module(f"{package}.loggers")
    from logalign.integrations.lightning import LogAlignCallback

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
            self.head = nn.Linear(16, 10)

        def training_step(self, batch, batch_idx):
            images, labels = batch
            return F.cross_entropy(self.head(self.body(images)), labels)

        def validation_step(self, batch, batch_idx):
            self.head(self.body(batch[0]))

        def train_dataloader(self):
            # Each process takes every other sample, in order: those of a step are those of one process.
            sampler = DistributedSampler(data, devices, self.global_rank, shuffle=False)
            return DataLoader(data, batch_size=32 // devices, sampler=sampler)

        def val_dataloader(self):
            return DataLoader(data, batch_size=32)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    class Noisy(Classifier):
        """60 % of the labels are random, and learned by heart."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
            self.head = nn.Linear(128, 10)

        def train_dataloader(self):
            generator = torch.Generator().manual_seed(0)
            random = torch.rand(256, generator=generator) < 0.6
            noisy = torch.tensor(labels[:256])
            noisy[random] = torch.randint(0, 10, (int(random.sum()),), generator=generator)
            noise = TensorDataset(torch.tensor(images[:256] / 16, dtype=torch.float32), noisy)
            sampler = DistributedSampler(noise, devices, self.global_rank, seed=0)
            return DataLoader(noise, batch_size=64 // devices, sampler=sampler)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=5e-3)

    class Sharded(Classifier):
        """Its weights are spread over the ranks by `fully_shard`."""

        def configure_model(self):
            for part in (self.body, self.head, self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images[:192] / 16, dtype=torch.float32), torch.tensor(labels[:192]))

    def trainer_with(callback, epochs: int, part: str, strategy="ddp"):
        return pl.Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=strategy if devices > 1 else "auto",
            use_distributed_sampler=False,
            max_epochs=epochs,
            logger=loggers.CSVLogger(folder, name="", version=part),
            log_every_n_steps=1,
            default_root_dir=folder,
            callbacks=[callback],
            enable_progress_bar=False,
            enable_checkpointing=False,
        )

    if mode == "sharded":
        callback = LogAlignCallback(every=2, run=folder / "run")
        from lightning.pytorch.strategies import ModelParallelStrategy

        strategy = ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)
        trainer_with(callback, 2, "sharded", strategy).fit(Sharded())
        return
    if mode == "until-an-alarm":
        callback = LogAlignCallback(every=2, stop=True, save=True)
        trainer = trainer_with(callback, 100, "noisy")
        trainer.fit(Noisy(), val_dataloaders=[])
        torch.save({"steps": trainer.global_step}, folder / f"rank{trainer.global_rank}.pt")
        return
    checkpoint = folder / "first.ckpt"
    lars: list[float | None] = []
    for epochs, part in ((1, "first"), (2, "second")):
        callback = LogAlignCallback(every=2, run=folder / "run")
        trainer = trainer_with(callback, epochs, part)
        model = Classifier()
        trainer.fit(model, ckpt_path=checkpoint if part == "second" else None)
        trainer.save_checkpoint(folder / f"{part}.ckpt")
        lars += [readings.main.lar for readings in callback.monitor.readings]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({"lars": lars, "weights": weights}, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
