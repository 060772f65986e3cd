"""Make one run and keep it in the work folder: its readings as columns, its truth and its facts beside them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.generalization.algorithmic import train_algorithmic
from benchmarks.generalization.configs import Config
from benchmarks.generalization.language import train_finetuning, train_language
from benchmarks.generalization.recorder import Recorder
from benchmarks.generalization.small import train_small
from benchmarks.generalization.store import file_of
from benchmarks.generalization.vision import train_vision

Trained = Callable[[Config, Path], tuple[Recorder, dict[str, Any]]]


def trainer_of(config: Config) -> Trained:
    """What trains a run of this kind."""
    if config.settings.get("by") == "trainer":
        from benchmarks.generalization.by_trainer import train_by_trainer

        return train_by_trainer
    if "data" in config.settings:
        return train_small
    trained: dict[str, Trained] = {
        "language": train_language,
        "finetuning": train_finetuning,
        "vision": train_vision,
        "algorithmic": train_algorithmic,
    }
    return trained[config.family]


def train_one(config: Config, work: Path) -> None:
    """Train, and write `NAME.npz` and then `NAME.json`, whose presence says that the run is whole."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    recorder, facts = trainer_of(config)(config, work)
    facts |= recorder.close()
    facts["seconds"]["all"] = time.perf_counter() - started
    target = file_of(config, work)
    target.parent.mkdir(parents=True, exist_ok=True)
    names = sorted({name for row in recorder.rows for name in row})
    columns = {name: np.array([row.get(name, np.nan) for row in recorder.rows], dtype=np.float64) for name in names}
    np.savez_compressed(target.with_suffix(".npz"), **columns)
    steps, samples, losses = zip(*recorder.visits, strict=True) if recorder.visits else ((), (), ())
    np.savez_compressed(
        target.with_suffix(".visits.npz"),
        step=np.array(steps, dtype=np.int32),
        sample=np.array(samples, dtype=np.int64),
        loss=np.array(losses, dtype=np.float32),
    )
    record = {"name": config.name, "family": config.family, "settings": config.settings, "seed": config.seed, **facts}
    draft = target.with_suffix(".draft")
    draft.write_text(json.dumps(record, indent=1) + "\n")
    draft.replace(target)
