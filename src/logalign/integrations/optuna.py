"""Optuna: a pruner that ends trials by logalign's verdict, for studies without a validation set.

Method: `report()` writes the verdict of a trial's monitor into the trial's user attributes. `LogAlignPruner` reads it
there when the objective calls `trial.should_prune()`, as with any pruner of Optuna. The study's storage holds all
state, so processes, threads and machines can share a study. The alternative is a pruner that compares the values of
trials. It needs values that do not reward memorizing, but the training loss rewards it. The training loss orders only
the trials that did not memorize, which are the ones left.

    study = optuna.create_study(pruner=LogAlignPruner())

    def objective(trial):
        with logalign.watch(model) as monitor:
            for step in range(steps):
                ...
                monitor.step(loss=loss, epoch=epoch)
                report(trial, monitor)
                if trial.should_prune():
                    raise optuna.TrialPruned()
        return training_loss
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from logalign.common.extras import load
from logalign.diagnosis.epochs import MIN_READINGS, memorized
from logalign.diagnosis.outcome import OUTCOMES, Outcome
from logalign.errors import InputError, LogAlignWarning
from logalign.samples.passes import passes_of
from logalign.samples.record import GIVEN_UP, NOT_TRACKED

load("optuna", extra="optuna", purpose="LogAlignPruner", supported="4.0,6.0")

from optuna.pruners import BasePruner  # noqa: E402  once it is known to be there

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

    from logalign.recording.monitor import Monitor

ATTRIBUTE = "logalign"
"""The user attribute of a trial that holds its verdict."""
WARM_READINGS = 40
"""Readings after which a missing loss or epoch causes a warning."""


class LogAlignPruner(BasePruner):
    """Prunes a trial once logalign's verdict on it is an alarm for some readings, without held-out data.

    The pruner uses only what `report()` stored of the trial, never other trials. So it prunes the first trial of a
    study as well as the last, for any direction, sampler or objective value.

    Args:
        wrapped: Another pruner, which decides if the verdict does not prune. It needs `trial.report()`, as always.
            None means no other pruner.
        outcomes: The verdicts that prune: "overfitting", "memorizing" and "diverged". Leave "memorizing" out if the
            network should grok.
        patience: Readings in a row that must agree. A higher number keeps more trials and saves fewer steps.

    Raises:
        InputError: an outcome is unknown, there is none, `patience` is below 1, or `wrapped` is not a pruner.

    Example:
        >>> import optuna
        >>> study = optuna.create_study(pruner=LogAlignPruner(optuna.pruners.MedianPruner(), patience=20))
    """

    def __init__(
        self,
        wrapped: BasePruner | None = None,
        *,
        outcomes: Collection[Outcome] = ("overfitting", "memorizing", "diverged"),
        patience: int = 12,
    ) -> None:
        if not isinstance(wrapped, BasePruner | None):
            raise InputError(f"wrapped: expected a pruner of Optuna or None, found {wrapped!r}")
        if isinstance(outcomes, str) or not outcomes or not set(outcomes) <= set(OUTCOMES):
            raise InputError(f"outcomes: expected one or more of {', '.join(OUTCOMES)} in a tuple, found {outcomes!r}")
        if type(patience) is not int or patience < 1:
            raise InputError(f"patience: expected a whole number of readings from 1 on, found {patience!r}")
        self._wrapped = wrapped
        self._outcomes = frozenset(outcomes)
        self._patience = patience

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Decide for `trial.should_prune()` if the trial should end."""
        verdict: Mapping[str, Any] | None = trial.user_attrs.get(ATTRIBUTE)
        if verdict is None:
            warnings.warn(
                "logalign: should_prune() was asked before any verdict was stored, so nothing is pruned by one: call "
                "logalign.integrations.optuna.report(trial, monitor) after each monitor.step()",
                LogAlignWarning,
                stacklevel=3,
            )
        elif verdict["outcome"] in self._outcomes and verdict["readings"] >= self._patience:
            return True
        return self._wrapped is not None and self._wrapped.prune(study, trial)

    def __repr__(self) -> str:
        outcomes = tuple(sorted(self._outcomes))
        return f"LogAlignPruner({self._wrapped!r}, outcomes={outcomes}, patience={self._patience})"


def report(trial: Trial, monitor: Monitor) -> None:
    """Store the verdict on a trial's training in the trial, where `LogAlignPruner` and dashboards find it.

    Call it after every `monitor.step()`. It writes if there is a new reading, else it returns at once. The user
    attribute "logalign" then holds outcome, regime, step, since_step, reason, and `readings`, the number of readings in
    a row with this outcome. Report values for other pruners, samplers and plots with `trial.report()`, as always.

    Args:
        trial: The objective's trial.
        monitor: The monitor from `logalign.watch()` for this trial's model. Every trial needs a new one.
    """
    latest = monitor.readings[-1].main if monitor.readings else None
    step = None if latest is None else latest.step
    stored = trial.user_attrs.get(ATTRIBUTE)
    if stored is not None and stored["step"] == step:
        return
    verdict = monitor.verdict
    missing = ["loss"] if latest is not None and latest.loss is None else []
    # Otherwise the samples that come back give the number of passes.
    if latest is not None and latest.epoch is None and latest.drift_reason in (NOT_TRACKED, GIVEN_UP):
        missing.append("epoch")
    if missing and len(monitor.readings) == WARM_READINGS and verdict.evidence.get("deviation") is None:
        warnings.warn(
            f"logalign: monitor.step() got no {' and no '.join(missing)}, so this trial can hardly be pruned by its "
            "verdict: pass step(loss=loss, epoch=passes over the data so far), or watch(baseline=...)",
            LogAlignWarning,
            stacklevel=2,
        )
    record = verdict.record()
    kept = {name: record[name] for name in ("outcome", "regime", "since_step", "reason")}
    trial.set_user_attr(ATTRIBUTE, {**kept, "step": step, "readings": _readings_in_a_row(monitor)})


def held_out_loss(monitor: Monitor) -> float:
    """Estimate the held-out loss of a training from its own losses, as an objective value to be minimized.

    `logalign compare` ranks runs by the same estimate: the training loss plus all its drops at the start of passes over
    the data. docs/integrations/optuna.md compares it with the training loss as an objective.

    Returns:
        The estimate in nats. It is NaN if the training has diverged, which Optuna counts as a failed trial.

    Raises:
        InputError: `step()` got no loss, passes over the data are not known, or there are fewer than ten readings, or
            fewer than 1.5 in a pass.
    """
    readings = [each.main for each in monitor.readings]
    losses = _column(reading.loss if reading.loss_mean is None else reading.loss_mean for reading in readings)
    steps = np.array([reading.step for reading in readings], dtype=np.float64)
    epochs = passes_of(steps, _column(each.passes for each in readings), _column(each.epoch for each in readings))
    if np.isfinite(losses).any() and not np.isfinite(losses[-1]):
        return math.nan
    found = memorized(epochs, losses)
    if found is None:
        known = int((np.isfinite(losses) & np.isfinite(epochs)).sum())
        raise InputError(
            f"expected at least {MIN_READINGS} readings with loss and epoch, several in each pass over the data, "
            f"found {known}{_span(epochs)}; pass loss= and epoch= to monitor.step(), or a smaller watch(every=...)"
        )
    return found.held_out_loss


def _readings_in_a_row(monitor: Monitor) -> int:
    since = monitor.verdict.since_step
    count = 0
    for readings in reversed(monitor.readings):
        if since is None or readings.step < since:
            break
        count += 1
    return count


def _column(values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _span(epochs: np.ndarray[Any, np.dtype[np.float64]]) -> str:
    known = epochs[np.isfinite(epochs)]
    return f" in {known[-1] - known[0]:.3g} passes" if known.size > 1 else ""
