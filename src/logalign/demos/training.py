"""A monitored training that can be stopped at any moment and ends with the same numbers.

Method: one checkpoint file, replaced in one move, holds everything that the next step depends on: model, optimizer,
random number generator and the state of the monitor. The seed and the step give the order of the data, so the
checkpoint does not store it. A run that continues supersedes the readings written after the checkpoint.

    with Training(folder, model=model, optimizer=optimizer, steps=1000, title="clean labels") as training:
        for step in training.remaining():
            loss = ...                            # forward on the training batch
            held_out = evaluate() if training.is_monitored else {}
            loss.backward(); optimizer.step(); optimizer.zero_grad()
            training.record(loss=loss, **held_out)
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from logalign.errors import InputError, MissingExtraError, RunError
from logalign.recording.monitor import watch

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise MissingExtraError('the demos need PyTorch: pip install "logalign[demo]"') from error

if TYPE_CHECKING:
    from logalign.recording.monitor import Monitor

CHECKPOINT = "checkpoint.pt"


def check_steps(steps: int) -> None:
    """Refuse a training of no steps."""
    if steps < 1:
        raise InputError(f"--steps: expected at least 1, found {steps}")


def check_device(name: str) -> torch.device:
    """Return the device of that name after a test computation on it.

    Raises:
        InputError: PyTorch does not know the device, or cannot compute on it here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: expected a device of PyTorch such as cpu, cuda or mps") from error
    try:
        torch.zeros(1, device=device).add(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--device {name}: expected a device that PyTorch can use here, found: {reason}") from error
    return device


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch compute with `count` threads, because more than one slows small networks down."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(count, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def epoch_order(seed: int, epoch: int, size: int) -> Tensor:
    """Return the order of `size` samples in an epoch, [size], from the seed and the epoch alone."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch))


def is_finished(folder: Path, steps: int) -> bool:
    """Return True if the run in `folder` has a checkpoint of its last step, and leave a damaged one to `Training`."""
    path = folder / CHECKPOINT
    try:
        return path.exists() and bool(torch.load(path, map_location="cpu", weights_only=True)["step"] >= steps)
    except Exception:  # the error of a damaged file depends on the place of the damage
        return False


class Training:
    """One monitored training run in a folder of its own, with a progress bar, checkpoints and resumption.

    Args:
        folder: the run's folder. The training continues from a checkpoint in it.
        model: the model at the start of training, on its device, in training mode.
        optimizer: the optimizer of the model's parameters.
        steps: optimizer steps of the whole training.
        title: words before the progress bar.
        settings: entries for run.json.
        every: steps between readings.
        checkpoint_every: steps between checkpoints.
        console: the console that draws the progress bar.

    Attributes:
        done: steps done so far, including those before an interruption.

    Raises:
        RunError: the checkpoint is damaged.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        title: str,
        settings: Mapping[str, Any],
        every: int = 10,
        checkpoint_every: int = 100,
        console: Console,
    ) -> None:
        self.folder = folder
        self._model = model
        self._optimizer = optimizer
        self._steps = steps
        self._settings = settings
        self._every = every
        self._checkpoint_every = checkpoint_every
        self._recent: deque[float] = deque(maxlen=every)
        self.done = 0
        self._monitor: Monitor | None = None
        self._title = title
        self._console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Training:
        state = self._load()
        if state is None and self.folder.exists():
            # The run stopped before its first checkpoint, so there is nothing to continue from.
            shutil.rmtree(self.folder)
        if self.done >= self._steps:
            self._console.print(f"{self._title}: {self._steps} steps are done already")
            return self
        self._monitor = watch(
            self._model, every=self._every, run=self.folder, resume=state is not None, settings=dict(self._settings)
        )
        if state is not None:
            self._monitor.load_state_dict(state)
            self._console.print(f"{self._title}: goes on from step {self.done}")
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[seen]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
        )
        self._task = self._progress.add_task(self._title, total=self._steps, completed=self.done, seen="")
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._monitor is not None:
            self._monitor.close()

    @property
    def is_monitored(self) -> bool:
        """True if the current step takes a reading, the only time that held-out data serve as a check."""
        return self._monitor is not None and self._monitor.next_is_monitored

    def remaining(self) -> Iterator[int]:
        """Yield the remaining steps, and write a checkpoint between some of them."""
        for step in range(self.done, self._steps):
            yield step
            self.done = step + 1
            if self.done % self._checkpoint_every == 0 or self.done == self._steps:
                self._save()
            if self._progress is not None:
                self._progress.update(self._task, completed=self.done)

    def record(self, *, loss: Tensor, lr: float | None = None, epoch: float | None = None, **extra: float) -> None:
        """Complete the step in the monitor, with the values to record in its reading.

        The log also gets `train_loss`, the mean loss of the steps since the last reading, as single batches are noisy.
        """
        assert self._monitor is not None, "record() belongs inside the loop"
        assert self._progress is not None, "record() belongs inside the loop"
        self._recent.append(loss.item())
        train_loss = fmean(self._recent)
        readings = self._monitor.step(loss=self._recent[-1], lr=lr, epoch=epoch, train_loss=train_loss, **extra)
        if readings is not None and readings.main.lar is not None:
            seen = f"loss {train_loss:.3f}  LAR {readings.main.lar:.3f}"
            self._progress.update(self._task, seen=seen)

    def _save(self) -> None:
        assert self._monitor is not None, "a finished training is not saved again"
        state = {
            "step": self.done,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "recent": list(self._recent),
            "rng": torch.get_rng_state(),
            "monitor": self._monitor.state_dict(),
        }
        draft = self.folder / f".{CHECKPOINT}"
        with draft.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.folder / CHECKPOINT)

    def _load(self) -> dict[str, Any] | None:
        """Load model, optimizer and generator from the checkpoint, if there is one, and return the monitor's state."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self._model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            self._recent.extend(state["recent"])
            monitor = dict(state["monitor"])
            self.done = int(state["step"])
        except Exception as error:  # the error of a damaged file depends on the place of the damage
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]
            raise RunError(
                f"{path}: expected a checkpoint of this demo, found damage ({reason}); begin anew with --fresh"
            ) from error
        return monitor
