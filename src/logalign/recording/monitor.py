"""The monitor: hooks, run log and readings behind one call, `watch(model)`.

It composes: the hooks of `logalign.torch` sum on the device, `step()` brings the sums to the host in one transfer,
and the readings go to the run log and to the caller.
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
    from logalign.runs.run import Run
    from logalign.torch.hooks import HookRecorder
    from logalign.torch.ranks import Ranks

SILENT_STEPS = 3
"""Monitored steps in a row without a reading after which the user is told."""
UNSTEPPED_UPDATES = 3
"""Weight updates without a call of `step()` after which the user is told."""
SITES_SAID = 6
"""Layers that are told of one by one where many are watched."""
STATE_VERSION = 2
VISITS = "visits of samples"
"""What travels to the host beside the sums of the sites."""


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
    baseline: Baseline | str | os.PathLike[str] | Run | None = None,
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
        model: The network, in whatever wrapper it is trained; or a `PipelineStage`, of which the last has the
            unembedding and all others nothing to measure. Across ranks, each of them calls this, once the process group
            is up and the model wrapped, sharded or parallelized.
        layers: "unembedding" finds it: what `get_output_embeddings()` gives, else a well-known name such as `lm_head`,
            else the last linear layer to run in the first forward. A module name says which it is. A list of names,
            shell-style patterns and "unembedding" watches several layers; an empty list, only what `observe()` gets.
        every: A reading is taken at step 0 and every so many steps.
        spectra_every: Take p, q and the decomposition of k, too, every so many steps; 0 for never.
        run: A folder to record to; docs/run-format.md specifies it. None keeps readings in memory only.
        resume: Continue the run in that folder, or begin it if there is none. The count of steps goes on after its last
            reading, unless `load_state_dict()` sets it.
        ignore_index: The label that does not count, where labels are seen among the forward's arguments.
        shift_labels: Whether the model shifts `labels` by one itself; None tells by its class, as Transformers names
            them: `...ForCausalLM` and `...LMHeadModel` do.
        settings: What else to record in run.json, for instance the training's hyperparameters.
        history: How many steps' readings to keep in memory.
        baseline: What `Monitor.verdict` compares LAR with: a `Baseline`, or a run to make one from, of the same set-up
            on data that does not repeat.
        regime: "grokking" or "decline" for one logic only, "both" for both, "auto" for the one that fits.
        thresholds: When the decline logic calls it what; those of the benchmark by default.
        mesh: The ranks that have tokens of their own, where the model's wrapper (DDP, `fully_shard`, DeepSpeed)
            does not say it: a process group, or the data- and context-parallel axes of a device mesh.
        vocabulary: How many rows of the unembedding stand for something, where it is padded beyond: the others are left
            out of W and of the logits.
        without_logits: How the energy of logits is had where a fused loss never forms them: "exact"; "sample", from 256
            random tokens of each forward, or the number of tokens, with standard errors in the reading; "auto" for
            exact where its cost, spread over `every` steps, is below 1 % of the layer's own forward and backward, or
            where a sample would cost more. So it is, too, where a layer returns something else than `W x + b`.
        main_call: Which call of the unembedding counts, from 0 on, where a forward calls it again on the same tokens to
            predict further ones (multi-token prediction); None for all calls, as of a loss that goes by chunks.
        trackers: Where to show every reading and the verdict, too: "tensorboard", "wandb", "mlflow", "csv", an object
            (a SummaryWriter, a run of W&B or MLflow, an Accelerator), or a list of them; docs/trackers.md has the
            names. One that fails is told of once and stops no training.
        revisits: How many samples to follow from visit to visit, for the drift of their loss (docs/revisits.md); 0 for
            none. They are known by their content, or by the ids that `step(samples=...)` gets.

    Returns:
        A Monitor; call its `step()` once per optimizer step. Weights are bit-identical with and without it. Which layer
        was taken, and why, is told to the logger "logalign", or on standard error where no logging is set up.

    Raises:
        InputError: an argument of the wrong type or value, or a baseline of another shape than the layer.
        SiteError: no such layer, no linear layer, fan-in 1, or the model is watched already.
        RunError: the folder holds a run and `resume` is False, or it is damaged or cannot be written; or there is no
            run to make the baseline from.
        MissingExtraError: PyTorch is not installed, or a tracker's package.

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
    """The journal: at the first of the ranks with its run folder and its trackers, at all with what is resumed.

    An error at the first rank is raised at all of them.
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
        except Exception as found:  # a tracker's own: no other rank may wait for this one
            ranks.share((None, LogAlignError(f"at the first rank: {type(found).__name__}: {found}")))
            raise
    past, error = ranks.share((past, error))
    if error is not None:
        raise error
    return Journal(None, past=past, **settings) if opened is None else opened


class Monitor:
    """What `watch()` returns: call `step()` once per optimizer step, and `close()` at the end (or use `with`)."""

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
        """The readings of the monitored steps so far, the latest last (as many as `history` says)."""
        return self._journal.readings

    @property
    def verdict(self) -> Verdict:
        """What the readings of the main layer show so far: healthy, approaching, overfitting, and so on.

        It is what `logalign.diagnose` says of the recorded run. Should the detector itself fail, it is "undecidable"
        from then on, with the error as its reason, after one warning.
        """
        return self._journal.verdict

    @property
    def next_is_monitored(self) -> bool:
        """Whether the step under way, the one that the next `step()` completes, is a monitored one."""
        return self._step % self._every == 0

    @property
    def sites(self) -> dict[str, dict[str, Any]]:
        """What is measured, by site: module, shapes, tied or not, bias, how it was found, where the mask comes from."""
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
        """Say that an optimizer step is complete; on monitored steps, take the reading of its forwards.

        Args:
            loss: The training loss of this step, recorded beside the reading; the mean of all that were passed since
                the reading before is recorded, too.
            lr: The learning rate.
            epoch: Passes over the data so far. It may be left out where samples come back as they were; a whole number
                that stands still during a pass is understood, too.
            samples: Ids of the rows of this step's forwards, in their order: whole numbers or text. They say which
                sample a row is where its content does not, as with augmented images. In every step or in none.
            losses: The loss of each row of this step's forwards, before the update: a tensor or numbers. For losses
                that are not seen otherwise. In every step or in none.
            **extra: Any other number to record, for instance `val_loss`.

        Returns:
            The readings of this step by site on monitored steps, else None. All that is passed but the loss is recorded
            on monitored steps only. It may be called before or after `optimizer.step()`: the reading is of the forward.

        Raises:
            InputError: a value that is no number, or a name that readings use themselves.
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
        """Say which tokens of the next forward count; labels among the forward's arguments are then not looked at.

        Args:
            mask: bool, of the shape of the tokens that reach the layer: its inputs' shape without the last axis. In a
                pipeline stage, of all micro-batches of the step.

        Raises:
            InputError: not a tensor of bool. A wrong shape is told by the forward.
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

        Call it where the loss is computed. Between monitored steps, and where gradients are off, it does nothing.
        Several calls in one step pool their tokens.

        Args:
            weight: [m, n] (out, in).
            inputs: [..., n].
            outputs: [..., m] if at hand, with the bias in it; without them their energy is taken from the rest.
            bias: [m].
            mask: [...] of bool, the tokens that count.
            site: The name that the reading gets.

        Raises:
            InputError: wrong shapes or dtypes, or the site's own forward ran in this step, too.
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
        """What a checkpoint has to keep so that `load_state_dict()` can go on; any rank's will do.

        Step, shapes of the layers, tokens seen, the losses and the visits of samples since the last reading (each
        rank's own; of losses a sum, null if it is not finite, and a count), samples, the detector's state. What changes
        its shape as the training goes on is text (JSON), so that a fresh monitor's state has the very same entries:
        `torch.distributed.checkpoint` loads into those that are there. `torch.save` and JSON can hold it, too.
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
        """Go on at the step of a checkpoint; readings in the run from that step on are superseded.

        The verdict goes on from the checkpoint's, or, in one that holds none, from the readings before that step.

        Raises:
            InputError: not a state that `state_dict()` gave, or one of other layers.
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
        """Take the hooks off and close the run log; safe to call twice."""
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
        """Add a loss to the mean under way: at once, for a replayed CUDA graph overwrites it, and without waiting."""
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
        """Take the visits of samples since the last reading, and give the fields of a reading that they make."""
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
        """Where a layer's inputs come from, if its own forward does not run."""
        return self._recorder.without_forward.described.get(site)

    def _describe(self) -> None:
        """Tell which layers are measured, once they are known, and where the mask comes from, when that changes."""
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
    """Layers with their shapes, in words."""
    return ", ".join(f"{label} {m} x {n}" for label, (m, n) in layers.items())
