"""Hooks: they watch a model's forwards, and do nothing else to it.

Method: forward hooks, armed only on monitored steps, that add to a `Meter` while the tensors are at hand. Keeping the
tensors until the step ends would be simpler, and would measure logits that a loss has since overwritten in place.

A forward is training when the layer is in training mode and gradients are on. Activation checkpointing runs a layer
twice: the reentrant form first without gradients, the other form with; so of a forward that was already recorded the
recomputation inside backward is skipped, and of one that was not, it is the one recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from logalign.errors import InputError, SiteError
from logalign.torch.masks import TokenMask
from logalign.torch.meter import Meter
from logalign.torch.sites import Found, Site

_watched: WeakSet[nn.Module] = WeakSet()


class Recorder:
    """The hooks of one model, and the meters of the monitored step under way.

    Args:
        model: The network.
        found: Its sites, or the candidates for the unembedding.
        mask: What tells which tokens count.

    Attributes:
        armed: Whether forwards are recorded now.
        spectral: Whether Gram matrices are, too.
        meters: The sums of this step, by site.
        sites: The sites that are settled, by label.
        unstepped: How often a weight was seen to change without a call of `take()` between.
        skipped: Forwards of this step that reached a site and were no training, by why.

    Raises:
        SiteError: the model is watched already.
    """

    def __init__(self, model: nn.Module, found: Found, mask: TokenMask) -> None:
        self.armed = True
        self.spectral = False
        self.meters: dict[str, Meter] = {}
        self.sites: dict[str, Site] = {site.label: site for site in found.sites}
        self.unstepped = 0
        self.skipped: dict[str, int] = {}
        self.mask = mask
        self._main = found.main
        self._observed: set[str] = set()
        self._recorded_outside_backward: dict[int, int] = {}
        self._versions: dict[str, int] = {}
        self._trial: dict[nn.Module, Meter] = {}
        self._candidates: dict[nn.Module, Site] = {site.module: site for site in found.candidates}
        self._guessed: Site | None = None
        self._unfit: dict[nn.Module, torch.Size] = {}
        modules = [model, *(site.module for site in (*found.sites, *found.candidates))]
        for module in modules:
            if module in _watched:
                raise SiteError(
                    f"{type(module).__name__}: expected a model that is not watched yet, found one that is; "
                    "close the first monitor, or pass all layers to one watch()"
                )
        self._model = model
        self._handles = [
            model.register_forward_pre_hook(_Before(self), with_kwargs=True),
            model.register_forward_hook(_After(self)),
        ]
        self._site_handles = [
            (site, site.module.register_forward_hook(_AtSite(self, site), prepend=True, with_kwargs=True))
            for site in (*found.sites, *found.candidates)
        ]
        _watched.update(modules)

    def record(self, site: Site, inputs: Tensor, outputs: Tensor) -> None:
        """Add a training forward of a site to its meter."""
        mapped = site.map
        m, n = mapped.shape
        if inputs.shape[-1] != n or outputs.shape[-1] != m:
            raise SiteError(
                f"layer {site.name!r}: expected inputs [..., {n}] and outputs [..., {m}] for its weight {(m, n)}, "
                f"found {tuple(inputs.shape)} and {tuple(outputs.shape)}; it is no plain linear map, leave it out"
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
        mask = self._mask_for(site, inputs.shape[:-1], trial=trial)
        meter = meters.pop(key, None) or Meter((m, n), inputs.device, spectral=self.spectral, softmax=site.softmax)
        meters[key] = meter  # popped and put back: the last to run stands last
        version = mapped.version
        if version is not None and self._versions.setdefault(site.name, version) != version:
            self._versions[site.name] = version
            self.unstepped += 1
        meter.add(mapped, inputs, outputs=outputs, bias=mapped.bias, mask=mask)

    def observe(self, label: str, weight: Tensor, inputs: Tensor, **rest: Tensor | None) -> None:
        """Add what the user hands over instead of a forward; checked by the caller."""
        if label in self.meters and label not in self._observed:
            if self._guessed is None or self._guessed.label != label:
                raise InputError(
                    f"site {label!r}: measured by its own forward and by observe() in one step; "
                    "name another site in observe()"
                )
            self._drop_guess()
        m, n = weight.shape
        meter = self.meters.get(label) or Meter((m, n), inputs.device, spectral=self.spectral)
        if (meter.m, meter.n) != (m, n):
            raise InputError(
                f"site {label!r}: expected a weight of shape {(meter.m, meter.n)} as before in this step, "
                f"found {(m, n)}; name another site in observe()"
            )
        self._observed.add(label)
        self.meters[label] = meter
        meter.add(weight, inputs, **rest)

    def settle(self) -> bool:
        """Choose the unembedding among the candidates: the last that ran. Whether one was chosen now."""
        if not self._trial:
            return False
        module, meter = list(self._trial.items())[-1]
        site = self._candidates[module]
        # A layer that was asked for by its name, too, has one reading: that of the unembedding.
        twice = [label for label, other in self.sites.items() if other.module is module]
        self.sites = {site.label: site} | {k: v for k, v in self.sites.items() if k not in twice}
        self.meters = {site.label: meter} | {k: v for k, v in self.meters.items() if k not in twice}
        self._guessed = site
        self._trial, self._candidates = {}, {}
        self._keep_hooks_of_sites()
        if module in self._unfit:
            self.mask.mismatch(self._unfit.pop(module))
        return True

    def take(self) -> Mapping[str, Meter]:
        """The step is over: its meters, and a clean slate."""
        meters, self.meters = self.meters, {}
        self._observed.clear()
        self._recorded_outside_backward.clear()
        self._versions.clear()
        self.unstepped = 0
        self.skipped = {}
        self.mask.step_over()
        return meters

    def detach(self) -> None:
        """Take every hook off; safe to call twice."""
        if not self._handles:
            return
        for module in self._modules():
            _watched.discard(module)
        for handle in (*self._handles, *(handle for _, handle in self._site_handles)):
            handle.remove()
        self._handles, self._site_handles = [], []

    def is_training(self, site: Site) -> bool:
        """Whether the forward under way is training, and not one already recorded that backward recomputes."""
        inside_backward = torch._C._current_graph_task_id() != -1
        if not site.module.training:
            return self._skip("in eval mode")
        if not torch.is_grad_enabled():
            return self._skip("without gradients")
        recorded = self._recorded_outside_backward
        if inside_backward and recorded.get(id(site), 0):
            recorded[id(site)] -= 1
            return False
        if not inside_backward:
            recorded[id(site)] = recorded.get(id(site), 0) + 1
        return True

    def _skip(self, why: str) -> bool:
        self.skipped[why] = self.skipped.get(why, 0) + 1
        return False

    def _mask_for(self, site: Site, tokens: torch.Size, *, trial: bool) -> Tensor | None:
        if not site.softmax:
            mask = self.mask.current
            return mask if mask is not None and mask.shape == tokens else None
        if not trial:
            return self.mask.of(tokens)
        # Whether it is the unembedding is not known yet, and other layers may have other tokens.
        part = self.mask.part(tokens, caller=site.name)
        if part is None and self.mask.current is not None:
            self._unfit[site.module] = tokens
        return part

    def _drop_guess(self) -> None:
        """The unembedding was only guessed, and the user hands it to `observe()`."""
        assert self._guessed is not None
        label = self._guessed.label
        self.sites = {name: site for name, site in self.sites.items() if name != label}
        if label not in self._observed:
            self.meters.pop(label, None)
        self._guessed = None
        self._keep_hooks_of_sites()

    def _keep_hooks_of_sites(self) -> None:
        before = self._modules()
        kept = [(site, handle) for site, handle in self._site_handles if self.sites.get(site.label) is site]
        for site, handle in self._site_handles:
            if self.sites.get(site.label) is not site:
                handle.remove()
        self._site_handles = kept
        for module in before - self._modules():
            _watched.discard(module)

    def _modules(self) -> set[nn.Module]:
        return {self._model, *(site.module for site, _ in self._site_handles)}


class _Hook:
    """A hook that stays behind when its module is copied or pickled: the copy gets one that does nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Inert:
        return Inert()

    def __reduce__(self) -> tuple[type[Inert], tuple[()]]:
        return Inert, ()


class Inert:
    """What copies and checkpoints of a watched model carry in place of a hook."""

    def __call__(self, *_: Any, **__: Any) -> None:
        """Do nothing."""


class _AtSite(_Hook):
    def __init__(self, recorder: Recorder, site: Site) -> None:
        self._recorder, self._site = recorder, site

    def __call__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        recorder = self._recorder
        if recorder.armed and recorder.is_training(self._site):
            inputs = args[0] if args else kwargs["input"]
            recorder.record(self._site, inputs, output)


class _Before(_Hook):
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._recorder.armed and torch.is_grad_enabled():
            self._recorder.mask.see(args, kwargs)


class _After(_Hook):
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._recorder.armed and torch.is_grad_enabled():
            self._recorder.settle()
            self._recorder.mask.forward_over()
