"""Hooks that watch a model's forwards and leave the model unchanged.

Method: forward hooks, armed on monitored steps, add to a `Meter` while the tensors exist. The alternative, keeping the
tensors until the step ends, is simpler but measures logits that a loss has since overwritten in place. A
`SampleTracker` measures a few rows in every step.

A forward is training when the layer is in training mode and gradients are on. Activation checkpointing runs a layer
twice. The reentrant form runs it first without gradients, the other form with them. If the first run was recorded, the
recomputation inside backward is skipped. If not, the recomputation is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from logalign.errors import InputError, SiteError
from logalign.runs.reading import UNEMBEDDING
from logalign.torch.adapters import Adapted
from logalign.torch.calls import Calls
from logalign.torch.compiled import TraceableHook, as_written, bystanders, is_transformed
from logalign.torch.fused import OBSERVE, FusedLoss, LossCall, WithoutForward, hidden_state, is_same
from logalign.torch.linear import Dense, weight_of
from logalign.torch.masks import TokenMask, labels_among, positional_arguments
from logalign.torch.meter import Meter, Share
from logalign.torch.output_energy import Way
from logalign.torch.ranks import Ranks
from logalign.torch.rows import rows_among
from logalign.torch.samples import SampleTracker
from logalign.torch.sites import Found, Site

_watched: WeakSet[nn.Module] = WeakSet()


class HookRecorder:
    """The hooks of one model and the meters of its current monitored step.

    Args:
        model: The network.
        found: The model's sites, or the candidates for the unembedding.
        mask: The mask that selects the tokens that count.
        ranks: The ranks that measure the model together (default: this process alone).
        way: How to compute the output energy when a layer's own forward does not run (default: exactly).
        calls: Which calls of the unembedding within one forward count (default: all).
        samples: The tracker that measures the losses of samples (default: none).

    Attributes:
        is_trying: Returns whether a pipeline runs this forward only to infer shapes. It is not recorded.
        spectral: Whether to accumulate Gram matrices.
        meters: The sums of this step, by site.
        sites: The settled sites, by label.
        doubt: Why the layer chosen among candidates may not be the unembedding, or None.
        unstepped: How often a weight changed without a call of `take()` in between.
        is_idle: Whether there is nothing to measure, as in a pipeline stage without the head.
        skipped: Number of non-training forwards in this step that reached a site, by reason.

    Raises:
        SiteError: the model is already watched.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Found,
        mask: TokenMask,
        ranks: Ranks | None = None,
        way: Way | None = None,
        calls: Calls | None = None,
        samples: SampleTracker | None = None,
    ) -> None:
        self._armed = True
        self.samples = SampleTracker() if samples is None else samples
        self.is_trying: Callable[[], bool] | None = None
        self.ranks = Ranks() if ranks is None else ranks
        self.spectral = False
        self.meters: dict[str, Meter] = {}
        self.sites: dict[str, Site] = {site.label: site for site in found.sites}
        self.unstepped = 0
        self.skipped: dict[str, int] = {}
        self.mask = mask
        self.way = Way("exact") if way is None else way
        self.calls = Calls() if calls is None else calls
        self.is_idle = found.is_idle
        self._main = found.main
        self._observed: set[str] = set()
        self._recorded_outside_backward: dict[int, int] = {}
        self._versions: dict[str, int] = {}
        self._trial: dict[nn.Module, Meter] = {}
        self._candidates: dict[nn.Module, Site] = {site.module: site for site in found.candidates}
        self._guessed: Site | None = None
        self.doubt: str | None = None
        self._unfit: dict[nn.Module, torch.Size] = {}
        modules = [model, *(site.module for site in (*found.sites, *found.candidates))]
        for module in modules:
            if module in _watched:
                raise SiteError(
                    f"{type(module).__name__}: expected a model that is not watched yet, found one that is; "
                    "close the first monitor, or pass all layers to one watch()"
                )
        self._model = model
        self._bystanders: list[RemovableHandle] = []
        self._under_way: nn.Module | None = None  # the module whose forward began: the model, or a part with the head
        self.without_forward = WithoutForward(model, {site.label: site.module for site in found.sites if site.softmax})
        self._handles = [
            model.register_forward_pre_hook(_Before(self, model), with_kwargs=True),
            # This hook runs first, while sharded weights are whole.
            model.register_forward_hook(_After(self, model), prepend=True),
            *(
                body.module.register_forward_hook(_AtBody(self, body.module, label))
                for label, body in self.without_forward.bodies.items()
            ),
            *(
                loss.module.register_forward_hook(_AtLoss(self, loss), with_kwargs=True)
                for loss in self.without_forward.losses
            ),
        ]
        self._site_handles = [
            (site, site.module.register_forward_hook(hook, prepend=True, with_kwargs=True))
            for site, hook in (
                *((site, _AtSite(self, site, candidate=False)) for site in found.sites),
                *((site, _AtSite(self, site, candidate=True)) for site in found.candidates),
            )
        ]
        heads = [site.module for site in (*found.sites, *found.candidates) if site.softmax and site.label == found.main]
        for part in _parts_around(model, heads) if self.samples.is_on else ():
            self._handles += [
                part.register_forward_pre_hook(_BeforePart(self, part), with_kwargs=True),
                part.register_forward_hook(_AfterPart(self, part)),
            ]
        self._add_bystanders()
        _watched.update(modules)

    @property
    def armed(self) -> bool:
        """Whether forwards are recorded now."""
        return self._armed and not (self.is_trying is not None and self.is_trying())

    @armed.setter
    def armed(self, armed: bool) -> None:
        self._armed = armed

    @property
    def listens(self) -> bool:
        """Whether forwards are processed now, for recording or for sample losses."""
        return (self._armed or self.samples.is_on) and not (self.is_trying is not None and self.is_trying())

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(m, n) of each settled site."""
        return {label: site.shape for label, site in self.sites.items()}

    @property
    def device(self) -> torch.device:
        """The sums' device."""
        meter = next(iter(self.meters.values()), None)
        if meter is not None:
            return meter.device
        site = next(iter(self.sites.values()), None)
        return torch.device("cpu") if site is None else site.map.device

    def see(
        self, site: Site, inputs: Tensor, outputs: Any, *, targets: Tensor | None = None, compiled: bool = False
    ) -> None:
        """Measure the samples of a site's training forward, and record the forward in a monitored step."""
        if self.without_forward.is_late(site.label):
            self.meters.pop(site.label, None)
        if site.softmax and site.label == self._main:
            self.samples.measure(
                outputs,
                hidden=inputs,
                mapped=lambda: site.map,
                targets=targets,
                compiled=compiled,
                is_candidate=self._candidates.get(site.module) is site,
            )
        if self.armed:
            self.record(site, inputs, outputs)

    def record(self, site: Site, inputs: Tensor, outputs: Any) -> None:
        """Add a site's training forward to its meter."""
        mapped, tokens = site.map, inputs.shape[:-1]
        if isinstance(mapped, Dense) and isinstance(outputs, Tensor) and outputs.shape[:-1].numel() != tokens.numel():
            raise SiteError(
                f"layer {site.name!r}: expected outputs of as many tokens as inputs, found {tuple(inputs.shape)} and "
                f"{tuple(outputs.shape)}, as where each rank has a slice of the sequence; call monitor.observe(weight, "
                "inputs) with what belongs together"
            )
        inputs, outputs = mapped.seen(inputs, outputs)
        tokens = inputs.shape[:-1]
        local = self.ranks.locate(mapped, inputs, outputs, name=site.name, softmax=site.softmax, rows=site.vocabulary)
        m, n = local.weight.shape
        expected = (*local.inputs.shape[:-1], m)
        found = expected if local.outputs is None else tuple(local.outputs.shape)
        if local.inputs.shape[-1] != n or found != expected:
            raise SiteError(
                f"layer {site.name!r}: expected inputs [..., {n}] and outputs [..., {m}] of as many tokens for its "
                f"weight {(m, n)}, found {tuple(local.inputs.shape)} and {found}; it is no plain linear map, leave it "
                "out"
            )
        trial = self._candidates.get(site.module) is site
        meters: dict[Any, Meter] = self._trial if trial else self.meters
        key: Any = site.module if trial else site.label
        if not trial and site.label in self._observed:
            if site is self._guessed:
                self._drop_guess()
                return
            raise InputError(
                f"site {site.label!r}: measured by observe() and by its own forward in one step; "
                "name another site in observe()"
            )
        mask = self._mask_for(site, tokens, trial=trial)
        labels = None if mask is None or self.mask.current is None else self.mask.current.numel()
        if site.label == UNEMBEDDING and not self.calls.counts(key, tokens.numel(), labels=labels):
            return
        device = local.inputs.device
        meter = meters.pop(key, None) or self._meter(local.part, device, softmax=site.softmax)
        meters[key] = meter  # popped and put back, so that the last to run is last
        version = mapped.version
        if version is not None and self._versions.setdefault(site.name, version) != version:
            self._versions[site.name] = version
            self.unstepped += 1
        meter.add(local.weight, local.inputs, outputs=local.outputs, bias=local.bias, mask=mask)

    def record_loss(self, loss: FusedLoss, call: LossCall) -> None:
        """Add a call of a loss that multiplies by a layer's weight itself."""
        sites = (*self.sites.values(), *self._candidates.values())
        site = next((site for site in sites if is_same(weight_of(site.module), call.weight)), None)
        if site is None:
            self._skip(f"in {loss.name}, with another weight")
        elif not self._is_below_adapters(site) and self.is_training(site, gradients=True):
            counts = loss.counts(call.targets)
            if counts is not None and self.armed:
                self.mask.see_targets(counts, loss.source())
            self.without_forward.described[site.label] = f"the arguments of {loss.name}"
            targets = None if counts is None else loss.aligned(call.targets, counts, ignored=self.mask.ignore_index)
            self.see(site, call.inputs, None, targets=targets)

    def begin_forward(
        self, rows: Sequence[Tensor], attention: Tensor | None, name: str, labels: Tensor | None, last: int
    ) -> None:
        """Begin a forward of the model on these rows, with the labels that `labels_among` found."""
        self._under_way = self._model
        self.without_forward.begin()
        self.calls.begin()
        if self.armed:
            self.mask.take(name, labels, last)
        else:
            self.mask.last = last
        if self._model.training and not inside_backward():
            self.samples.begin(rows, attention, name, labels, last)

    def rows(
        self, positional: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return `rows_among`, or no rows if samples are not tracked or the arguments cannot be read."""
        if not self.samples.is_on:
            return [], None
        try:
            return rows_among(positional, args, kwargs)
        except Exception:  # from the user's containers
            return [], None

    def begin_part(self, part: nn.Module, positional: tuple[str, ...], args: Any, kwargs: Mapping[str, Any]) -> None:
        """Begin the forward of a model part, which may run alone, as in Lightning's `training_step()`."""
        if self._under_way is None and part.training and not inside_backward():
            self._under_way = part
            rows, attention = self.rows(positional, args, kwargs)
            name, labels, last = labels_among(positional, args, kwargs)
            self.samples.begin(rows, attention, name, labels, last)

    def part_over(self, part: nn.Module) -> None:
        """End a part."""
        if self._under_way is part:
            self._under_way = None

    def next_step(self, step: int) -> None:
        """End a step without a reading."""
        self._recorded_outside_backward.clear()
        self._under_way = None
        self.samples.next_step(step)

    def forward_over(self, *, compiled: bool = False) -> None:
        """End the model's forward, and measure layers with known inputs whose own forward did not run."""
        for label, hidden in self.without_forward.left().items():
            site = self.sites[label]
            inputs = self.without_forward.fits(label, hidden, n=site.shape[1], last=self.mask.last)
            if inputs is None or self._is_below_adapters(site):
                continue
            if self.is_training(site, gradients=True):
                self.see(site, inputs, None, compiled=compiled)
                self.without_forward.took(label)
        self.without_forward.end()
        self._under_way = None
        if self.armed:
            self.settle()
            self.mask.forward_over()
        self.calls.over()

    def _is_below_adapters(self, site: Site) -> bool:
        """Whether a loss that multiplies by the weight itself bypasses the weight's adapters."""
        if isinstance(site.map, Adapted):
            self._skip("in a loss that takes the weight without the adapters on it, which are not trained so")
            return True
        return False

    def _meter(self, part: Share, device: torch.device, *, softmax: bool = True) -> Meter:
        return Meter(part, device, spectral=self.spectral, softmax=softmax, way=self.way)

    def observe(self, label: str, weight: Tensor, inputs: Tensor, **rest: Tensor | None) -> None:
        """Add the user's tensors in place of a forward. The caller checks them."""
        if label in self.meters and label not in self._observed:
            if self._guessed is None or self._guessed.label != label:
                raise InputError(
                    f"site {label!r}: measured by its own forward and by observe() in one step; "
                    "name another site in observe()"
                )
            self._drop_guess()
        m, n = weight.shape
        meter = self.meters.get(label) or self._meter(self.ranks.whole((m, n)), inputs.device)
        if (meter.m, meter.n) != (m, n):
            raise InputError(
                f"site {label!r}: expected a weight of shape {(meter.m, meter.n)} as before in this step, "
                f"found {(m, n)}; name another site in observe()"
            )
        self._observed.add(label)
        self.meters[label] = meter
        meter.add(weight, inputs, **rest)

    def settle(self) -> bool:
        """Choose the last candidate that ran as the unembedding, and return whether there was one."""
        if not self._trial:
            return False
        module, meter = list(self._trial.items())[-1]
        site = self._candidates[module]
        # A layer that was also requested by name has one reading, the unembedding's.
        twice = [label for label, other in self.sites.items() if other.module is module]
        self.sites = {site.label: site} | {k: v for k, v in self.sites.items() if k not in twice}
        self.meters = {site.label: meter} | {k: v for k, v in self.meters.items() if k not in twice}
        self._guessed = site
        self.doubt = self._doubt(site)
        self._trial, self._candidates = {}, {}
        self._keep_hooks_of_sites()
        if module in self._unfit:
            self.mask.mismatch(self._unfit.pop(module))
        return True

    def _doubt(self, site: Site) -> str | None:
        """Name layers that did not run but fit the chosen layer's outputs, so may be the unembedding."""
        idle = [
            f"{other.name!r} ({other.shape[0]} x {other.shape[1]})"
            for module, other in self._candidates.items()
            if module not in self._trial and other.shape[1] == site.shape[0]
        ]
        if not idle:
            return None
        return (
            f"{site.label}: taken to be {site.name!r}, {site.how}, but {', '.join(idle[:3])} could follow it and did "
            "not run; if that is the unembedding, name it with watch(layers=...), and where a loss multiplies by its "
            f"weight itself, {OBSERVE}"
        )

    def take(self) -> Mapping[str, Meter]:
        """End the step: return its meters and reset."""
        meters, self.meters = self.meters, {}
        self._observed.clear()
        self._recorded_outside_backward.clear()
        self._versions.clear()
        self.unstepped = 0
        self.skipped = {}
        self.mask.step_over()
        self.without_forward.step_over()
        return meters

    def detach(self) -> None:
        """Remove all hooks. Safe to call twice."""
        if not self._handles:
            return
        for module in self._modules():
            _watched.discard(module)
        for handle in (*self._handles, *(handle for _, handle in self._site_handles)):
            handle.remove()
        self._handles, self._site_handles = [], []
        self._add_bystanders()

    @property
    def is_attached(self) -> bool:
        """Whether hooks are attached."""
        return bool(self._handles)

    def watches(self, site: Site) -> bool:
        """Whether this is still a site or a candidate."""
        listed = self.sites.get(site.label) is site or self._candidates.get(site.module) is site
        return listed and self.is_attached

    def is_training(self, site: Site, *, gradients: bool) -> bool:
        """Whether the current forward is training, and not backward's recomputation of a recorded one.

        Args:
            site: The site that runs.
            gradients: Whether gradients are on. PyTorch itself reports False inside compiled code.
        """
        self.without_forward.runs(site.label)
        in_backward = inside_backward()
        if not site.module.training:
            return self._skip("in eval mode")
        if not gradients:
            return self._skip("without gradients")
        recorded = self._recorded_outside_backward
        if in_backward and recorded.get(id(site), 0):
            recorded[id(site)] -= 1
            return False
        if not in_backward:
            recorded[id(site)] = recorded.get(id(site), 0) + 1
        return True

    def _skip(self, why: str) -> bool:
        if not self.armed:
            return False
        self.skipped[why] = self.skipped.get(why, 0) + 1
        return False

    def _mask_for(self, site: Site, tokens: torch.Size, *, trial: bool) -> Tensor | None:
        if not site.softmax:
            mask = self.mask.current
            return mask if mask is not None and mask.shape == tokens else None
        if not trial:
            return self.mask.of(tokens)
        # The site may not be the unembedding, and other layers may have other tokens.
        part = self.mask.part(tokens, caller=site.name)
        if part is None and self.mask.current is not None:
            self._unfit[site.module] = tokens
        return part

    def _drop_guess(self) -> None:
        """Drop the guessed unembedding, as the user passes it to `observe()`."""
        assert self._guessed is not None
        label = self._guessed.label
        self.sites = {name: site for name, site in self.sites.items() if name != label}
        if label not in self._observed:
            self.meters.pop(label, None)
        self._guessed = self.doubt = None
        self._keep_hooks_of_sites()

    def _keep_hooks_of_sites(self) -> None:
        before = self._modules()
        kept = [(site, handle) for site, handle in self._site_handles if self.sites.get(site.label) is site]
        for site, handle in self._site_handles:
            if self.sites.get(site.label) is not site:
                handle.remove()
        self._site_handles = kept
        self._add_bystanders()
        for module in before - self._modules():
            _watched.discard(module)

    def _add_bystanders(self) -> None:
        """Add inert hooks to the layers that the compiler may confuse with hooked ones."""
        for handle in self._bystanders:
            handle.remove()
        hooked = [site.module for site, _ in self._site_handles]
        self._bystanders = [
            module.register_forward_hook(Inert(), prepend=True) for module in bystanders(self._model, hooked)
        ]

    def _modules(self) -> set[nn.Module]:
        return {self._model, *(site.module for site, _ in self._site_handles)}


def _parts_around(model: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the model's submodules that contain one of these layers."""
    inside = set(layers)
    return [
        part
        for part in model.modules()
        if part is not model and part not in inside and any(each in inside for each in part.modules())
    ]


def inside_backward() -> bool:
    """Whether backward is running, where checkpointing runs layers again."""
    return torch._C._current_graph_task_id() != -1


class _Hook(TraceableHook):
    """A hook that becomes `Inert` when its module is copied or pickled."""

    def __init__(self, recorder: HookRecorder, module: nn.Module, kind: str) -> None:
        super().__init__(module, recorder._model, kind, recorder)
        self._recorder = recorder

    @property
    def is_attached(self) -> bool:
        """Whether the recorder still has its hooks."""
        return self._recorder.is_attached

    def __deepcopy__(self, memo: dict[int, Any]) -> Inert:
        return Inert()

    def __reduce__(self) -> tuple[type[Inert], tuple[()]]:
        return Inert, ()


class Inert:
    """A hook that does nothing, for unmeasured layers and for copies of a watched model."""

    def __call__(self, *_: Any, **__: Any) -> None:
        """Do nothing."""


class _AtSite(_Hook):
    def __init__(self, recorder: HookRecorder, site: Site, *, candidate: bool) -> None:
        super().__init__(recorder, site.module, "candidate" if candidate else "site")
        self._site = site

    @property
    def is_attached(self) -> bool:
        """Whether the layer is still a site or a candidate."""
        return self._recorder.watches(self._site)

    @as_written
    def __call__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                outputs = (output,) if isinstance(output, Tensor) else ()
                self.leave(module, args[0] if args else kwargs["input"], *outputs)
        elif not self._recorder.listens or is_transformed():
            return
        elif self._recorder.is_training(self._site, gradients=torch.is_grad_enabled()):
            self._recorder.see(self._site, args[0] if args else kwargs["input"], output)

    def run(self, tensors: Sequence[Tensor], name: str, number: int) -> None:
        """Record a compiled forward."""
        inputs, *outputs = tensors
        if self._recorder.is_training(self._site, gradients=True):
            self._recorder.see(self._site, inputs, outputs[0] if outputs else None, compiled=True)


class _Before(_Hook):
    def __init__(self, recorder: HookRecorder, model: nn.Module) -> None:
        super().__init__(recorder, model, "before")
        self._positional = recorder.mask.positional
        self._follows = recorder.samples.is_on  # the initial value: traced code must not depend on changing state

    @as_written
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():
            name, labels, last = labels_among(self._positional, args, kwargs)
            rows, attention = rows_among(self._positional, args, kwargs) if self._follows else ([], None)
            # The name marks absent tensors, so that the others can be told apart.
            tensors = [each for each in (labels, attention) if each is not None]
            names = f"{name or '-'} {'-' if attention is None else 'attention'}"
            self.leave(module, *tensors, *rows, name=names, number=last)
        elif self._recorder.listens and not is_transformed():
            name, labels, last = labels_among(self._positional, args, kwargs)
            self._recorder.begin_forward(*self._recorder.rows(self._positional, args, kwargs), name, labels, last)

    def run(self, tensors: Sequence[Tensor], name: str, number: int) -> None:
        """Take a compiled forward's labels and rows."""
        rows = list(tensors)
        labels, attention = (None if each == "-" else rows.pop(0) for each in name.split(" "))
        self._recorder.begin_forward(rows, attention, name.split(" ")[0].strip("-"), labels, number)


class _After(_Hook):
    def __init__(self, recorder: HookRecorder, model: nn.Module) -> None:
        super().__init__(recorder, model, "after")

    @as_written
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():
            self.leave(module)
        elif self._recorder.listens:
            self._recorder.forward_over()

    def run(self, tensors: Sequence[Tensor], name: str, number: int) -> None:
        """End a compiled forward."""
        self._recorder.forward_over(compiled=True)


class _AtPart:
    """A hook on a model part that contains the head, used if the model's own forward does not run.

    The hook does nothing in compiled code.
    """

    def __init__(self, recorder: HookRecorder, part: nn.Module) -> None:
        self._recorder = recorder
        self._positional = positional_arguments(part)

    def __deepcopy__(self, memo: dict[int, Any]) -> Inert:
        return Inert()

    def __reduce__(self) -> tuple[type[Inert], tuple[()]]:
        return Inert, ()


class _BeforePart(_AtPart):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        if self._recorder.samples.is_on and torch.is_grad_enabled() and not is_transformed():
            self._recorder.begin_part(module, self._positional, args, kwargs)


class _AfterPart(_AtPart):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._recorder.part_over(module)


class _AtBody(_Hook):
    """A hook on the body that feeds a head, used if the head's own forward does not run."""

    def __init__(self, recorder: HookRecorder, body: nn.Module, label: str) -> None:
        super().__init__(recorder, body, f"body of {label}")
        self._label = label

    @as_written
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():
            hidden = hidden_state(output)
            if hidden is not None:
                self.leave(module, hidden)
        elif self._recorder.listens:
            self._recorder.without_forward.keep(self._label, hidden_state(output))

    def run(self, tensors: Sequence[Tensor], name: str, number: int) -> None:
        """Clone the output, as compiled code may reuse memory, unless only samples need it and the head runs."""
        recorder = self._recorder
        if recorder.armed or not recorder.without_forward.has_run(self._label):
            recorder.without_forward.keep(self._label, tensors[0].clone())


class _AtLoss(_Hook):
    """A hook on a loss module that multiplies by a weight itself."""

    def __init__(self, recorder: HookRecorder, loss: FusedLoss) -> None:
        super().__init__(recorder, loss.module, "loss")
        self._loss = loss

    @as_written
    def __call__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():
            self.leave(module, *self._loss.call(args, kwargs))
        elif self._recorder.listens:
            self._recorder.record_loss(self._loss, self._loss.call(args, kwargs))

    def run(self, tensors: Sequence[Tensor], name: str, number: int) -> None:
        """Record a compiled loss."""
        self._recorder.record_loss(self._loss, LossCall(*tensors))
