"""torchtitan: its Trainer, with a monitor on the unembedding.

Method: a config names this subclass in place of torchtitan's own Trainer. The alternatives see less. A metrics
processor sees only the steps that it logs and has no place in checkpoints. A converter sees the model before it is
parallelized.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from logalign.common.extras import load
from logalign.errors import InputError
from logalign.recording.monitor import Monitor, watch
from logalign.trackers.metrics import metrics

SUPPORTED = "0.3,0.4"

if TYPE_CHECKING:
    _Base: Any = object
else:
    _Base = load(
        "torchtitan.trainer",
        extra="torchtitan",
        purpose="logalign.integrations.torchtitan",
        supported=SUPPORTED,
        package="torchtitan",
    ).Trainer


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of `logalign.watch()` that a command line can give: `--logalign.every 20`.

    Attributes:
        every: Steps between two readings. The first step has a reading.
        spectra_every: Steps between two decompositions. 0 means never.
        folder: The run's folder inside `dump_folder`, in the format of docs/run-format.md.
        baseline: A run to compare with. An empty name means none.
        vocabulary: Rows of the unembedding that stand for a token. 0 means all.
    """

    every: int = 10
    spectra_every: int = 0
    folder: str = "logalign"
    baseline: str = ""
    vocabulary: int = 0


class Trainer(_Base):  # type: ignore[misc]
    """torchtitan's Trainer with a monitor on the unembedding.

    The Trainer records readings in `dump_folder/logalign`. It also sends them to the TensorBoard and W&B loggers that
    `config.metrics` turns on, under the names of docs/trackers.md, at torchtitan's own step (from 1 on). Its
    checkpoints hold the monitor's state as "logalign". The weights equal those of torchtitan's own Trainer.

    Args:
        config: A `Trainer.Config` of this class, or the result of `watched()` for another config.

    Raises:
        InputError: CUDA graphs are on, or shards of the unembedding cannot be told from whole weights.
        SiteError: there is no unembedding.

    Attributes:
        monitor: The monitor. It exists once the model is parallelized.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(_Base.Config):  # type: ignore[misc]
        """torchtitan's config plus the settings of `logalign`."""

        logalign: Settings = field(default_factory=Settings)

    monitor: Monitor

    def __init__(self, config: Any) -> None:
        _check(config)
        super().__init__(config)
        self._began = False
        self._losses: list[Tensor] = []
        self._masks: list[Tensor] = []
        settings = config.logalign
        tokens = self.parallel_dims.get_optional_mesh("loss")
        self._token_ranks = 1 if tokens is None else tokens.size()
        self.monitor = watch(
            _watched_part(self),
            every=settings.every,
            spectra_every=settings.spectra_every,
            run=os.path.join(config.dump_folder, settings.folder),
            resume=config.checkpoint.enable,
            baseline=settings.baseline or None,
            vocabulary=settings.vocabulary or None,
            mesh=tokens,
            settings={"torchtitan": f"{config.model_spec.name} {config.model_spec.flavor}"},
        )
        has_head = not self.parallel_dims.pp_enabled or self.pp_has_last_stage
        if config.checkpoint.enable:
            self.checkpointer.states["logalign"] = self.monitor if has_head else _Stateless()

    def post_dataloading_process(self, input_dict: Any, labels: Tensor) -> Any:
        """Run torchtitan's method, and mask by its labels, which belong to this rank's tokens."""
        inputs, labels, extra = super().post_dataloading_process(input_dict, labels)
        if self.monitor.next_is_monitored and self._labels_are_seen():
            own = labels.to_local() if hasattr(labels, "to_local") else labels
            self._masks.append(own != _ignored())
            # A pipeline passes all micro-batches of a step before the first forward.
            self.monitor.mask(torch.cat(self._masks))
        return inputs, labels, extra

    def forward_backward_step(self, **batch: Any) -> Any:
        """Run torchtitan's method and add its loss, this rank's part of the mean over all tokens."""
        self._masks.clear()
        loss = super().forward_backward_step(**batch)
        value = loss.detach().full_tensor() if hasattr(loss, "full_tensor") else loss.detach()
        self._losses.append(value.clone())
        return loss

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        """Run torchtitan's step, then take the reading."""
        if not self._began:
            self._began = True
            _go_on_at(self.monitor, self.step - 1)
        self._losses.clear()
        rates = self.lr_schedulers.get_metrics()
        super().train_step(data_iterator)
        # The monitor takes the mean over ranks.
        loss = torch.stack(self._losses).sum() * self._token_ranks
        readings = self.monitor.step(loss=loss, lr=next(iter(rates.values()), None))
        if readings is not None:
            self.metrics_processor.logger.log(metrics(readings, self.monitor.verdict), self.step)

    def close(self) -> None:
        """Close torchtitan's Trainer and the run."""
        if hasattr(self, "monitor"):
            self.monitor.close()
        super().close()

    def _labels_are_seen(self) -> bool:
        """False if the head gets chunks of several micro-batches, which the mask does not fit."""
        from torchtitan.components.loss import ChunkedLossWrapper  # type: ignore[import-untyped]

        return not (self.parallel_dims.pp_enabled and isinstance(self.loss_fn, ChunkedLossWrapper))


def watched(config: Any, **settings: Any) -> Any:
    """Convert a config of torchtitan's own Trainer for the Trainer here, as in `watched(llama3_8b(), every=20)`.

    Args:
        config: A `torchtitan.trainer.Trainer.Config`.
        **settings: The fields of `Settings`.

    Raises:
        InputError: the config is of another kind.
    """
    if isinstance(config, Trainer.Config):
        return replace(config, logalign=replace(config.logalign, **settings))
    if type(config) is not _Base.Config:
        raise InputError(
            "config: expected a torchtitan.trainer.Trainer.Config, found "
            f"{type(config).__module__}.{type(config).__qualname__}; let its Trainer inherit from "
            "logalign.integrations.torchtitan.Trainer"
        )
    values = {each.name: getattr(config, each.name) for each in fields(config)}
    return Trainer.Config(**values, logalign=Settings(**settings))


class _Stateless:
    """The checkpoint state of a stage without the unembedding."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def _check(config: Any) -> None:
    if not config.training.disable_cuda_graphs:
        raise InputError(
            "training.disable_cuda_graphs: expected True, found False: a replayed graph runs no Python, so nothing "
            "would be measured; pass --training.disable_cuda_graphs"
        )
    parallel = config.parallelism
    if parallel.tensor_parallel_degree > 1 and parallel.spmd_backend != "partial_dtensor":
        raise InputError(
            'parallelism.spmd_backend: expected "partial_dtensor" under tensor parallelism, found '
            f'"{parallel.spmd_backend}", where this rank\'s rows of the unembedding cannot be told from all; pass '
            "--parallelism.spmd_backend partial_dtensor"
        )


def _watched_part(trainer: Any) -> Any:
    """Return the model, or in a pipeline the stage that has the unembedding, else any stage."""
    if not trainer.parallel_dims.pp_enabled:
        return trainer.model_parts[0]
    schedule = trainer.pp_schedule
    stages = schedule._stages if hasattr(schedule, "_stages") else [schedule._stage]
    return next((stage for stage in stages if stage.is_last), stages[0])


def _ignored() -> int:
    from torchtitan.components.loss import IGNORE_INDEX

    index: int = IGNORE_INDEX
    return index


def _go_on_at(monitor: Monitor, step: int) -> None:
    """Set the monitor's step count to torchtitan's, for a checkpoint without a monitor state."""
    state = monitor.state_dict()
    if state["step"] != step:
        seen = state["tokens_seen"] if step else "{}"
        fresh = {"step": step, "tokens_seen": seen, "losses": "[0.0, 0]", "detector": "null"}
        monitor.load_state_dict({**state, **fresh})
