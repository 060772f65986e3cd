"""Lightning 2: one callback watches the module that `Trainer.fit` trains.

Lightning comes under two names, `lightning.pytorch` and `pytorch_lightning`, with two classes `Callback`. The callback
is of those that are imported already, else of the first that is installed.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from logalign.common.extras import load
from logalign.errors import InputError, LogAlignWarning
from logalign.recording.monitor import Monitor, watch
from logalign.trackers.metrics import metrics

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.optim import Optimizer

    from logalign.diagnosis.verdict import Verdict
    from logalign.runs.reading import Readings

READINGS_WANTED = 500
"""Into how many readings a training is divided, where its length is known and `every` is not given."""
LONGEST_INTERVAL = 10
SUPPORTED = "2.2,3"
PACKAGES = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch-lightning"}

Layers = dict[str, list[Any]]


def _callback_classes() -> tuple[type, ...]:
    found = [module for module in PACKAGES if module in sys.modules]
    if not found:
        installed = [module for module in PACKAGES if find_spec(module.split(".")[0]) is not None]
        found = installed[:1] or ["lightning.pytorch"]
    return tuple(
        load(
            module, extra="lightning", purpose="LogAlignCallback", supported=SUPPORTED, package=PACKAGES[module]
        ).Callback
        for module in found
    )


if TYPE_CHECKING:
    _Base = Callback
else:
    _Base = type("_Base", _callback_classes(), {})


class LogAlignCallback(_Base):
    """Measure the log-alignment ratio of the unembedding while a Lightning Trainer fits.

    The numbers of every reading go to all of the Trainer's loggers by `self.log`, under the names of docs/trackers.md,
    and stand there and in `trainer.callback_metrics` until the next reading. Validation does not enter.

    Args:
        every: A reading is taken every so many optimizer steps; None for the training's steps / 500, between 1 and 10,
            and 10 where its length is not known. A resumed training keeps the interval that it had.
        run: A folder to record to; None keeps readings in memory. A training that is resumed from a checkpoint goes on
            in the folder, any other needs one without a run in it.
        module: The name of the submodule to watch, where its own forward and not the LightningModule's gets the labels
            that say which tokens count, as in `self.model(**batch)`; None for all that is trained.
        stop: End the training when the verdict is overfitting, memorizing or diverged; Lightning's `min_epochs` and
            `min_steps` hold.
        save: Save a checkpoint when the outcome becomes approaching, overfitting, memorizing or diverged, beside those
            of ModelCheckpoint, as `logalign-OUTCOME-step=GLOBAL_STEP.ckpt`.
        **watching: What `logalign.watch()` takes: layers, spectra_every, baseline, regime, trackers and so on.

    Attributes:
        monitor: What `watch()` returned: readings, verdict, `mask()`. None before the training has started.

    Raises:
        MissingExtraError: Lightning is not installed, or its release is not supported. On import.

    A training that starts raises what `watch()` raises, SiteError among it where no layer is found, and InputError
    where a checkpoint is resumed with other layers than it was saved with.

    Example:
        >>> LogAlignCallback(every=10, stop=True).state_key
        'LogAlignCallback'
    """

    def __init__(
        self,
        *,
        every: int | None = None,
        run: str | os.PathLike[str] | None = None,
        module: str | None = None,
        stop: bool = False,
        save: bool = False,
        **watching: Any,
    ) -> None:
        super().__init__()
        own = sorted({"model", "resume"} & watching.keys())
        if own:
            raise InputError(
                f"LogAlignCallback: expected keywords of logalign.watch(), found {', '.join(own)}, which it sets itself"
            )
        self.monitor: Monitor | None = None
        self._every = every
        self._run = run
        self._module = module
        self._stop = stop
        self._save = save
        self._watching = watching
        self._attached = False
        self._interval = LONGEST_INTERVAL
        self._state: dict[str, Any] | None = None
        self._layers: Layers = {}  # of the checkpoint, until they have been compared
        self._global_step = 0
        self._losses: tuple[float | Tensor, int] = (0.0, 0)  # sum and count over the micro-batches of the step
        self._lr: Any = None  # a number, or a tensor of one
        self._epoch: float | None = None
        self._outcome: str | None = None
        self._shown: dict[str, float] = {}
        self._show_again = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the module, in the wrapper that the strategy has put around it."""
        self._detach()
        state = self._state if trainer.global_step > 0 else None
        if self._every is None:
            spectra_every = self._watching.get("spectra_every", 0)
            self._interval = state["every"] if state else _interval(trainer.estimated_stepping_batches, spectra_every)
        else:
            self._interval = self._every
        model, ranks = self._watched(trainer, pl_module)
        keywords = {"every": self._interval, "run": self._run, "resume": state is not None, **ranks, **self._watching}
        monitor = watch(model, **keywords)
        self._layers = state["layers"] if state else {}
        try:
            if state:
                self._check_layers(_layers(monitor))
                monitor.load_state_dict(state["monitor"])
        except BaseException:
            monitor.close()
            raise
        self.monitor, self._attached = monitor, True
        self._global_step = trainer.global_step
        self._outcome = monitor.verdict.outcome
        self._forget_step()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning forgets at the end of an epoch what was logged in it."""
        self._show_again = bool(self._shown)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the passes over the data before the first micro-batch of a step."""
        if self._epoch is None:
            batches = trainer.num_training_batches
            self._epoch = trainer.current_epoch + (batch_idx / batches if math.isfinite(batches) else 0.0)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note the learning rate of the step, which a scheduler changes before the batch ends."""
        if self._lr is None:
            rate = optimizer.param_groups[0]["lr"]
            self._lr = rate.detach().clone() if isinstance(rate, Tensor) else rate

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step the monitor where the optimizer has stepped, and log what it gives."""
        if not self._attached or self.monitor is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, int | float) or (isinstance(loss, Tensor) and loss.numel() == 1):
            total, count = self._losses
            value = loss.detach().reshape(()) if isinstance(loss, Tensor) else loss
            self._losses = (total + value, count + 1)
        readings = None
        if trainer.global_step != self._global_step:
            self._global_step = trainer.global_step
            readings = self.monitor.step(loss=self._loss(trainer, pl_module), lr=self._lr, epoch=self._epoch)
            self._forget_step()
        if readings is not None:
            self._read(trainer, pl_module, readings)
        elif self._show_again:
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the module."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the module."""
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning keeps in its checkpoints."""
        if self.monitor is None or not self._attached:
            return dict(self._state or {})
        return {
            "monitor": self.monitor.state_dict(),
            "every": self._interval,
            "layers": _layers(self.monitor) or self._layers,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state for the start of the training."""
        self._state = dict(state_dict)

    def _watched(self, trainer: Trainer, pl_module: LightningModule) -> tuple[nn.Module, dict[str, Any]]:
        """The module to watch, and, where it is inside of what says so, the ranks that train it."""
        wrapped = trainer.strategy.model or pl_module
        if self._module is None:
            return wrapped, {}
        try:
            model = pl_module.get_submodule(self._module)
        except AttributeError:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise InputError(
                f"LogAlignCallback(module={self._module!r}): expected the name of a submodule of "
                f"{type(pl_module).__name__}, found none of that name; its own are {names or 'none'}"
            ) from None
        group = getattr(wrapped, "process_group", None)  # DDP's
        return model, {} if group is None else {"mesh": group}

    def _loss(self, trainer: Trainer, pl_module: LightningModule) -> float | Tensor | None:
        """The mean over micro-batches; in automatic optimization, Lightning has divided each by their number."""
        total, count = self._losses
        if not count:
            return None
        return total * (trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1) / count

    def _forget_step(self) -> None:
        self._losses, self._lr, self._epoch = (0.0, 0), None, None

    def _read(self, trainer: Trainer, pl_module: LightningModule, readings: Readings) -> None:
        assert self.monitor is not None
        verdict = self.monitor.verdict
        if self._layers:
            self._compare_layers(_layers(self.monitor))
        # What was shown and is undefined now would be shown on: Lightning keeps it until the epoch ends.
        self._shown = dict.fromkeys(self._shown, math.nan) | metrics(readings, verdict)
        self._log(trainer, pl_module)
        if self._stop and verdict.is_alarm and not trainer.should_stop:
            trainer.should_stop = True
            _tell(trainer, verdict, "The training stops.")
        if verdict.outcome == self._outcome:
            return
        self._outcome = verdict.outcome
        if self._save and (verdict.is_alarm or verdict.outcome == "approaching"):
            path = os.path.join(_folder(trainer), f"logalign-{verdict.outcome}-step={trainer.global_step}.ckpt")
            trainer.save_checkpoint(path)
            _tell(trainer, verdict, f"Saved {path}.")

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show_again = False
        if trainer.barebones:
            return
        # On the host already, whatever the module is on: nothing to wait for.
        values = {name: torch.tensor(value, dtype=torch.float64) for name, value in self._shown.items()}
        pl_module.log_dict(values, on_step=True, on_epoch=False, logger=trainer.logger is not None, batch_size=1)

    def _check_layers(self, found: Layers) -> None:
        """Refuse to continue a series with other layers, where they are known before the first forward."""
        if found and self._layers:
            if found != self._layers:
                raise InputError(f"LogAlignCallback: {_difference(self._layers, found)}")
            self._layers = {}

    def _compare_layers(self, found: Layers) -> None:
        """The same once the first forward has told the layers: the training goes on."""
        expected, self._layers = self._layers, {}
        if found != expected:
            warnings.warn(f"logalign: LogAlignCallback: {_difference(expected, found)}", LogAlignWarning, stacklevel=2)

    def _detach(self) -> None:
        if self._attached and self.monitor is not None:
            self._state = self.state_dict()
            self._attached = False
            self.monitor.close()


def _interval(steps: float, spectra_every: int) -> int:
    """Steps between two readings of a training of so many; -1 and infinity where that is not known.

    Shorter where spectra are asked for at steps that it would pass by.
    """
    known = math.isfinite(steps) and steps >= 1
    longest = min(max(int(steps) // READINGS_WANTED, 1), LONGEST_INTERVAL) if known else LONGEST_INTERVAL
    return next(every for every in range(longest, 0, -1) if spectra_every % every == 0)


def _layers(monitor: Monitor) -> Layers:
    """What is measured, by site: the module's name, m and n."""
    return {site: [found["module"], found["m"], found["n"]] for site, found in monitor.sites.items()}


def _difference(expected: Layers, found: Layers) -> str:
    def words(layers: Layers) -> str:
        return ", ".join(f"{site} = {name!r} {m} x {n}" for site, (name, m, n) in layers.items())

    return (
        f"expected the layers of the checkpoint, {words(expected)}, found {words(found)}; resume with the same "
        "layers=, or start a training and a run folder of their own for others"
    )


def _folder(trainer: Trainer) -> str:
    """Where ModelCheckpoint saves, or would."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    if folder is None:
        folder = os.path.join(trainer.log_dir or trainer.default_root_dir, "checkpoints")
    return str(folder)


def _tell(trainer: Trainer, verdict: Verdict, done: str) -> None:
    trainer.print(f"logalign: {verdict.outcome} at step {verdict.step}: {verdict.reason} {done}")
