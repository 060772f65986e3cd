"""Make one run and keep it in the work folder: its readings as columns, its truth and its facts beside them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.generalization.algorithmic import train_algorithmic
from benchmarks.generalization.configs import Config
from benchmarks.generalization.language import train_finetuning, train_language
from benchmarks.generalization.store import file_of
from benchmarks.generalization.vision import train_vision

TRAINERS = {
    "language": train_language,
    "finetuning": train_finetuning,
    "vision": train_vision,
    "algorithmic": train_algorithmic,
}


def train_one(config: Config, work: Path) -> None:
    """Train, and write `NAME.npz` and then `NAME.json`, whose presence says that the run is whole."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    recorder, facts = TRAINERS[config.family](config, work)
    facts |= recorder.close()
    facts["seconds"]["all"] = time.perf_counter() - started
    target = file_of(config, work)
    target.parent.mkdir(parents=True, exist_ok=True)
    names = sorted({name for row in recorder.rows for name in row})
    columns = {name: np.array([row.get(name, np.nan) for row in recorder.rows], dtype=np.float64) for name in names}
    np.savez_compressed(target.with_suffix(".npz"), **columns)
    record = {"name": config.name, "family": config.family, "settings": config.settings, "seed": config.seed, **facts}
    draft = target.with_suffix(".draft")
    draft.write_text(json.dumps(record, indent=1) + "\n")
    draft.replace(target)
