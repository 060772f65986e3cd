"""Transformers: a callback of the Trainer that watches the model and adds the readings to the Trainer's own logs.

Method: a callback sees steps, but neither the loss nor the Trainer. Its log entries come too late for the trackers
before it. So at the start of training it finds the Trainer among its callers, moves itself to the front of the
Trainer's callbacks, and reads the return value of `training_step()`. One alternative, a hook on the model's outputs,
misses a loss computed outside the model and does not know its scale. The other is `_tr_loss`, a running sum that the
Trainer empties as it logs. The part of a step that is left in it depends on when the Trainer logs.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from logalign.common.extras import load
from logalign.errors import InputError, LogAlignWarning
from logalign.recording.monitor import STATE_VERSION, Monitor, watch
from logalign.runs.reading import UNEMBEDDING
from logalign.trackers.metrics import PREFIX, metrics

# This load comes first: its error says which releases are supported and how to install one.
load("transformers", extra="transformers", purpose="LogAlignCallback", supported="5.0,6.0")

from transformers import TrainerCallback  # noqa: E402
from transformers.trainer_callback import ExportableState  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger("logalign")

READINGS_OF_A_RUN = 500
"""Default number of readings of a training, within the two limits of `every`."""
EVERY = (1, 10)
LOGGED_BY_TRAINER = ("loss", "lr", "epoch")


class LogAlignCallback(TrainerCallback, ExportableState):
    """Measure the log-alignment ratio while a Trainer trains, and log it with everything else.

    The callback needs no evaluation set and does not measure evaluation in between. A set-up that cannot be measured
    raises before the first step. A later problem gives a warning, and training continues.

    Args:
        every: Optimizer steps between two readings. Step 0 has a reading. None means a 500th of all steps, at least 1
            and at most 10.
        run: A folder to record to, as in `logalign.watch()`. A training resumed from a checkpoint continues in it. A
            new training needs a new folder.
        stop: End the training when the verdict is an alarm: overfitting, memorizing or diverged.
        save: Save a checkpoint when the verdict becomes approaching or an alarm.
        **watching: Further arguments of `logalign.watch()`: `layers`, `baseline`, `regime`, `spectra_every`,
            `trackers` and so on. `resume=True` lets a training from step 0 supersede the readings in `run`.

    Attributes:
        monitor: The monitor from `logalign.watch()`. Its `verdict` and `readings` stay after the training. None before.

    Raises:
        InputError: an argument is unknown to `logalign.watch()`.

    Example:
        >>> callback = LogAlignCallback(run="runs/mine", stop=True)
        >>> callback.monitor is None  # until trainer.train(), of Trainer(..., callbacks=[callback])
        True
    """

    def __init__(
        self,
        *,
        every: int | None = None,
        run: str | os.PathLike[str] | None = None,
        stop: bool = False,
        save: bool = False,
        **watching: Any,
    ) -> None:
        unknown = sorted(watching.keys() - inspect.signature(watch).parameters.keys() | watching.keys() & {"model"})
        if unknown:
            raise InputError(
                f"LogAlignCallback({unknown[0]}=...): expected an argument of logalign.watch() beside the model, found "
                "none of that name"
            )
        self.monitor: Monitor | None = None
        self._arguments = {"every": every, "run": run, "stop": stop, "save": save, **watching}
        self._every = every
        self._run = run
        self._stop = stop
        self._save = save
        self._watching = watching
        self._trainer: Trainer | None = None
        self._failed = False  # the previous training ended in an error
        self._loss: Tensor | None = None  # of the current step, summed over its micro-batches
        self._epoch: float | None = None
        self._lr: float | None = None
        self._outcome: str | None = None
        self._shown: dict[str, float] = {}  # the latest reading, in the form of the logs
        self._logged = True  # the logs have the latest reading
        self._told_of_labels = False
        self._not_stored: list[str] = []  # arguments that the checkpoint behind this callback could not keep

    # Calls from the Trainer ---------------------------------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Watch the model, which is wrapped and has its weights but has not run yet."""
        if self._not_stored:
            raise InputError(
                f"restore_callback_states_from_checkpoint=True: a checkpoint cannot hold {', '.join(self._not_stored)} "
                "of LogAlignCallback; leave it False, for the callback restores its state without it"
            )
        trainer = _calling_trainer()
        _check(trainer)
        self._failed |= self._trainer is not None
        self.close()
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
            callbacks.insert(0, self)
        name, stored = type(self).__name__, cast(dict[str, Any], state.stateful_callbacks)
        self._attach(trainer, state, _saved_in(stored.get(name)) if state.global_step else None)
        # The Trainer needs this entry, which a checkpoint made without this callback lacks.
        stored.setdefault(name, self.state())

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Store the number of passes before this step."""
        self._epoch = state.epoch

    def on_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        """Store the learning rate before the scheduler changes it."""
        if self.monitor is not None and self.monitor.next_is_monitored:
            self._lr = float(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Complete one optimizer step."""
        monitor = self.monitor
        if monitor is None:
            return
        loss, self._loss = self._loss, None
        readings = monitor.step(loss=loss, lr=self._lr, epoch=self._epoch)
        if readings is None:
            return
        verdict = monitor.verdict
        values = metrics(readings, verdict)
        for logged in LOGGED_BY_TRAINER:
            values.pop(PREFIX + logged, None)
        self._shown, self._logged = {**values, f"{PREFIX}step": readings.step}, False
        changed, self._outcome = verdict.outcome != self._outcome, verdict.outcome
        if self._save and changed and (verdict.is_alarm or verdict.outcome == "approaching"):
            control.should_save = True
        if self._stop and verdict.is_alarm:
            control.should_training_stop = control.should_log = True
            log.warning("training stops: %s: %s", verdict.headline(), verdict.reason)
        self._tell_of_labels(monitor)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add the latest reading to the Trainer's training logs, and to its final log if it is not yet logged."""
        if logs is None or not self._shown or not ("loss" in logs or ("train_runtime" in logs and not self._logged)):
            return
        self._logged = True
        logs.update(self._shown)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(self._shown)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop watching the model."""
        self.close()

    def state(self) -> dict[str, Any]:
        """Return the state that the Trainer writes to trainer_state.json in its checkpoints."""
        arguments = {name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in self._arguments.items()}
        stored = {name: value for name, value in arguments.items() if _is_json(value)}
        found: dict[str, Any] | None = None
        if self.monitor is not None:
            found = {
                "every": self._every,
                "layers": {label: [site["m"], site["n"]] for label, site in self.monitor.sites.items()},
                "monitor": self.monitor.state_dict(),
                "shown": self._shown,
                "logged": self._logged,
            }
        return {
            "args": stored,
            "attributes": {"_stored": found, "_not_stored": sorted(arguments.keys() - stored.keys())},
        }

    # ----------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop watching the model, release the Trainer and close the run. A second call does nothing.

        The end of the training and an error in a training step call it. After an error elsewhere, for instance in the
        data, the next training of this callback calls it, or you do.
        """
        trainer, self._trainer = self._trainer, None
        if trainer is not None and getattr(vars(trainer).get("training_step"), "callback", None) is self:
            del trainer.training_step
        self._loss = None
        if self.monitor is not None:
            self.monitor.close()

    def _attach(self, trainer: Trainer, state: TrainerState, saved: Mapping[str, Any] | None) -> None:
        from logalign.torch.which_ranks import wrapper_of

        every: int | None = self._arguments["every"]
        if every is None:
            every = saved["every"] if saved is not None else _default_every(state.max_steps)
        self._every = every
        watching = dict(self._watching)
        # Wrappers add their own names to those of the layers, so take the model without them.
        model = cast("nn.Module", trainer.model)
        if saved is not None:
            _check_layers(model, saved["layers"], watching)
        resume = bool(watching.pop("resume", False)) or state.global_step > 0 or self._failed
        watching.setdefault("mesh", wrapper_of(trainer.model_wrapped) if trainer.args.world_size > 1 else None)
        self.monitor = watch(model, every=every, run=self._run, resume=resume, **watching)
        if saved is not None:
            self.monitor.load_state_dict(saved["monitor"])
        elif resume:
            self.monitor.load_state_dict({"version": STATE_VERSION, "step": state.global_step, "tokens_seen": "{}"})
        self._outcome = self.monitor.verdict.outcome if state.global_step else None
        self._shown, self._logged = (dict(saved["shown"]), saved["logged"]) if saved is not None else ({}, True)
        self._failed = False
        self._listen(trainer)

    def _listen(self, trainer: Trainer) -> None:
        """Wrap `trainer.training_step()` until `close()`."""
        inner = trainer.training_step

        @functools.wraps(inner)
        def training_step(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._give_mask(trainer, inputs)
            try:
                loss = inner(model, inputs, *args, **kwargs)
            except BaseException:
                self._failed = True
                self.close()
                raise
            self._loss = loss if self._loss is None else self._loss + loss
            return loss

        training_step.callback = self  # type: ignore[attr-defined]
        trainer.training_step = training_step  # type: ignore[method-assign]
        self._trainer = trainer

    def _give_mask(self, trainer: Trainer, inputs: Any) -> None:
        """Pass the loss mask if the Trainer removes the labels before the model sees them."""
        monitor = self.monitor
        takes_labels = trainer.label_smoother is not None or trainer.compute_loss_func is not None
        if not takes_labels or monitor is None or not monitor.next_is_monitored:
            return
        from torch.nn import functional as F

        from logalign.torch.masks import shifts_labels

        labels, tokens = inputs.get("labels"), inputs.get("input_ids")
        is_seq2seq = getattr(getattr(trainer.model, "config", None), "is_encoder_decoder", False)
        if labels is None or labels.is_floating_point() or labels.ndim != 2:
            return
        if not is_seq2seq and (tokens is None or tokens.shape != labels.shape):
            return
        shift = self._watching.get("shift_labels")
        counts = labels != self._watching.get("ignore_index", -100)
        if shifts_labels(cast("nn.Module", trainer.model)) if shift is None else shift:
            counts = F.pad(counts[:, 1:], (0, 1), value=False)
        monitor.mask(counts.to(trainer.args.device))

    def _tell_of_labels(self, monitor: Monitor) -> None:
        """Warn once if the unembedding of a language model is measured without a mask."""
        from logalign.torch.masks import NO_MASK

        if self._told_of_labels or monitor.sites.get(UNEMBEDDING, {}).get("mask") != NO_MASK:
            return
        self._told_of_labels = True
        warnings.warn(
            "logalign: expected labels among the arguments of the model's forward, found none: every token counts, "
            "padding too; where some should not, call callback.monitor.mask(...) before the forward in compute_loss()",
            LogAlignWarning,
            stacklevel=2,
        )


def _calling_trainer() -> Trainer:
    """Return the Trainer of the current event, which does not pass itself to a callback.

    Raises:
        InputError: no caller is a Trainer.
    """
    from transformers import Trainer

    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    raise InputError(
        "LogAlignCallback: expected to be called by a transformers.Trainer, found none among the callers; in a loop of "
        "your own call logalign.watch()"
    )


def _default_every(steps: int) -> int:
    """Return the interval that gives `READINGS_OF_A_RUN` readings in so many steps, within its limits."""
    least, most = EVERY
    return min(max(round(steps / READINGS_OF_A_RUN), least), most)


def _saved_in(entry: Any) -> dict[str, Any] | None:
    """Return the stored state of `LogAlignCallback.state()` from a checkpoint, or None."""
    stored: dict[str, Any] | None = entry["attributes"].get("_stored") if isinstance(entry, dict) else None
    return stored


def _check(trainer: Trainer) -> None:
    from torch import nn

    if isinstance(trainer.model_wrapped, nn.DataParallel):
        raise InputError(
            "LogAlignCallback: expected one process for each GPU, found torch.nn.DataParallel, whose copies of the "
            "model cannot be measured; start the script with torchrun or accelerate launch"
        )


def _check_layers(model: nn.Module, saved: Mapping[str, Any], watching: Mapping[str, Any]) -> None:
    """Compare the layers of a checkpoint with those that are watched now.

    Raises:
        InputError: they differ.
    """
    from logalign.torch.sites import find_sites

    found = find_sites(model, watching.get("layers", UNEMBEDDING), vocabulary=watching.get("vocabulary"))
    now = {site.label: list(site.map.shape) for site in found.sites}
    if now != saved and not found.candidates:
        raise InputError(
            f"LogAlignCallback: expected the layers of the checkpoint, {_named(saved)}, found {_named(now)}; resume "
            "with the same layers=... and model, or train from the start"
        )


def _named(layers: Mapping[str, Any]) -> str:
    return ", ".join(f"{label} {tuple(shape)}" for label, shape in layers.items()) or "none"


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
