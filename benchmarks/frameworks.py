"""What monitoring costs in each framework, beside the same training in a plain loop, in one run.

    python -m benchmarks.frameworks            as a table on the terminal
    python -m benchmarks.frameworks --write    and put the table into docs/performance.md

One small GPT is trained on the same tokens by a plain loop, Accelerate, the Transformers Trainer and Lightning; each in
turn without a monitor and with one at every=1, in short trainings that alternate. What is spent inside logalign (its
hooks, `step()` and everything that a callback does) is timed there, by the clock of CPU time, for the ratio of step
times scatters by more than it is. At every=10 a tenth of it is spent, and what a callback does at every step.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import logalign
from benchmarks.pages import markdown, measured_here, put, show
from logalign.demos.gpt import GPT
from logalign.recording.monitor import Monitor
from logalign.torch.hooks import HookRecorder

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
VOCABULARY, WIDTH, LAYERS, BATCH, CONTEXT = 16_384, 256, 2, 8, 64
STEPS, SKIPPED = 8, 2
LR = 1e-4
EVENTS = (
    *("on_train_begin", "on_step_begin", "on_substep_end", "on_step_end", "on_log", "on_save"),
    *("on_train_start", "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad"),
)
Row = dict[str, str]


class Model(nn.Module):
    """A GPT with its loss, as Trainer wants one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gpt = GPT(vocabulary=VOCABULARY, width=WIDTH, layers=LAYERS, context=CONTEXT)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss and logits; labels are shifted already."""
        logits = self.gpt(input_ids)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def batches() -> list[dict[str, Tensor]]:
    """The tokens that all trainings see, a batch a step."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (STEPS + SKIPPED, BATCH, CONTEXT + 1), generator=generator)
    return [{"input_ids": each[:, :-1], "labels": each[:, 1:]} for each in tokens]


class Inside:
    """CPU time spent in functions that are wrapped, nested ones counted once; nothing before `begin()`."""

    def __init__(self) -> None:
        self.seconds, self.steps, self._depth, self._begun = 0.0, 0, 0, 0.0
        self.clock: list[float] = []

    def step(self) -> None:
        """Say that a step is complete: the first ones are not counted."""
        self.steps += 1
        if self.steps == SKIPPED:
            self.seconds = 0.0
        if self.steps >= SKIPPED:
            self.clock.append(time.perf_counter())

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            if self._depth == 0:
                self._begun = time.thread_time()
            self._depth += 1
            try:
                return function(*arguments, **named)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.thread_time() - self._begun

        return timed

    @contextmanager
    def patched(self, *callbacks: type) -> Iterator[None]:
        """Time the monitor's hooks and steps, and these callbacks' events."""
        owners = [(HookRecorder, "record"), (HookRecorder, "forward_over"), (Monitor, "step")]
        owners += [(callback, name) for callback in callbacks for name in EVENTS if name in vars(callback)]
        with ExitStack() as stack:
            for owner, name in owners:
                stack.enter_context(mock.patch.object(owner, name, self.timed(getattr(owner, name))))
            yield


def plain(every: int, inside: Inside) -> None:
    """A loop of one's own."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    monitor = logalign.watch(model, every=every, shift_labels=False) if every else None
    with inside.patched():
        for batch in batches():
            loss = model(**batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if monitor is not None:
                monitor.step(loss=loss, lr=LR)
            inside.step()


def accelerate(every: int, inside: Inside) -> None:
    """A loop with Accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model: Any = Model()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=LR))
    monitor = logalign.watch(model, every=every, shift_labels=False) if every else None
    with inside.patched():
        for batch in batches():
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if monitor is not None:
                monitor.step(loss=loss, lr=LR)
            inside.step()


def trainer(every: int, inside: Inside) -> None:
    """The Trainer of Transformers."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from logalign.integrations.transformers import LogAlignCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            inside.step()

    data = [{name: each[i] for name, each in batch.items()} for batch in batches() for i in range(BATCH)]
    with tempfile.TemporaryDirectory() as folder, inside.patched(LogAlignCallback):
        settings = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=BATCH,
            max_steps=STEPS + SKIPPED,
            learning_rate=LR,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
        )
        callbacks: list[TrainerCallback] = [Clock()]
        if every:
            callbacks.insert(0, LogAlignCallback(every=every, shift_labels=False))
        Trainer(Model(), settings, train_dataset=data, callbacks=callbacks).train()  # type: ignore[arg-type]


def lightning(every: int, inside: Inside) -> None:
    """The Trainer of Lightning."""
    import lightning.pytorch as pl

    from logalign.integrations.lightning import LogAlignCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, batch: dict[str, Tensor]) -> Tensor:
            loss: Tensor = self.model(**batch)["loss"]
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=LR)

    class Clock(pl.Callback):
        def on_train_batch_end(self, *_: Any, **__: Any) -> None:
            inside.step()

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    callbacks: list[pl.Callback] = [Clock()]
    if every:
        callbacks.insert(0, LogAlignCallback(every=every, shift_labels=False))
    with tempfile.TemporaryDirectory() as folder, inside.patched(LogAlignCallback):
        fit = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            default_root_dir=folder,
            callbacks=callbacks,
            logger=pl.loggers.CSVLogger(folder),
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        fit.fit(Module(), torch.utils.data.DataLoader(batches(), batch_size=None))  # type: ignore[arg-type]


FRAMEWORKS: dict[str, Callable[[int, Inside], None]] = {
    "plain loop": plain,
    "Accelerate": accelerate,
    "Transformers Trainer": trainer,
    "Lightning": lightning,
}


def measure(name: str, rounds: int) -> Row:
    """One row of the table."""
    steps: dict[int, list[float]] = {0: [], 1: []}
    spent = []
    for turn in range(rounds + 1):
        for every in (0, 1) if turn % 2 else (1, 0):
            inside = Inside()
            FRAMEWORKS[name](every, inside)
            if turn == 0:  # imports, allocations
                continue
            steps[every].append((inside.clock[-1] - inside.clock[0]) / (len(inside.clock) - 1))
            if every:
                spent.append(inside.seconds / (len(inside.clock) - 1))
    step, one = statistics.median(steps[0]), statistics.median(spent)
    ratio = statistics.median(watched / alone - 1 for watched, alone in zip(steps[1], steps[0], strict=True))
    return {
        "framework": name,
        "step": f"{step * 1e3:.0f} ms",
        "inside logalign, every=1": f"{one * 1e3:.2f} ms",
        "of a step": f"{one / step:.2%}",
        "extra time at every=1": f"{ratio:+.1%}",
    }


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frameworks", nargs="*", choices=list(FRAMEWORKS), default=list(FRAMEWORKS))
    parser.add_argument("--rounds", type=int, default=6, help="trainings of each kind (default 6)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    rows = [measure(name, arguments.rounds) for name in arguments.frameworks]
    show(rows)
    if arguments.write:
        where = measured_here(f"torch {torch.__version__}")
        put(PAGE, "frameworks", f"{where}\n\n{markdown(rows, numbers=True)}")


if __name__ == "__main__":
    main()
