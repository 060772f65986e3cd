"""The runs of the benchmark: six families, every configuration with its seeds, and the split into two halves.

A run's name says all that decides its numbers. A *recipe* is what two runs must share for one to be the baseline of the
other: data, model shape and schedule, but not how often the data repeat, nor the regularization or the seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from benchmarks.generalization.third_batch import fourth_batch, third_batch

FAMILIES = ("language", "finetuning", "vision", "tables and texts", "other losses", "algorithmic")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
        family: One of `FAMILIES`.
        settings: What decides the run beside the seed; plain values.
        seed: Of initial weights, order and, where data are drawn, of the data.
        baseline: Whether it can be the baseline of other runs of its recipe: no data repeat, or labels are clean.
        recipe_keys: The names of those settings that make runs comparable.
        batch: In which of the batches it was made; each batch was split into halves by itself, before it was made.
    """

    family: str
    settings: dict[str, Any] = field(hash=False)
    seed: int = 0
    baseline: bool = False
    recipe_keys: tuple[str, ...] = ()
    batch: int = 1

    @property
    def configuration(self) -> str:
        """The run's name without its seed."""
        parts = [f"{key}={_short(value)}" for key, value in self.settings.items()]
        return "/".join([self.family, ",".join(parts)])

    @property
    def name(self) -> str:
        """The run's name."""
        return f"{self.configuration},seed={self.seed}"

    @property
    def recipe(self) -> str:
        """What it shares with the runs that it can be compared with."""
        return "/".join([self.family, ",".join(f"{key}={_short(self.settings[key])}" for key in self.recipe_keys)])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


LANGUAGE_STEPS = 1000
LANGUAGE_RECIPES: tuple[dict[str, Any], ...] = (
    {"text": "python", "width": 96, "tied": False, "lr": 1e-3, "schedule": "constant"},
    {"text": "prose", "width": 96, "tied": False, "lr": 1e-3, "schedule": "constant"},
    {"text": "python", "width": 64, "tied": False, "lr": 2e-3, "schedule": "cosine"},
    {"text": "prose", "width": 128, "tied": True, "lr": 1e-3, "schedule": "cosine"},
    {"text": "python", "width": 128, "tied": True, "lr": 5e-4, "schedule": "constant"},
    {"text": "prose", "width": 64, "tied": False, "lr": 3e-3, "schedule": "constant"},
)
# Unique tokens (0: as many as the run needs), weight decay, dropout.
LANGUAGE_DATA: tuple[tuple[int, float, float], ...] = (
    (50_000, 0.1, 0.0),
    (50_000, 0.1, 0.3),
    (100_000, 0.1, 0.0),
    (100_000, 1.0, 0.0),
    (100_000, 0.1, 0.2),
    (200_000, 0.1, 0.0),
    (200_000, 0.1, 0.2),
    (400_000, 0.1, 0.0),
    (400_000, 0.1, 0.1),
)


def _language() -> Iterator[Config]:
    keys = tuple(LANGUAGE_RECIPES[0])
    for recipe in LANGUAGE_RECIPES:
        for seed in (100, 101):
            settings = {**recipe, "unique": 0, "decay": 0.1, "dropout": 0.0}
            yield Config(family="language", settings=settings, seed=seed, baseline=True, recipe_keys=keys)
        for unique, decay, dropout in LANGUAGE_DATA:
            settings = {**recipe, "unique": unique, "decay": decay, "dropout": dropout}
            yield Config(family="language", settings=settings, seed=0, recipe_keys=keys)


# The second batch: data closer to the threshold between healthy and overfit, and two recipes that train longer.
MORE_LANGUAGE_DATA: tuple[tuple[int, float, float], ...] = (
    (30_000, 0.1, 0.0),
    (30_000, 0.1, 0.3),
    (75_000, 0.1, 0.0),
    (75_000, 1.0, 0.1),
    (150_000, 0.1, 0.0),
)
LONG_LANGUAGE_RECIPES: tuple[dict[str, Any], ...] = (
    {"text": "python", "width": 96, "tied": False, "lr": 1e-3, "schedule": "constant", "steps": 2000},
    {"text": "python", "width": 64, "tied": True, "lr": 2e-3, "schedule": "constant", "steps": 2000},
)
LONG_LANGUAGE_DATA: tuple[tuple[int, float, float], ...] = (
    (100_000, 0.1, 0.0),
    (200_000, 0.1, 0.0),
    (200_000, 0.1, 0.2),
    (400_000, 0.1, 0.0),
)


def _more_language() -> Iterator[Config]:
    keys = tuple(LANGUAGE_RECIPES[0])
    for recipe in LANGUAGE_RECIPES:
        for unique, decay, dropout in MORE_LANGUAGE_DATA:
            settings = {**recipe, "unique": unique, "decay": decay, "dropout": dropout}
            yield Config(family="language", settings=settings, recipe_keys=keys, batch=2)
        for unique in (50_000, 100_000):  # another seed of configurations of the first batch, in their half
            settings = {**recipe, "unique": unique, "decay": 0.1, "dropout": 0.0}
            yield Config(family="language", settings=settings, seed=1, recipe_keys=keys, batch=2)
    keys = tuple(LONG_LANGUAGE_RECIPES[0])
    for recipe in LONG_LANGUAGE_RECIPES:
        for seed in (100, 101):
            settings = {**recipe, "unique": 0, "decay": 0.1, "dropout": 0.0}
            yield Config(family="language", settings=settings, seed=seed, baseline=True, recipe_keys=keys, batch=2)
        for unique, decay, dropout in LONG_LANGUAGE_DATA:
            settings = {**recipe, "unique": unique, "decay": decay, "dropout": dropout}
            yield Config(family="language", settings=settings, recipe_keys=keys, batch=2)


FINETUNING_STEPS = 400


def _finetuning() -> Iterator[Config]:
    keys = ("direction", "method", "lr")
    for direction in ("python-to-prose", "prose-to-python"):
        for method in ("full", "lora"):
            for lr in (3e-4, 1e-3) if method == "full" else (1e-3, 3e-3):
                recipe = {"direction": direction, "method": method, "lr": lr}
                for seed in (100, 101):
                    settings = {**recipe, "unique": 0}
                    yield Config(family="finetuning", settings=settings, seed=seed, baseline=True, recipe_keys=keys)
                for unique in (20_000, 60_000, 150_000):
                    yield Config(family="finetuning", settings={**recipe, "unique": unique}, recipe_keys=keys)


def _more_finetuning() -> Iterator[Config]:
    """Less data and more steps, and readings twice as often: in the first batch three runs of forty overfit."""
    keys = ("direction", "method", "lr", "steps", "every")
    for direction in ("python-to-prose", "prose-to-python"):
        for method, lr in (("full", 3e-4), ("full", 1e-3), ("lora", 3e-3)):
            recipe = {"direction": direction, "method": method, "lr": lr, "steps": 800, "every": 5}
            for seed in (100, 101):
                settings = {**recipe, "unique": 0}
                yield Config(
                    family="finetuning", settings=settings, seed=seed, baseline=True, recipe_keys=keys, batch=2
                )
            for unique in (10_000, 20_000, 40_000, 80_000):
                yield Config(family="finetuning", settings={**recipe, "unique": unique}, recipe_keys=keys, batch=2)


VISION_STEPS = {"mlp": 1500, "cnn": 600}


def _vision() -> Iterator[Config]:
    keys = ("model", "decay", "samples")
    for noise in (0.0, 0.1, 0.2, 0.4, 0.6):
        for decay in (0.0, 0.1, 1.0):
            for seed in (0, 1):
                settings = {"model": "mlp", "decay": decay, "samples": 1300, "noise": noise}
                yield Config(family="vision", settings=settings, seed=seed, baseline=noise == 0, recipe_keys=keys)
    for noise in (0.0, 0.2, 0.4):
        for decay in (0.0, 0.1):
            for seed in (0, 1):
                settings = {"model": "cnn", "decay": decay, "samples": 1300, "noise": noise}
                yield Config(family="vision", settings=settings, seed=seed, baseline=noise == 0, recipe_keys=keys)
    for decay in (0.0, 1.0):
        for noise in (0.0, 0.3):
            for seed in (0, 1):
                settings = {"model": "mlp", "decay": decay, "samples": 300, "noise": noise}
                yield Config(family="vision", settings=settings, seed=seed, baseline=noise == 0, recipe_keys=keys)


ALGORITHMIC_STEPS = {"mlp": 2000, "transformer": 3000}
# Model, operation, modulus, width, share of the pairs that is trained on, weight decay, seeds.
ALGORITHMIC_RUNS: tuple[tuple[str, str, int, int, float, float, tuple[int, ...]], ...] = (
    ("mlp", "add", 59, 64, 0.5, 1.0, (0, 1)),
    ("mlp", "add", 59, 64, 0.5, 0.3, (0,)),
    ("mlp", "add", 59, 64, 0.5, 0.0, (0, 1)),
    ("mlp", "add", 59, 64, 0.35, 1.0, (0,)),
    ("mlp", "add", 59, 64, 0.2, 1.0, (0, 1)),
    ("mlp", "add", 59, 64, 0.7, 1.0, (0,)),
    ("mlp", "add", 59, 96, 0.5, 1.0, (0,)),
    ("mlp", "add", 47, 48, 0.5, 1.0, (0, 1)),
    ("mlp", "add", 47, 48, 0.25, 1.0, (0,)),
    ("mlp", "add", 67, 96, 0.5, 1.0, (0, 1)),
    ("mlp", "add", 67, 96, 0.4, 1.0, (0,)),
    ("mlp", "add", 67, 96, 0.5, 0.0, (0,)),
    ("mlp", "add", 67, 128, 0.7, 1.0, (0,)),
    ("mlp", "sub", 59, 64, 0.5, 1.0, (0, 1)),
    ("mlp", "sub", 59, 64, 0.5, 0.0, (0,)),
    ("mlp", "sub", 47, 64, 0.6, 1.0, (0,)),
    ("mlp", "sub", 67, 96, 0.6, 1.0, (0,)),
    ("mlp", "sub", 59, 64, 0.25, 1.0, (0,)),
    ("mlp", "mul", 59, 64, 0.5, 1.0, (0, 1)),
    ("mlp", "mul", 59, 64, 0.5, 0.0, (0,)),
    ("mlp", "mul", 47, 64, 0.6, 1.0, (0,)),
    ("mlp", "mul", 67, 96, 0.5, 1.0, (0,)),
    ("mlp", "mul", 59, 64, 0.2, 1.0, (0,)),
    ("transformer", "add", 47, 64, 0.5, 1.0, (0, 1)),
    ("transformer", "add", 47, 64, 0.5, 0.0, (0,)),
    ("transformer", "add", 47, 64, 0.3, 1.0, (0,)),
    ("transformer", "add", 43, 96, 0.6, 1.0, (0,)),
    ("transformer", "add", 43, 64, 0.7, 1.0, (0,)),
    ("transformer", "sub", 47, 64, 0.6, 1.0, (0,)),
    ("transformer", "mul", 47, 64, 0.6, 1.0, (0,)),
    ("transformer", "mul", 43, 64, 0.2, 1.0, (0,)),
)


def _algorithmic() -> Iterator[Config]:
    for model, operation, p, width, share, decay, seeds in ALGORITHMIC_RUNS:
        settings = {"model": model, "operation": operation, "p": p, "width": width, "share": share, "decay": decay}
        for seed in seeds:
            yield Config(family="algorithmic", settings=settings, seed=seed, recipe_keys=("model", "operation", "p"))


def all_configs() -> list[Config]:
    """Every run of the benchmark, by family."""
    language = [*_language(), *_more_language()]
    later = [
        Config(family=family, settings=settings, seed=seed, batch=batch)
        for batch, made in ((3, third_batch()), (4, fourth_batch()))
        for family, settings, seed in made
    ]
    configs = [*language, *_finetuning(), *_more_finetuning(), *_vision(), *_algorithmic(), *later]
    names = [config.name for config in configs]
    assert len(set(names)) == len(names)
    return configs


def is_for_fitting(config: Config) -> bool:
    """Whether thresholds may be fitted on this run; all seeds of a configuration fall on one side.

    Within each family and batch the configurations are put in the order of a hash of their names, and every second one,
    beginning with the first, is for fitting. A configuration belongs to the first batch that has it.
    """
    return config.configuration in _fitting()


@cache
def _fitting() -> frozenset[str]:
    batch_of: dict[str, tuple[str, int]] = {}
    for config in all_configs():
        found = batch_of.setdefault(config.configuration, (config.family, config.batch))
        batch_of[config.configuration] = min(found, (config.family, config.batch))
    chosen: set[str] = set()
    for group in set(batch_of.values()):
        names = [name for name, mine in batch_of.items() if mine == group]
        chosen.update(sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[::2])
    return frozenset(chosen)


def pilot() -> list[Config]:
    """Thirty runs of the first batch's fitting half, evenly over its lists: the detectors were designed on them."""
    counts = {"language": 14, "finetuning": 5, "vision": 7, "algorithmic": 6}
    chosen = []
    for family, count in counts.items():
        first = [config for config in all_configs() if config.family == family and config.batch == 1]
        fitting = [config for config in first if is_for_fitting(config)]
        step = len(fitting) / count
        chosen += [fitting[int(i * step)] for i in range(count)]
    return chosen
