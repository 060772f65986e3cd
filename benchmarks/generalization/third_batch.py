"""The third batch: more of what people train, every run with what happens to samples that come back.

Schedules that end at zero in every family, clean classifiers of several kinds, augmented images, an LSTM with tied
weights, fine-tuning by the Trainer of Transformers, losses that are no plain cross entropy, runs that diverge, and
networks that generalize late and are then shaken by their own optimizer. No run is a baseline of another.

And the fourth, made when clean digits outside of the benchmark turned out to raise false alarms: the same images as
people train on them, with Adam at 1e-3, small batches and no weight decay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Made = tuple[str, dict[str, Any], int]
"""Family, settings, seed."""


def third_batch() -> Iterator[Made]:
    """Every run of it."""
    yield from _language()
    yield from _trainer()
    yield from _images()
    yield from _tables_and_texts()
    yield from _losses()
    yield from _shaken()


def fourth_batch() -> Iterator[Made]:
    """Every run of it."""
    plain = {"data": "digits", "noise": 0.0, "samples": 1300, "schedule": "constant", "decay": 0.0, "lr": 1e-3}
    for model in ("mlp", "cnn"):
        for batch in (16, 32):
            for seed in range(5):
                yield "vision", {**plain, "batch": batch, "model": model}, seed


def _language() -> Iterator[Made]:
    plain = {"width": 64, "tied": False, "lr": 2e-3, "schedule": "constant", "decay": 0.1, "dropout": 0.0}
    for schedule in ("linear0", "cosine0", "wsd0"):
        for text in ("python", "prose"):
            for unique in (50_000, 100_000, 200_000):
                yield "language", {"text": text, **plain, "schedule": schedule, "unique": unique}, 0
        yield "language", {"text": "python", **plain, "schedule": schedule, "unique": 0}, 0
    for text in ("python", "prose"):
        for unique in (40_000, 150_000):
            yield "language", {"text": text, **plain, "tied": True, "unique": unique, "model": "lstm"}, 0
    for unique in (50_000, 200_000):
        yield "language", {"text": "python", **plain, "unique": unique, "scale": 100.0}, 0
    for unique in (50_000, 200_000):
        yield "language", {"text": "prose", **plain, "unique": unique, "smoothing": 0.1}, 0
    yield "language", {"text": "python", **plain, "lr": 3.0, "unique": 100_000}, 0
    yield "language", {"text": "prose", **plain, "lr": 30.0, "unique": 100_000}, 0


def _trainer() -> Iterator[Made]:
    lengths = ((200, 10), (500, 6), (1000, 5), (2000, 3))
    for number, (model, method) in enumerate((m, by) for m in ("llama", "gpt2") for by in ("full", "lora")):
        for i, (sequences, passes) in enumerate(lengths):
            for j, direction in enumerate(("python-to-prose", "prose-to-python")):
                low, high = (3e-4, 1e-3) if method == "full" else (1e-3, 3e-3)
                settings = {"by": "trainer", "model": model, "method": method, "direction": direction}
                lr = (low, high)[(number + i + j) % 2]
                yield "finetuning", {**settings, "lr": lr, "sequences": sequences, "passes": passes}, 0


def _images() -> Iterator[Made]:
    plain = {"data": "digits", "noise": 0.0, "samples": 1300, "batch": 64, "schedule": "constant", "decay": 0.01}
    for model in ("mlp", "cnn", "resnet"):
        for schedule in ("constant", "cosine0"):
            for seed in (0, 1):
                yield "vision", {**plain, "model": model, "schedule": schedule}, seed
        for noise, schedule in ((0.1, "cosine0"), (0.3, "linear0"), (0.3, "constant")):
            yield "vision", {**plain, "model": model, "noise": noise, "schedule": schedule}, 0
        for noise in (0.0, 0.3):
            yield "vision", {**plain, "model": model, "noise": noise, "schedule": "cosine0", "augment": True}, 0
        yield "vision", {**plain, "model": model, "samples": 200, "batch": 32, "schedule": "wsd0"}, 0
    yield "vision", {**plain, "model": "mlp", "lr": 100.0, "optimizer": "sgd"}, 0


def _tables_and_texts() -> Iterator[Made]:
    plain = {"noise": 0.0, "batch": 64, "schedule": "constant", "decay": 0.01}
    for noise in (0.0, 0.2):
        yield "tables and texts", {"data": "cancer", **plain, "noise": noise, "samples": 380, "model": "mlp"}, 0
    yield "tables and texts", {"data": "wine", **plain, "samples": 110, "batch": 16, "model": "mlp"}, 0
    for noise in (0.0, 0.1, 0.3):
        for schedule in ("constant", "linear0"):
            settings = {"data": "blobs", **plain, "noise": noise, "samples": 2000, "schedule": schedule}
            yield "tables and texts", {**settings, "model": "mlp"}, 0
    for data, samples in (("books", 3000), ("packages", 3000), ("languages", 2000)):
        for model in ("bag", "lstm"):
            for schedule in ("constant", "cosine0"):
                settings = {"data": data, **plain, "samples": samples, "schedule": schedule}
                yield "tables and texts", {**settings, "model": model}, 0


def _losses() -> Iterator[Made]:
    plain = {"noise": 0.0, "batch": 64, "schedule": "constant", "decay": 0.01, "samples": 1300, "model": "mlp"}
    for noise in (0.0, 0.3):
        for loss in ("focal", "smoothing", "hundredfold"):
            yield "other losses", {"data": "digits", **plain, "noise": noise, "loss": loss}, 0
    for samples in (200, 2000):
        yield "other losses", {"data": "curves", **plain, "samples": samples, "loss": "squares"}, 0
    yield "other losses", {"data": "diabetes", **plain, "samples": 300, "batch": 32, "loss": "squares"}, 0
    for noise in (0.0, 1.0):
        for samples in (400, 2000):
            settings = {"data": "tags", **plain, "noise": noise, "samples": samples, "loss": "binary"}
            yield "other losses", settings, 0


def _shaken() -> Iterator[Made]:
    for share, seed in ((0.3, 0), (0.4, 1)):
        settings = {"model": "transformer", "operation": "add", "p": 113, "width": 128, "share": share, "decay": 1.0}
        yield "algorithmic", {**settings, "steps": 12_000}, seed
