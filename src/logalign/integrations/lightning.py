"""Lightning 2: one callback watches the module that `Trainer.fit` trains.

Lightning has two package names, `lightning.pytorch` and `pytorch_lightning`, each with its own class `Callback`. The
callback inherits from the classes of the packages already imported, else from that of the first one installed.
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
"""Number of readings of a training whose length is known, if `every` is not given."""
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

    The callback sends the numbers of every reading to all of the Trainer's loggers through `self.log`, under the names
    of docs/trackers.md. They stay there and in `trainer.callback_metrics` until the next reading. Validation is not
    measured.

    Args:
        every: Optimizer steps between two readings. None means the training's steps / 500, between 1 and 10, or 10
            if its length is not known. A resumed training keeps its interval.
        run: A folder to record to. None keeps readings in memory. A training resumed from a checkpoint continues in
            the folder. Any other training needs a folder without a run.
        module: The name of the submodule to watch, if its own forward and not the LightningModule's gets the labels
            that say which tokens count, as in `self.model(**batch)`. None watches all that is trained.
        stop: End the training when the verdict is overfitting, memorizing or diverged, but not before Lightning's
            `min_epochs` and `min_steps`.
        save: Save a checkpoint when the outcome becomes approaching, overfitting, memorizing or diverged, beside those
            of ModelCheckpoint, as `logalign-OUTCOME-step=GLOBAL_STEP.ckpt`.
        **watching: Arguments of `logalign.watch()`: layers, spectra_every, baseline, regime, trackers and so on.

    Attributes:
        monitor: The monitor from `watch()`: readings, verdict, `mask()`. None before the training starts.

    Raises:
        MissingExtraError: on import, Lightning is not installed or its release is not supported.

    A training that starts raises the errors of `watch()`, such as SiteError if no layer is found. It raises InputError
    if a resumed checkpoint was saved with other layers.

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
        self._layers: Layers = {}  # the checkpoint's layers, until the comparison
        self._global_step = 0
        self._losses: tuple[float | Tensor, int] = (0.0, 0)  # sum and count over the micro-batches of the step
        self._lr: Any = None  # a number, or a tensor of one
        self._epoch: float | None = None
        self._outcome: str | None = None
        self._shown: dict[str, float] = {}
        self._show_again = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the module in the wrapper of the strategy."""
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
        """Log the last reading again, because Lightning drops logged values at the end of an epoch."""
        self._show_again = bool(self._shown)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Store the passes over the data before the first micro-batch of a step."""
        if self._epoch is None:
            batches = trainer.num_training_batches
            self._epoch = trainer.current_epoch + (batch_idx / batches if math.isfinite(batches) else 0.0)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Store the learning rate of the step before a scheduler changes it."""
        if self._lr is None:
            rate = optimizer.param_groups[0]["lr"]
            self._lr = rate.detach().clone() if isinstance(rate, Tensor) else rate

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step the monitor if the optimizer has stepped, and log the reading."""
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
        """Stop watching the module."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching the module."""
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching the module."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for Lightning's checkpoints."""
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
        """Return the module to watch, and the ranks that train it if only its wrapper names them."""
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
        """Return the mean over micro-batches, which automatic optimization has already divided by their number."""
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
        # Lightning keeps a value until the epoch ends, so one that is undefined now would still be shown.
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
        # The values are on the host, whatever the module's device, so nothing waits.
        values = {name: torch.tensor(value, dtype=torch.float64) for name, value in self._shown.items()}
        pl_module.log_dict(values, on_step=True, on_epoch=False, logger=trainer.logger is not None, batch_size=1)

    def _check_layers(self, found: Layers) -> None:
        """Refuse to continue with other layers, if the layers are known before the first forward."""
        if found and self._layers:
            if found != self._layers:
                raise InputError(f"LogAlignCallback: {_difference(self._layers, found)}")
            self._layers = {}

    def _compare_layers(self, found: Layers) -> None:
        """Compare the layers after the first forward, and warn instead of raising."""
        expected, self._layers = self._layers, {}
        if found != expected:
            warnings.warn(f"logalign: LogAlignCallback: {_difference(expected, found)}", LogAlignWarning, stacklevel=2)

    def _detach(self) -> None:
        if self._attached and self.monitor is not None:
            self._state = self.state_dict()
            self._attached = False
            self.monitor.close()


def _interval(steps: float, spectra_every: int) -> int:
    """Return the steps between two readings, where `steps` is the training's length, -1 or infinity if not known.

    The interval is shorter if it would skip the steps of the spectra.
    """
    known = math.isfinite(steps) and steps >= 1
    longest = min(max(int(steps) // READINGS_WANTED, 1), LONGEST_INTERVAL) if known else LONGEST_INTERVAL
    return next(every for every in range(longest, 0, -1) if spectra_every % every == 0)


def _layers(monitor: Monitor) -> Layers:
    """Return the measured layers by site: the module's name, m and n."""
    return {site: [found["module"], found["m"], found["n"]] for site, found in monitor.sites.items()}


def _difference(expected: Layers, found: Layers) -> str:
    def words(layers: Layers) -> str:
        return ", ".join(f"{site} = {name!r} {m} x {n}" for site, (name, m, n) in layers.items())

    return (
        f"expected the layers of the checkpoint, {words(expected)}, found {words(found)}; resume with the same "
        "layers=, or start a training and a run folder of their own for others"
    )


def _folder(trainer: Trainer) -> str:
    """Return the folder where ModelCheckpoint saves, or would save."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    if folder is None:
        folder = os.path.join(trainer.log_dir or trainer.default_root_dir, "checkpoints")
    return str(folder)


def _tell(trainer: Trainer, verdict: Verdict, done: str) -> None:
    trainer.print(f"logalign: {verdict.outcome} at step {verdict.step}: {verdict.reason} {done}")
