"""The monitor combines hooks, run log and readings behind one call, `watch(model)`.

The hooks of `logalign.torch` sum on the device. `step()` brings the sums to the host in one transfer. The readings go
to the run log and to the caller.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from logalign.common.version import __version__
from logalign.diagnosis.detector import as_baseline, check_regime
from logalign.diagnosis.overfit_rule import OverfitThresholds
from logalign.errors import InputError, LogAlignError, MissingExtraError
from logalign.recording.journal import Journal, open_journal, say
from logalign.runs.reading import UNEMBEDDING, Reading, Readings, finite
from logalign.samples.visits import TRACKED

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from logalign.diagnosis.baseline import Baseline
    from logalign.diagnosis.detector import AskedRegime
    from logalign.diagnosis.verdict import Verdict
    from logalign.runs.run import RunLike
    from logalign.torch.hooks import HookRecorder
    from logalign.torch.ranks import Ranks

SILENT_STEPS = 3
"""This many monitored steps in a row without a reading cause a warning."""
UNSTEPPED_UPDATES = 3
"""This many weight updates without a call of `step()` cause a warning."""
SITES_SAID = 6
"""The most layers that are reported one by one."""
STATE_VERSION = 2
VISITS = "visits of samples"
"""The vector sent to the host with the sums of the sites."""


def watch(
    model: nn.Module,
    *,
    layers: str | Sequence[str] = UNEMBEDDING,
    every: int = 10,
    spectra_every: int = 0,
    run: str | os.PathLike[str] | None = None,
    resume: bool = False,
    ignore_index: int = -100,
    shift_labels: bool | None = None,
    settings: Mapping[str, Any] | None = None,
    history: int = 10_000,
    baseline: Baseline | RunLike | Sequence[RunLike] | None = None,
    regime: AskedRegime = "auto",
    thresholds: OverfitThresholds | None = None,
    mesh: DeviceMesh | ProcessGroup | None = None,
    vocabulary: int | None = None,
    without_logits: str | int = "auto",
    main_call: int | None = None,
    trackers: object = None,
    revisits: int = TRACKED,
) -> Monitor:
    """Watch a PyTorch model while it trains: measure the log-alignment ratio of its unembedding.

    Args:
        model: The network, in any wrapper, or a `PipelineStage`. Only the last stage has the unembedding, and the
            others have nothing to measure. In distributed training, each rank calls this after the process group is up
            and the model is wrapped, sharded or parallelized.
        layers: "unembedding" finds it: the result of `get_output_embeddings()`, else a well-known name such as
            `lm_head`, else the last linear layer in the first forward. A module name selects that module. A list of
            names, patterns (shell) and "unembedding" selects several layers. An empty list leaves only `observe()`.
        every: The monitor takes a reading at step 0 and then at every multiple of this number.
        spectra_every: Also compute p, q and the decomposition of k at this interval of steps. 0 for never.
        run: The folder to record to, in the format of docs/run-format.md. None keeps readings in memory only.
        resume: Continue the run in that folder, or begin it if there is none. The count of steps continues after its
            last reading, unless `load_state_dict()` sets it.
        ignore_index: The label that does not count, where labels are seen among the forward's arguments.
        shift_labels: True if the model itself shifts `labels` by one. None decides by the class name, as in
            Transformers: `...ForCausalLM` and `...LMHeadModel` shift.
        settings: Further entries for run.json, for instance the training's hyperparameters.
        history: The number of steps whose readings stay in memory.
        baseline: The reference for LAR in `Monitor.verdict`: a `Baseline`, or runs to make one from, with the same
            set-up on data that does not repeat.
        regime: "grokking" or "decline" for one logic only, "both" for both, "auto" for the one that fits.
        thresholds: Thresholds of the decline logic. The default is the benchmark's.
        mesh: The ranks that have tokens of their own, where the model's wrapper (DDP, `fully_shard`, DeepSpeed)
            does not say it: a process group, or the data- and context-parallel axes of a device mesh.
        vocabulary: The number of rows of the unembedding without its padding. The padding is left out of W and of the
            logits.
        without_logits: How to compute the logits' energy where a fused loss never forms them, or where a layer returns
            a result other than `W x + b`: "exact", or "sample" for 256 random tokens of each forward, or a number of
            tokens. Samples give standard errors. "auto" is exact where that costs less than a sample, or, spread over
            `every` steps, below 1 % of the layer's own forward and backward.
        main_call: The call of the unembedding that counts, from 0 on, where a forward calls it again on the same tokens
            to predict further ones (multi-token prediction). None counts all calls, as for a loss in chunks.
        trackers: Trackers that also show every reading and the verdict: "tensorboard", "wandb", "mlflow", "csv", an
            object (a SummaryWriter, a run of W&B or MLflow, an Accelerator), or a list of them. docs/trackers.md has
            the names. A tracker that fails warns once and stops no training.
        revisits: The number of samples to follow between visits, for the drift of their loss (docs/revisits.md). 0 for
            none. Their content identifies them, or the ids of `step(samples=...)`.

    Returns:
        A Monitor. Call its `step()` once per optimizer step. Weights are bit-identical with and without it. The logger
        "logalign" names the selected layer and the reason, or standard error does where no logging is set up.

    Raises:
        InputError: an argument has the wrong type or value, or the baseline has another shape than the layer.
        SiteError: the layer is missing, not linear or of fan-in 1, or the model is watched already.
        RunError: the folder holds a run and `resume` is False, it is damaged or cannot be written, or the baseline's
            run is missing.
        MissingExtraError: PyTorch or a tracker's package is not installed.

    Example:
        >>> import torch, logalign
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with logalign.watch(model, every=1) as monitor:
        ...     for _ in range(3):
        ...         loss = model(torch.randn(32, 8)).square().mean()
        ...         loss.backward()
        ...         optimizer.step()
        ...         readings = monitor.step(loss=loss)
        >>> readings.main.step, readings.main.n
        (2, 16)
    """
    try:
        from torch import nn
    except ImportError as error:
        raise MissingExtraError('watch() needs PyTorch: pip install "logalign[torch]"') from error
    from logalign.torch.calls import Calls
    from logalign.torch.hooks import HookRecorder
    from logalign.torch.linear import weight_of
    from logalign.torch.masks import TokenMask
    from logalign.torch.output_energy import Way
    from logalign.torch.pipeline import stage_of
    from logalign.torch.rows import padding_token
    from logalign.torch.samples import SampleTracker
    from logalign.torch.sites import Found, find_sites
    from logalign.torch.which_ranks import find_ranks

    model, sought, is_trying = stage_of(model, layers)
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    if every < 1:
        raise InputError(f"every: expected a whole number of steps from 1 on, found {every}")
    given: object = revisits
    if not isinstance(given, int) or isinstance(given, bool) or given < 0:
        raise InputError(f"revisits: expected how many samples to follow, 0 for none, found {given!r}")
    if spectra_every < 0 or spectra_every % every:
        raise InputError(f"spectra_every: expected 0 or a multiple of every={every}, found {spectra_every}")
    check_regime(regime)
    reference = as_baseline(baseline)
    found = Found(is_idle=True) if sought is None else find_sites(model, sought, vocabulary=vocabulary)
    for site in found.sites:
        if reference is not None and site.label == found.main:
            reference.check_shape(*site.shape, name=site.name)
    way = Way(without_logits, every=every)
    mask = TokenMask(model, ignore_index=ignore_index, shift_labels=shift_labels)
    weights = [weight_of(site.module) for site in (*found.sites, *found.candidates)]
    ranks = find_ranks(model, mesh, weights, is_stage=is_trying is not None)
    samples = SampleTracker(
        is_on=revisits > 0 and not found.is_idle,
        ignore_index=ignore_index,
        shifts=mask.shifts,
        padding=padding_token(model),
        main_call=main_call,
    )
    recorder = HookRecorder(model, found, mask, ranks, way, Calls(main_call), samples)
    recorder.is_trying = is_trying
    mask.micro_batches = is_trying is not None
    try:
        meta = {
            "logalign_version": __version__,
            "model": type(model).__name__,
            "main": found.main,
            "every": every,
            "spectra_every": spectra_every,
            "sites": {},
            "settings": dict(settings or {}),
        }
        journal_settings: dict[str, Any] = {
            "main": found.main,
            "history": history,
            "baseline": reference,
            "regime": regime,
            "thresholds": thresholds,
            "revisits": revisits,
        }
        if sought is None:
            run, trackers = None, None
        journal = _open(run, meta, resume=resume, trackers=trackers, ranks=ranks, **journal_settings)
        return Monitor(recorder, journal, main=found.main, every=every, spectra_every=spectra_every)
    except BaseException:
        recorder.detach()
        raise


def _open(
    run: str | os.PathLike[str] | None,
    meta: Mapping[str, Any],
    *,
    resume: bool,
    trackers: object,
    ranks: Ranks,
    **settings: Any,
) -> Journal:
    """Open the journal, at the first rank with run folder and trackers, at all ranks with the resumed readings.

    All ranks raise an error of the first rank.
    """
    if run is None and trackers is None:
        return Journal(None, **settings)
    opened, past, error = None, None, None
    if ranks.is_first:
        try:
            opened = open_journal(run, meta, resume=resume, trackers=trackers, **settings)
            past = opened.past
        except LogAlignError as found:
            error = found
        except Exception as found:  # a tracker's own error: no other rank may wait for this rank
            ranks.share((None, LogAlignError(f"at the first rank: {type(found).__name__}: {found}")))
            raise
    past, error = ranks.share((past, error))
    if error is not None:
        raise error
    return Journal(None, past=past, **settings) if opened is None else opened


class Monitor:
    """The result of `watch()`: call `step()` once per optimizer step, and `close()` at the end (or use `with`)."""

    def __init__(self, recorder: HookRecorder, journal: Journal, *, main: str, every: int, spectra_every: int) -> None:
        self._recorder = recorder
        self._journal = journal
        self._main = main
        self._every = every
        self._spectra_every = spectra_every
        self._step = journal.first_step
        self._described: dict[str, Any] = {}
        self._losses: tuple[float | Tensor, int] = (0.0, 0)  # sum and count of the steps since the last reading
        self._silent: dict[str, int] = {}
        self._closed = False
        self._read_until = self._step  # the first step whose visits are not read yet
        self._recorder.next_step(self._step)
        self._arm()
        self._describe()

    @property
    def readings(self) -> deque[Readings]:
        """The readings of the monitored steps so far, the latest last (at most `history` steps)."""
        return self._journal.readings

    @property
    def verdict(self) -> Verdict:
        """The verdict on the main layer's readings so far: healthy, approaching, overfitting, and so on.

        It equals `logalign.diagnose` of the recorded run. If the detector itself fails, one warning follows. The
        verdict is then "undecidable", with the error as its reason.
        """
        return self._journal.verdict

    @property
    def next_is_monitored(self) -> bool:
        """True if the current step, which the next `step()` completes, is a monitored one."""
        return self._step % self._every == 0

    @property
    def sites(self) -> dict[str, dict[str, Any]]:
        """The measured layers by site: module, shapes, tied or not, bias, how it was found, origin of the mask."""
        return {
            label: site.description()
            | {"mask": self._recorder.mask.source}
            | ({} if (inputs := self._inputs_of(label)) is None else {"inputs": inputs})
            for label, site in self._recorder.sites.items()
        }

    def step(
        self,
        *,
        loss: float | Tensor | None = None,
        lr: float | None = None,
        epoch: float | None = None,
        samples: Any = None,
        losses: Any = None,
        **extra: float | Tensor,
    ) -> Readings | None:
        """Complete an optimizer step, and on monitored steps take the reading of its forwards.

        Args:
            loss: The training loss of this step, recorded with the reading. The mean of all losses passed since the
                previous reading is recorded, too.
            lr: The learning rate.
            epoch: Passes over the data so far. It is optional where samples come back unchanged. A whole number that
                is constant during a pass also works.
            samples: Ids of the rows of this step's forwards, in their order: whole numbers or text. They identify
                samples whose content does not, such as augmented images. Pass them in every step or in none.
            losses: The loss of each row of this step's forwards, before the update: a tensor or numbers, for losses
                that are not seen otherwise. Pass them in every step or in none.
            **extra: Any other number to record, for instance `val_loss`.

        Returns:
            The readings of this step by site on monitored steps, else None. All arguments but the loss are recorded on
            monitored steps only. The reading is of the forward, so call it before or after `optimizer.step()`.

        Raises:
            InputError: a value is no number, or readings use its name themselves.
        """
        step = self._step
        if step % self._every:
            if loss is not None:
                self._add(loss)
            if samples is not None or losses is not None:
                self._give(losses, samples)
            self._step = step + 1
            self._recorder.next_step(self._step)
            if self._step % self._every == 0:
                self._arm()
            return None
        if self._closed:
            raise LogAlignError("step() on a monitor that is closed; watch the model again to go on")
        from logalign.torch.values import check_values

        given = {"loss": loss, "lr": lr, "epoch": epoch}
        check_values(given, extra)
        if loss is not None:
            self._add(loss)
        if samples is not None or losses is not None:
            self._give(losses, samples)
        total, count = self._losses
        self._losses = (0.0, 0)
        given["loss_mean"] = total / count if count else None
        self._step = step + 1
        self._recorder.next_step(self._step)
        if self._recorder.is_idle:
            return None
        self._recorder.ranks.check_still_alone()
        return self._read(step, given, extra)

    def mask(self, mask: Tensor) -> None:
        """Set which tokens of the next forward count, in place of labels among the forward's arguments.

        Args:
            mask: bool, with the shape of the tokens that reach the layer: its inputs' shape without the last axis. A
                pipeline stage needs all micro-batches of the step.

        Raises:
            InputError: the mask is no tensor of bool. The forward reports a wrong shape.
        """
        if self.next_is_monitored and not self._closed:
            self._recorder.mask.give(mask)

    def observe(
        self,
        weight: Tensor,
        inputs: Tensor,
        *,
        outputs: Tensor | None = None,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        site: str = UNEMBEDDING,
    ) -> None:
        """Measure a linear map that no module computes, such as the one inside a fused loss.

        Call it where the loss is computed. It does nothing between monitored steps and where gradients are off.
        Several calls in one step pool their tokens.

        Args:
            weight: [m, n] (out, in).
            inputs: [..., n].
            outputs: [..., m], with the bias in it. Without them the other arguments give their energy.
            bias: [m].
            mask: [...] of bool, the tokens that count.
            site: The reading's name.

        Raises:
            InputError: shapes or dtypes are wrong, or the site's own forward also ran in this step.
        """
        import torch

        if not self._recorder.armed or not torch.is_grad_enabled():
            return
        from logalign.mathematics.arrays import checked_layer

        checked_layer(weight, inputs, outputs=outputs, bias=bias)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != inputs.shape[:-1]):
            raise InputError(
                f"mask: expected bool of shape {tuple(inputs.shape[:-1])}, found {mask.dtype} of {tuple(mask.shape)}"
            )
        self._recorder.observe(site, weight, inputs, outputs=outputs, bias=bias, mask=mask)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that `load_state_dict()` needs in a checkpoint, from any rank.

        It holds step, shapes of the layers, tokens seen, samples, the detector's state, and each rank's own losses (a
        sum, null if not finite, and a count) and visits of samples since the last reading. Entries that change shape
        during training are text (JSON), so that a fresh monitor's state has the same entries.
        `torch.distributed.checkpoint` loads into existing entries. `torch.save` and JSON can hold it, too.
        """
        total, count = self._losses
        return {
            "version": STATE_VERSION,
            "step": self._step,
            "layers": json.dumps({label: list(site.shape) for label, site in self._recorder.sites.items()}),
            "losses": json.dumps([finite(float(total)), count]),
            "visits": json.dumps([self._read_until, *self._recorder.samples.state()]),
            **self._journal.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a checkpoint's step, which supersedes the run's readings from that step on.

        The verdict continues from the checkpoint's, or, without one, from the readings before that step.

        Raises:
            InputError: the state is not from `state_dict()`, or has other layers.
        """
        if state.get("version") != STATE_VERSION or not isinstance(state.get("step"), int):
            raise InputError(
                f"state: expected what Monitor.state_dict() gives (version {STATE_VERSION}), found {dict(state)!r}"
            )
        saved, now = json.loads(state.get("layers", "{}")), self._recorder.sites
        other = {
            label: m_n for label, m_n in saved.items() if now and list(getattr(now.get(label), "shape", ())) != m_n
        }
        if other:
            raise InputError(
                f"state: expected the layers that the checkpoint was made with, {_shapes(saved)}, found "
                f"{_shapes({label: site.shape for label, site in now.items()})}; watch the same layers, or begin anew"
            )
        self._step = state["step"]
        total, count = json.loads(state.get("losses", "[0.0, 0]"))
        self._losses = (math.nan if total is None else total, count)
        self._journal.load_state_dict(state, step=self._step)
        self._recorder.take()
        samples = self._recorder.samples
        self._read_until, *kept = json.loads(state.get("visits", f"[{self._step}, false, false, [], 0, false]"))
        samples.load(kept)
        samples.settle(threshold=self._journal.samples.visits.threshold)
        if self._journal.samples.is_off:
            samples.stop()
        self._recorder.next_step(self._step)
        self._arm()

    def close(self) -> None:
        """Remove the hooks and close the run log (safe to call twice)."""
        if self._closed:
            return
        self._closed = True
        unstepped = self._step == 0 and bool(self._recorder.meters) and sys.exc_info()[0] is None
        self._recorder.armed = False
        self._recorder.samples.stop()
        self._recorder.detach()
        try:
            if unstepped:
                self._journal.warn(
                    "no step",
                    "forwards were measured, but step() was never called: call it once per optimizer step",
                    step=self._step,
                )
        finally:
            self._journal.close(step=self._step)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        sentences = "; ".join(site.sentence() for site in self._recorder.sites.values())
        return f"Monitor(step {self._step}, every {self._every}; {sentences or 'sites are found in the first forward'})"

    def _add(self, loss: float | Tensor) -> None:
        """Add a loss to the mean without waiting, and at once, because a replayed CUDA graph overwrites it."""
        from logalign.torch.values import check_values

        check_values({"loss": loss}, {})
        total, count = self._losses
        value = loss.detach().float() if hasattr(loss, "detach") else float(loss)
        self._losses = (total + value, count + 1)

    def _arm(self) -> None:
        recorder = self._recorder
        recorder.armed = not self._closed and self.next_is_monitored
        recorder.spectral = bool(self._spectra_every) and self._step % self._spectra_every == 0

    def _read(self, step: int, given: Mapping[str, Any], extra: Mapping[str, Any]) -> Readings | None:
        from logalign.torch.meter import unpack
        from logalign.torch.values import to_host

        recorder, ranks = self._recorder, self._recorder.ranks
        recorder.settle()
        device = recorder.device
        unstepped, skipped = recorder.unstepped, dict(recorder.skipped)
        meters = recorder.take()
        spectral = recorder.spectral
        kept = {site: meter.grams for site, meter in meters.items()}
        if not ranks.alone:
            ranks.agree({**recorder.shapes, **{site: (meter.m, meter.n) for site, meter in meters.items()}})
        first, self._read_until = self._read_until, step + 1
        visits = recorder.samples.take(device, first=first, count=ranks.visits)
        packed, given, visits = ranks.total(
            {site: meter.pack() for site, meter in meters.items()}, given, device, visits
        )
        grams = ranks.total_grams(kept, device) if spectral else {}
        vectors = {site: each.vector for site, each in packed.items()} | {VISITS: visits.flatten()}
        hosts, numbers = to_host(vectors, {**given, **extra})
        self._arm()
        of_samples = self._follow_samples(step, hosts.pop(VISITS), first=first, numbers=numbers)
        if unstepped >= UNSTEPPED_UPDATES:
            self._journal.warn_later(
                "unstepped",
                f"the weights changed {unstepped} times between two calls of step(): call it once per optimizer step; "
                "this reading pools forwards of several updates",
            )
        if recorder.doubt is not None:
            self._journal.warn_later("doubt", recorder.doubt)
        calls = recorder.calls
        if calls.repeated and calls.main is None:
            self._journal.warn_later(
                "calls",
                f"the unembedding was called {calls.repeated} times in one forward, on more tokens than there are "
                "labels; all calls are counted: where the model predicts further tokens, too, pass watch(main_call=0), "
                "or which call is the main one",
            )
        common = {name: numbers.pop(name) for name in given} | {"step": step, "time": time.time(), "extra": numbers}
        readings: dict[str, Reading] = {}
        for site, each in packed.items():
            energies, offered, masked = unpack(each, hosts[site])
            if not offered:
                continue
            self._silent[site] = 0
            known = recorder.sites.get(site)
            fields: dict[str, Any] = {
                **common,
                "site": site,
                "tokens_seen": self._journal.count(site, step=step, tokens=offered),
                "kept": energies.tokens / offered if masked and offered else None,
            } | (of_samples if site == self._main else {})
            if site in grams:
                fields |= self._spectral_fields(step, site, grams[site])
            softmax = known.softmax if known is not None else site == UNEMBEDDING
            readings[site] = Reading.from_energies(energies, softmax=softmax, **fields)
            if readings[site].reason is not None:
                why = f"step {step}, {site}: no LAR, for {readings[site].reason}"
                self._journal.warn_later(f"undefined {site}", why)
        for site, known in recorder.sites.items():
            if site not in readings:
                found = common | (of_samples if site == self._main else {})
                readings[site] = self._silent_reading(site, known.shape, skipped, found)
        if self._main not in readings:
            readings[self._main] = self._silent_reading(self._main, None, skipped, common | of_samples)
        taken = Readings(readings, main=self._main)
        self._describe()
        self._journal.take(taken)
        return taken

    def _give(self, losses: Any, ids: Any) -> None:
        wrong = self._recorder.samples.give(losses, ids)
        if wrong is not None:
            self._journal.warn_later("given samples", f"step({wrong}); the visits of such steps are left out")

    def _follow_samples(
        self, step: int, packed: np.ndarray[Any, Any], *, first: int, numbers: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Take the visits of samples since the last reading, and return their fields of a reading."""
        from logalign.torch.kept import unpack

        tracker, samples = self._recorder.samples, self._journal.samples
        for visit in unpack(packed, first=first):
            samples.add(visit.step, visit.hashes, visit.losses)
            tracker.check(visit.losses)
        lacking = tracker.lacking(numbers.get("loss_mean"))
        if tracker.fault is not None:
            self._journal.warn_later("samples fault", f"samples are followed no more: {tracker.fault}")
        fields = self._journal.of_samples(step, numbers.get("epoch"), lacking=lacking)
        if samples.is_off:
            tracker.stop()
        elif tracker.is_on:
            tracker.settle(threshold=samples.visits.threshold)
        return fields

    def _silent_reading(
        self, site: str, shape: tuple[int, int] | None, skipped_forwards: Mapping[str, int], common: Mapping[str, Any]
    ) -> Reading:
        self._silent[site] = self._silent.get(site, 0) + 1
        skipped = ", ".join(f"{count} {why}" for why, count in skipped_forwards.items())
        if self._silent[site] == SILENT_STEPS:
            self._journal.warn_later(
                f"silent {site}",
                f"{site}: no training forward reached this layer in {SILENT_STEPS} monitored steps"
                + (f" (forwards that did: {skipped}; train in model.train() and with gradients)" if skipped else "")
                + "; watch a model that is compiled before its first compiled call, or call torch._dynamo.reset() "
                "after watch(); pass the very object that is trained; " + self._recorder.without_forward.advice(site),
            )
        m, n = shape or (None, None)
        reason = "no training forward reached this layer" + (f" ({skipped})" if skipped else "")
        return Reading(site=site, lar=None, m=m, n=n, tokens=0, nonfinite=0, reason=reason, **common)

    def _spectral_fields(self, step: int, site: str, grams: tuple[Tensor, Tensor]) -> dict[str, Any]:
        from logalign.mathematics.arrays import to_numpy
        from logalign.mathematics.spectrum import spectra_of_grams

        found = spectra_of_grams(*grams)
        if self._journal.writes:
            self._journal.spectra(step, site, p=to_numpy(found.p), q=to_numpy(found.q))
        return {
            "weight_participation": finite(found.weight_participation),
            "input_participation": finite(found.input_participation),
            "coherence": finite(found.coherence),
        }

    def _inputs_of(self, site: str) -> str | None:
        """Return the origin of a layer's inputs, if its own forward does not run."""
        return self._recorder.without_forward.described.get(site)

    def _describe(self) -> None:
        """Report the measured layers once they are known, and the origin of the mask when it changes."""
        if self.sites == self._described:
            return
        self._described = self.sites
        if not self._recorder.ranks.is_first:
            return
        mask, sites = self._recorder.mask, list(self._recorder.sites.values())
        rest = [f"mask: {mask.source}"] if mask.was_seen else []
        if not self._recorder.ranks.alone:
            rest.append(f"over {self._recorder.ranks.describe()}")
        for site in sites[:SITES_SAID]:
            words = [site.sentence()]
            if (inputs := self._inputs_of(site.label)) is not None:
                words.append(f"its own forward does not run, inputs: {inputs}")
            say("; ".join([*words, *rest]))
        if len(sites) > SITES_SAID:
            last = sites[-1].sentence()
            say(f"... and {len(sites) - SITES_SAID} more layers; the last: {last}")
        self._journal.describe(self.sites, step=self._step)


def _shapes(layers: Mapping[str, Sequence[int]]) -> str:
    """Return layers with their shapes in words."""
    return ", ".join(f"{label} {m} x {n}" for label, (m, n) in layers.items())
