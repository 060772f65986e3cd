"""JAX: `Recorder` takes the sums that a jitted step returns and turns them into readings without blocking the step.

JAX dispatches a step and returns before the device has run it. `Recorder` starts the copy of a monitored step's sums
to the host, keeps the sums as they are, and reads them in a later call of `step()`, when they have arrived.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from logalign.common.extras import load
from logalign.common.version import __version__
from logalign.diagnosis.detector import as_baseline
from logalign.diagnosis.overfit_rule import OverfitThresholds
from logalign.errors import InputError, LogAlignError
from logalign.recording.journal import open_journal
from logalign.runs.reading import FIELDS, UNEMBEDDING, Reading, Readings, finite
from logalign.samples.visits import TRACKED

load("jax", extra="jax", purpose="logalign.integrations.jax")

import jax  # noqa: E402

from logalign.jax.samples import GivenSamples, StepVisits, add_visits, check_not_traced  # noqa: E402
from logalign.jax.sums import Sums, check_concrete  # noqa: E402

if TYPE_CHECKING:
    from logalign.diagnosis.baseline import Baseline
    from logalign.diagnosis.detector import AskedRegime
    from logalign.diagnosis.verdict import Verdict
    from logalign.runs.run import RunLike

STATE_VERSION = 1
NOT_SUMMED = "energies() was told not to sum in this step"


@dataclass(frozen=True)
class Pending:
    """A monitored step whose arrays are on their way to the host."""

    step: int
    time: float
    sums: Mapping[str, Sums]
    losses: tuple[float, int, list[Any]]
    visits: tuple[StepVisits, ...]
    lacking: str | None
    values: Mapping[str, Any]
    extra: Mapping[str, Any]

    @property
    def has_arrived(self) -> bool:
        """True if the arrays can be read without waiting."""
        leaves = jax.tree.leaves((self.sums, self.losses, self.values, self.extra))
        arrays: list[Any] = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        if any(array.is_deleted() for array in arrays):
            return True  # reading a deleted array raises, but its is_ready() crashes jaxlib
        return all(array.is_ready() for array in arrays) and all(each.has_arrived for each in self.visits)


class Recorder:
    """Records the log-alignment ratio of a JAX training: call `step()` once per optimizer step, `close()` at the end.

    In a multi-process training, each process makes a Recorder and calls `step()`. The first process writes. The
    Recorder gathers nothing: pass each process the losses of all samples of the step, and the samples.

    Args:
        run: The folder to record to, in the format of docs/run-format.md. None keeps readings in memory only.
        every: Steps between two readings. Step 0 has a reading.
        resume: Continue the run in that folder, or begin it if there is none. The step count continues after its last
            reading, unless `load_state_dict()` sets it.
        baseline: The reference for LAR in `verdict`: a `Baseline`, or runs to make one from.
        regime: "grokking" or "decline" for one logic only, "both" for both, "auto" for the one that fits.
        thresholds: The thresholds of the decline logic. Default: those of the benchmark.
        trackers: Trackers that also show every reading and the verdict: names or objects, as in `logalign.watch`.
        main: The name of the site that is judged, the layer whose outputs are logits.
        settings: Further entries for run.json, for instance the training's hyperparameters.
        history: The number of steps whose readings stay in memory.
        revisits: The number of samples to follow from visit to visit, for the drift of their loss. 0 follows none.
            Pass their losses with `step(losses=..., samples=...)`.

    Attributes:
        readings: The readings of the monitored steps so far, the latest last.

    Raises:
        InputError: an argument has the wrong type or value.
        RunError: the folder holds a run and `resume` is False, or it is damaged or cannot be written.
        MissingExtraError: JAX or a tracker's package is not installed.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from logalign.jax import energies
        >>> @jax.jit
        ... def train_step(kernel, x):
        ...     def loss_of(kernel):
        ...         z = x @ kernel
        ...         return jnp.mean(z**2), energies(kernel.T, x, outputs=z)
        ...
        ...     (loss, sums), gradient = jax.value_and_grad(loss_of, has_aux=True)(kernel)
        ...     return kernel - 0.1 * gradient, loss, sums
        >>> kernel, x = jnp.ones((8, 3)), jax.random.normal(jax.random.key(0), (32, 8))
        >>> with Recorder(every=1) as recorder:
        ...     for _ in range(3):
        ...         kernel, loss, sums = train_step(kernel, x)
        ...         _ = recorder.step(sums, loss=loss)
        >>> print(*(each.step for each in recorder.readings))
        0 1 2
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | None = None,
        *,
        every: int = 10,
        resume: bool = False,
        baseline: Baseline | RunLike | Sequence[RunLike] | None = None,
        regime: AskedRegime = "auto",
        thresholds: OverfitThresholds | None = None,
        trackers: object = None,
        main: str = UNEMBEDDING,
        settings: Mapping[str, Any] | None = None,
        history: int = 10_000,
        revisits: int = TRACKED,
    ) -> None:
        if every < 1:
            raise InputError(f"every: expected a whole number of steps from 1 on, found {every}")
        given: object = revisits
        if not isinstance(given, int) or isinstance(given, bool) or given < 0:
            raise InputError(f"revisits: expected how many samples to follow, 0 for none, found {given!r}")
        self._every = every
        self._main = main
        self._baseline = as_baseline(baseline)
        meta = {
            "logalign_version": __version__,
            "model": "JAX",
            "main": main,
            "every": every,
            "spectra_every": 0,
            "sites": {},
            "settings": dict(settings or {}),
        }
        self._journal = open_journal(
            run,
            meta,
            main=main,
            resume=resume,
            is_first=jax.process_index() == 0,
            history=history,
            baseline=self._baseline,
            regime=regime,
            thresholds=thresholds,
            trackers=trackers,
            revisits=revisits,
        )
        self.readings = self._journal.readings
        self._step = self._journal.first_step
        self._pending: deque[Pending] = deque()
        self._losses: tuple[float, int, list[Any]] = (0.0, 0, [])  # sum, count, and losses to add
        self._samples = GivenSamples()
        self._sites: dict[str, dict[str, Any]] = {}
        self._closed = False

    @property
    def next_is_monitored(self) -> bool:
        """True if the current step, which the next `step()` completes, is a monitored one."""
        return self._step % self._every == 0

    @property
    def verdict(self) -> Verdict:
        """The verdict on the readings that have arrived: healthy, approaching, overfitting, and so on."""
        return self._journal.verdict

    def step(
        self,
        sums: Sums | Mapping[str, Sums],
        *,
        loss: Any = None,
        lr: Any = None,
        epoch: Any = None,
        losses: Any = None,
        samples: Any = None,
        **extra: Any,
    ) -> Readings | None:
        """Complete an optimizer step with the sums that `energies()` returned in it, without waiting.

        Args:
            sums: The sums of the main layer, or of several layers by name. Only monitored steps use them.
            loss: The training loss of this step, a number or an array of one. The mean of all losses since the
                previous reading is recorded, too.
            lr: The learning rate.
            epoch: Passes over the data so far.
            losses: The loss of each sample of this step before the update, in nats, [B]: a JAX or NumPy array or a
                list. The loss of a text is the mean over its tokens. Pass them in every step, also between monitored
                ones.
            samples: The samples' ids, whole numbers or text, [B], or the samples themselves, [B, ...], such as token
                ids or images, which their content identifies. In rows of token ids [B, length], zeros before and after
                the tokens are padding and do not change the sample. A row of only zeros is padding of the batch. Pass
                ids where samples are augmented, padded with another token, or differ only by such zeros.
            **extra: Any other number to record, for instance `val_loss`.

        Returns:
            The latest readings that have arrived in this call, or None. They may belong to an earlier step, which
            `readings.step` gives. `flush()` waits for all readings.

        Raises:
            InputError: the sums of the main layer are missing, an array is traced, sums have a leading axis, a value is
                not a number, a name belongs to the readings, or a layer's shape differs from the baseline's.

        Warns:
            LogAlignWarning: losses or samples cannot be used. The drift leaves the step out.
        """
        if self._closed:
            raise LogAlignError("step() on a recorder that is closed; make another to go on, with resume=True")
        check_not_traced(losses=losses, samples=samples)
        if not self.next_is_monitored:
            if loss is not None:
                _check_value("loss", loss)
                self._add(loss)
            self._give(losses, samples)
            self._step += 1
            if self._pending:
                return self._take_arrived()
            self._add_visits(self._samples.overdue())
            return None
        several = {self._main: sums} if isinstance(sums, Sums) else sums
        self._check(several, {"loss": loss, "lr": lr, "epoch": epoch}, extra)
        if loss is not None:
            self._add(loss)
        self._give(losses, samples)
        pending = Pending(
            step=self._step,
            time=time.time(),
            sums=dict(several),
            losses=self._losses,
            visits=self._samples.cut(),
            lacking=self._samples.lacking,
            values={"loss": loss, "lr": lr, "epoch": epoch},
            extra=extra,
        )
        self._losses = (0.0, 0, [])
        for array in jax.tree.leaves((pending.sums, pending.losses, pending.values, pending.extra)):
            if isinstance(array, jax.Array):
                array.copy_to_host_async()
        self._pending.append(pending)
        self._step += 1
        return self._take_arrived()

    def flush(self) -> Readings | None:
        """Wait for the pending readings and return the latest of them, or None if there are none."""
        taken = None
        while self._pending:
            taken = self._take(self._pending.popleft())
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint has to keep for `load_state_dict()`: numbers and text that fit JSON.

        The call waits for the pending readings.
        """
        self.flush()
        self._add_visits(self._samples.cut())
        total, count = _sum_of(self._losses)
        return {
            "version": STATE_VERSION,
            "step": self._step,
            "losses": json.dumps([finite(total), count]),
            **self._journal.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the step of a checkpoint and supersede the run's readings from that step on.

        Raises:
            InputError: the state does not come from `state_dict()`.
        """
        if state.get("version") != STATE_VERSION or not isinstance(state.get("step"), int):
            raise InputError(
                f"state: expected what Recorder.state_dict() gives (version {STATE_VERSION}), found {dict(state)!r}"
            )
        self.flush()
        self._step = state["step"]
        total, count = json.loads(state["losses"])
        self._losses = (math.nan if total is None else total, count, [])
        self._samples = GivenSamples()
        self._journal.load_state_dict(state, step=self._step)

    def close(self) -> None:
        """Wait for the pending readings and close the run log. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            self._journal.close(step=self._step)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            # The error of the step may make its sums fail, too. It is already raised.
            with suppress(jax.errors.JaxRuntimeError):
                self.close()

    def __repr__(self) -> str:
        sites = ", ".join(f"{site} {each['m']} x {each['n']}" for site, each in self._sites.items())
        return f"Recorder(step {self._step}, every {self._every}; {sites or 'nothing recorded yet'})"

    def _check(self, sums: Any, given: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        if not isinstance(sums, Mapping) or not all(isinstance(each, Sums) for each in sums.values()):
            raise InputError(
                f"sums: expected what logalign.jax.energies() returns, or a dict of such by site, found "
                f"{type(sums).__name__}"
            )
        if self._main not in sums:
            raise InputError(
                f"sums: expected those of the main site {self._main!r}, found {', '.join(sums) or 'none'}; "
                "name it in Recorder(main=...)"
            )
        for name in extra:
            if name in FIELDS:
                raise InputError(
                    f"step({name}=...): expected a name of your own, found one that readings use themselves"
                )
        for name, value in {**given, **extra}.items():
            if value is not None:
                _check_value(name, value)
        for site, each in sums.items():
            check_concrete(each)
            m, n = each.vocabulary_effect.size, each.row_mean.size
            if site not in self._sites:
                if site == self._main and self._baseline is not None:
                    self._baseline.check_shape(m, n, name=site)
                self._sites[site] = {"module": site, "kind": "JAX", "how": "given to Recorder.step()"}
            self._sites[site] |= {"softmax": site == self._main, "m": m, "n": n}

    def _add(self, loss: Any) -> None:
        total, count, later = self._losses
        later.append(loss)
        self._losses = (total, count + 1, later)

    def _give(self, losses: Any, samples: Any) -> None:
        """Take the samples of the current step."""
        if self._journal.samples.is_off:
            return
        try:
            self._samples.give(self._step, losses, samples)
        except InputError as error:
            self._warn_of_samples(self._step, error)

    def _add_visits(self, visits: Iterable[StepVisits]) -> None:
        for each in visits:
            try:
                add_visits(self._journal.samples, each)
            except InputError as error:
                self._warn_of_samples(each.step, error)

    def _warn_of_samples(self, step: int, error: InputError) -> None:
        kind = str(error).partition(", found")[0]  # the numbers that follow differ from step to step
        self._journal.warn_later(kind, f"step {step}: {error}; steps like this are left out of the drift")

    def _take_arrived(self) -> Readings | None:
        taken = None
        while self._pending and self._pending[0].has_arrived:
            taken = self._take(self._pending.popleft())
        return taken

    def _take(self, pending: Pending) -> Readings:
        total, count = _sum_of(pending.losses)
        numbers = {name: _number(value) for name, value in pending.values.items()}
        common = numbers | {
            "step": pending.step,
            "time": pending.time,
            "loss_mean": finite(total / count) if count else None,
            "extra": {name: _number(value) for name, value in pending.extra.items()},
        }
        self._journal.describe(self._sites, step=pending.step)
        self._add_visits(pending.visits)
        lacking = None if self._journal.samples.visits.known else pending.lacking
        of_samples = self._journal.of_samples(pending.step, numbers["epoch"], lacking=lacking)
        readings: dict[str, Reading] = {}
        for site, sums in pending.sums.items():
            fields = common | (of_samples if site == self._main else {})
            readings[site] = reading = self._reading(site, sums, fields)
            if reading.reason is not None:
                self._journal.warn_later(
                    f"undefined {site}", f"step {pending.step}, {site}: no LAR, for {reading.reason}"
                )
        taken = Readings(readings, main=self._main)
        self._journal.take(taken)
        return taken

    def _reading(self, site: str, sums: Sums, common: Mapping[str, Any]) -> Reading:
        energies, offered, masked = sums.to_energies(), int(sums.offered), bool(sums.masked)
        if not offered:
            return Reading(
                site=site, lar=None, m=energies.m, n=energies.n, tokens=0, nonfinite=0, reason=NOT_SUMMED, **common
            )
        return Reading.from_energies(
            energies,
            softmax=site == self._main,
            site=site,
            tokens_seen=self._journal.count(site, step=common["step"], tokens=offered),
            kept=energies.tokens / offered if masked else None,
            **common,
        )


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, jax.core.Tracer):
        raise InputError(
            f"step({name}=...): expected a value, found a traced one: step() is called inside jit, grad or scan; "
            "call it outside, with what the traced function returns"
        )
    if isinstance(value, jax.Array):
        if value.size != 1:
            raise InputError(f"step({name}=...): expected one number, found an array of shape {value.shape}")
        return
    try:
        float(value)
    except (TypeError, ValueError):
        raise InputError(f"step({name}=...): expected a number, found {value!r}") from None


def _number(value: Any) -> float | None:
    return None if value is None else finite(_float(value))


def _float(value: Any) -> float:
    return float(jax.device_get(value).reshape(())) if isinstance(value, jax.Array) else float(value)


def _sum_of(losses: tuple[float, int, list[Any]]) -> tuple[float, int]:
    total, count, later = losses
    return total + sum(_float(each) for each in later), count
