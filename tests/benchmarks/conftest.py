"""Runs of the benchmark made by hand: every column that a run has, with numbers drawn, not trained."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks.generalization.configs import Config, all_configs
from benchmarks.generalization.recorder import truth
from benchmarks.generalization.store import Made

MakeRun = Callable[..., Made]
DRAWN = (
    *("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered", "rare_lar", "common_lar"),
    *("site_first_lar", "site_last_lar", "weight_participation", "input_participation", "coherence"),
    *("energy_weight", "energy_input", "energy_output", "weight_norm", "gradient_norm"),
    *("stable_rank", "entropy_rank", "rankme", "prediction_entropy", "loss_spread", "loss", "train_loss"),
)


@pytest.fixture
def make_run() -> MakeRun:
    """Make a run of a configuration; `held_out` is its held-out loss at every reading, other columns by name."""

    def make(
        config: Config | None = None,
        *,
        readings: int = 40,
        epochs: float = 4.0,
        held_out: Any = None,
        seed: int = 0,
        facts: dict[str, Any] | None = None,
        **columns: Any,
    ) -> Made:
        generator = np.random.default_rng(seed)
        steps = 10.0 * np.arange(readings)
        found = {name: np.abs(0.6 + 0.02 * generator.normal(size=readings).cumsum()) for name in DRAWN}
        found |= {
            "step": steps,
            "epoch": epochs * np.arange(readings) / readings,
            "lr": np.full(readings, 1e-3),
            "n": np.full(readings, 64.0),
            "m": np.full(readings, 512.0),
            "tokens": np.full(readings, 1024.0),
            "tokens_seen": 1024 * (steps + 1),
            "train_acc": np.linspace(0, 1, readings),
            "val_acc": np.linspace(0, 1, readings),
            "val_loss": np.linspace(5, 4, readings) if held_out is None else np.asarray(held_out, dtype=float),
        }
        alpha = np.full(readings, np.nan)
        alpha[::7] = 3.0 + generator.random(len(alpha[::7]))
        found |= {"alpha_mean": alpha, "alpha_head": np.full(readings, np.nan)}
        found |= {name: np.asarray(values, dtype=float) for name, values in columns.items()}
        losses = [np.full(20, value) for value in found["val_loss"]]
        known = {"truth": truth([int(step) for step in steps], losses), "per_epoch": 10}
        return Made(config or all_configs()[0], found, known | (facts or {}))

    return make


@pytest.fixture
def overfits() -> np.ndarray:
    """A held-out loss that falls for 20 readings and then rises: lowest at step 200."""
    return np.abs(np.arange(40.0) - 20) / 10 + 4


@pytest.fixture
def between() -> np.ndarray:
    """A held-out loss that ends 0.03 nat above its lowest: neither healthy nor overfit."""
    return np.concatenate([np.linspace(5, 4, 20), np.full(10, 4.0), np.full(10, 4.03)])
