"""What a reading costs beside WeightWatcher on the same model, side by side in one process.

    python -m benchmarks.generalization.cost

A GPT of 4 layers, width 256 and a vocabulary of 32,768, batch 8 x 128; one thread. A reading is the head's hook and
`Monitor.step()`; with spectra it includes the Gram matrices and their eigenvalues. WeightWatcher is its `analyze()`.
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import logalign
from logalign.demos.gpt import GPT

VOCABULARY, WIDTH, LAYERS, BATCH, CONTEXT = 32_768, 256, 4, 8, 128
ROUNDS = 5


def main() -> None:
    """Measure in turns and print medians, and each as a share of a training step and of WeightWatcher."""
    torch.set_num_threads(1)
    logging.getLogger("logalign").setLevel(logging.WARNING)
    torch.manual_seed(0)
    model = GPT(vocabulary=VOCABULARY, width=WIDTH, layers=LAYERS, context=CONTEXT)
    tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1))
    inputs = torch.randn(BATCH, CONTEXT, WIDTH)
    ways: dict[str, Callable[[], float]] = {
        "a training step, no monitor": lambda: training_step(model, tokens),
        "a reading: LAR in four forms": lambda: reading(model, inputs, spectral=False),
        "a reading with spectra": lambda: reading(model, inputs, spectral=True),
        "WeightWatcher, `analyze()`": lambda: weightwatcher(model),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, run in ways.items():
            times[way].append(run())
    medians = {way: statistics.median(each) for way, each in times.items()}
    step, rival = medians["a training step, no monitor"], medians["WeightWatcher, `analyze()`"]
    table = Table("what", "time", "of a step", "of WeightWatcher")
    for way, seconds in medians.items():
        table.add_row(way, f"{seconds * 1e3:.1f} ms", f"{seconds / step:.2%}", f"{seconds / rival:.2%}")
    Console().print(table)


def training_step(model: GPT, tokens: torch.Tensor) -> float:
    """Seconds of one forward and backward."""
    started = time.perf_counter()
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    model.zero_grad()
    return time.perf_counter() - started


def reading(model: GPT, inputs: torch.Tensor, *, spectral: bool) -> float:
    """Seconds that one reading adds to a step whose logits are at hand."""
    head = model.lm_head
    with logalign.watch(head, layers="", every=1, spectra_every=1 if spectral else 0) as monitor:
        hook = next(iter(head._forward_hooks.values()))
        monitor._recorder.armed = False
        outputs = head(inputs)
        monitor._recorder.armed = True
        started = time.perf_counter()
        hook(head, (inputs,), {}, outputs)  # type: ignore[call-arg]
        monitor.step()
        return time.perf_counter() - started


def weightwatcher(model: GPT) -> float:
    """Seconds of WeightWatcher's analysis of the model."""
    logging.getLogger("weightwatcher").setLevel(logging.CRITICAL)
    import weightwatcher as package

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watcher = package.WeightWatcher(model=model)
        started = time.perf_counter()
        watcher.analyze()
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
