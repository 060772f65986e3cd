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
from logalign.torch.sites import Found, Site, weight_of

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
        skipped: Forwards that reached a site and were no training, by why.

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
        self._recorded_outside_backward: dict[str, int] = {}
        self._versions: dict[str, int] = {}
        self._trial: dict[nn.Module, Meter] = {}
        self._candidates: dict[nn.Module, Site] = {site.module: site for site in found.candidates}
        modules = [model, *(site.module for site in (*found.sites, *found.candidates))]
        for module in modules:
            if module in _watched:
                raise SiteError(
                    f"{type(module).__name__}: expected a model that is not watched yet, found one that is; "
                    "close the first monitor, or pass all layers to one watch()"
                )
        self._model = model
        self._handles = [model.register_forward_pre_hook(_Before(self), with_kwargs=True)]
        for site in (*found.sites, *found.candidates):
            hook = _AtSite(self, site)
            self._handles.append(site.module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        self._handles.append(model.register_forward_hook(_After(self)))
        self._watched = modules
        _watched.update(modules)

    def record(self, site: Site, inputs: Tensor, outputs: Tensor) -> None:
        """Add a training forward of a site to its meter."""
        weight = weight_of(site.module)
        m, n = weight.shape
        if inputs.shape[-1] != n or outputs.shape[-1] != m:
            raise SiteError(
                f"layer {site.name!r}: expected inputs [..., {n}] and outputs [..., {m}] for its weight {(m, n)}, "
                f"found {tuple(inputs.shape)} and {tuple(outputs.shape)}; it is no plain linear map, leave it out"
            )
        trial = site.module in self._candidates
        meters: dict[Any, Meter] = self._trial if trial else self.meters
        key: Any = site.module if trial else site.label
        if not trial and site.label in self._observed:
            raise InputError(
                f"site {site.label!r}: measured by observe() and by its own forward in one step; "
                "name another site in observe()"
            )
        meter = meters.pop(key, None) or Meter(n, m, inputs.device, spectral=self.spectral)
        meters[key] = meter  # popped and put back: the last to run stands last
        version = weight._version
        if self._versions.setdefault(site.name, version) != version:
            self._versions[site.name] = version
            self.unstepped += 1
        mask = self.mask.of(inputs.shape[:-1]) if site.softmax or trial else self._fitting_mask(inputs)
        bias = getattr(site.module, "bias", None)
        meter.add(weight, inputs, outputs=outputs, bias=bias, mask=mask)

    def observe(self, label: str, weight: Tensor, inputs: Tensor, **rest: Tensor | None) -> None:
        """Add what the user hands over instead of a forward; checked by the caller."""
        if label in self.meters and label not in self._observed:
            raise InputError(
                f"site {label!r}: measured by its own forward and by observe() in one step; "
                "name another site in observe()"
            )
        self._observed.add(label)
        if label not in self.meters:
            m, n = weight.shape
            self.meters[label] = Meter(n, m, inputs.device, spectral=self.spectral)
        self.meters[label].add(weight, inputs, **rest)

    def settle(self) -> bool:
        """Choose the unembedding among the candidates: the last that ran. Whether one was chosen now."""
        if not self._trial:
            return False
        module, meter = list(self._trial.items())[-1]
        site = self._candidates[module]
        self.sites = {site.label: site, **self.sites}
        self.meters = {site.label: meter, **self.meters}
        self._trial, self._candidates = {}, {}
        kept = {other.module for other in self.sites.values()}
        remaining = []
        for handle, hooked in zip(self._handles[1:-1], self._watched[1:], strict=True):
            if hooked in kept:
                remaining.append((handle, hooked))
            else:
                handle.remove()
                _watched.discard(hooked)
        self._handles = [self._handles[0], *(handle for handle, _ in remaining), self._handles[-1]]
        self._watched = [self._model, *(hooked for _, hooked in remaining)]
        return True

    def take(self) -> Mapping[str, Meter]:
        """The step is over: its meters, and a clean slate."""
        meters, self.meters = self.meters, {}
        self._observed.clear()
        self._recorded_outside_backward.clear()
        self._versions.clear()
        self.unstepped = 0
        self.mask.done()
        return meters

    def detach(self) -> None:
        """Take every hook off; safe to call twice."""
        while self._handles:
            self._handles.pop().remove()
        for module in self._watched:
            _watched.discard(module)
        self._watched = []

    def is_training(self, site: Site) -> bool:
        """Whether the forward under way is training, and not one already recorded that backward recomputes."""
        inside_backward = torch._C._current_graph_task_id() != -1
        if not site.module.training:
            return self._skip("in eval mode")
        if not torch.is_grad_enabled():
            return self._skip("without gradients")
        recorded = self._recorded_outside_backward
        if inside_backward and recorded.get(site.name, 0):
            recorded[site.name] -= 1
            return False
        if not inside_backward:
            recorded[site.name] = recorded.get(site.name, 0) + 1
        return True

    def _skip(self, why: str) -> bool:
        self.skipped[why] = self.skipped.get(why, 0) + 1
        return False

    def _fitting_mask(self, inputs: Tensor) -> Tensor | None:
        mask = self.mask.current
        return mask if mask is not None and mask.shape == inputs.shape[:-1] else None


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
            self._recorder.mask.done()
