"""Fused losses: layers whose forward never runs, because the loss itself multiplies by their weight in chunks.

Method: the inputs are taken where they still exist. In a Transformers model that is the output of its body, for any
loss: Liger's, TRL's, or the user's own. A loss module has inputs, weight and targets as its arguments. A loss that is a
plain function leaves no trace in the model. This module does not replace third-party functions, so the user calls
`Monitor.observe()`. The alternative, searching all operations of a forward for a use of the weight, also finds plain
functions. It costs a Python call for each operation and a second graph of each compiled model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from logalign.torch.linear import weight_of

LOSSES = {
    ("torch", "LinearCrossEntropyLoss"): {"input": "inputs", "target": "targets"},
    ("liger_kernel", "LigerFusedLinearCrossEntropyLoss"): {
        "lin_weight": "weight",
        "_input": "inputs",
        "target": "targets",
    },
    ("cut_cross_entropy", "LinearCrossEntropy"): {"e": "inputs", "c": "weight", "targets": "targets"},
}
"""Loss modules by package and class, with the first arguments of their forward in order and their roles."""
IGNORE_INDEX = -100
"""The ignored target if the loss does not define one."""
OBSERVE = "call monitor.observe(weight, inputs, mask=labels != -100) beside it"
"""Advice for a loss that is a plain function."""


class Body(NamedTuple):
    """The module that feeds a head.

    Attributes:
        module: Its output is, or begins with, the last hidden state.
        name: Its name in the model.
    """

    module: nn.Module
    name: str

    def words(self) -> str:
        """Describe the body in the summary line."""
        return f"the output of '{self.name}' ({type(self.module).__name__})"


def find_body(model: nn.Module, head: nn.Module) -> tuple[Body | None, str | None]:
    """Return the body that feeds the head, or None with the reason if one seemed to exist.

    The body belongs to the innermost module whose `get_output_embeddings()` gives the head. If layers other than the
    head are outside the body, its output may differ from the head's inputs.
    """
    owner = None
    for module in model.modules():
        getter = getattr(type(module), "get_output_embeddings", None)
        if callable(getter) and getter(module) is head:
            owner = module
    body = None if owner is None else _body_of(owner)
    if owner is None or body is None:
        return None, None
    names = {module: name for name, module in model.named_modules()}
    known = {*body.modules(), *head.modules()}
    if head in body.modules() or body not in names:
        return None, None
    others = [
        names[module]
        for module in owner.modules()
        if module not in known and module is not owner and next(module.parameters(recurse=False), None) is not None
    ]
    if others:
        return None, f"what {', '.join(repr(name) for name in others[:3])} make of the output of '{names[body]}'"
    return Body(body, names[body]), None


def _body_of(owner: nn.Module) -> nn.Module | None:
    for body in (getattr(owner, "base_model", None), getattr(owner, "get_decoder", lambda: None)()):
        if isinstance(body, nn.Module) and body is not owner:
            return body
    return None


def hidden_state(output: Any) -> Tensor | None:
    """Return the last hidden state of a body's output: the output, its attribute, its first item, or None."""
    found = getattr(output, "last_hidden_state", None)
    if found is None:
        found = output[0] if isinstance(output, Sequence) and output else output
    return found if isinstance(found, Tensor) else None


class WithoutForward:
    """Tracks layers whose own forward may not run in the current forward.

    Args:
        model: The model.
        heads: The layers that give logits, by site.

    Attributes:
        bodies: The bodies that compute their inputs, by site, if known.
        losses: Losses in the model that multiply by a weight themselves.
        described: The source of the inputs, in words, for sites whose own forward did not run.
    """

    def __init__(self, model: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        self.bodies: dict[str, Body] = {}
        self.losses = find_losses(model)
        self.described: dict[str, str] = {}
        self._unknown: dict[str, str] = {}
        self._under_way = False
        self._hidden: dict[str, Tensor] = {}
        self._measured: set[str] = set()
        self._run_later: set[str] = set()
        self._ran: set[str] = set()
        for site, head in heads.items():
            body, unknown = find_body(model, head)
            if body is not None:
                self.bodies[site] = body
            elif unknown is not None:
                self._unknown[site] = unknown

    def begin(self) -> None:
        """Begin a forward of the model."""
        self._under_way = True
        self._hidden.clear()

    def keep(self, site: str, hidden: Tensor | None) -> None:
        """Keep a body's output. Outside a forward of the model its purpose is unknown."""
        if self._under_way and hidden is not None and site not in self._run_later:
            self._hidden[site] = hidden.detach()

    def runs(self, site: str) -> None:
        """Note that the layer's forward or loss runs."""
        self._ran.add(site)
        self._hidden.pop(site, None)

    def has_run(self, site: str) -> bool:
        """Whether the layer's own forward or its loss has run."""
        return site in self._ran

    def left(self) -> dict[str, Tensor]:
        """Return, after the model's forward, the body outputs for layers whose own forward did not run."""
        hidden, self._hidden = self._hidden, {}
        return hidden

    def end(self) -> None:
        """End the forward of the model."""
        self._under_way = False

    def fits(self, site: str, hidden: Tensor, *, n: int, last: int) -> Tensor | None:
        """Return the layer's inputs: the last `last` tokens, or all. Return None if they are unknown."""
        body = self.bodies[site]
        if hidden.shape[-1] != n:
            self._unknown[site] = (
                f"how {body.words()}, which has {hidden.shape[-1]} features, becomes its inputs, which have {n}"
            )
            return None
        if last < 0:
            self._unknown[site] = "which tokens a tensor as logits_to_keep leaves"
            return None
        return hidden[..., -last:, :] if last else hidden

    def took(self, site: str) -> None:
        """Note that the layer was measured in this forward, from its body's output."""
        self.described[site] = self.bodies[site].words()
        self._measured.add(site)

    def is_late(self, site: str) -> bool:
        """Whether a layer measured from its body runs after the model's forward, which is then remembered.

        This happens if the user calls the layer or its loss on the output of the model's forward.
        """
        if self._under_way or site not in self._measured:
            return False
        self._measured.discard(site)
        self.described.pop(site, None)
        self._run_later.add(site)
        return True

    def step_over(self) -> None:
        """End the step."""
        self._hidden.clear()
        self._measured.clear()

    def advice(self, site: str) -> str:
        """Advise the user if neither the layer nor a replacement has run."""
        unknown = f"; {self._unknown[site]} is not known here" if site in self._unknown else ""
        return f"where a fused loss takes the layer's place, {OBSERVE}{unknown}"


class LossCall(NamedTuple):
    """The arguments of a loss.

    Attributes:
        weight: W [m, n].
        inputs: X [..., n].
        targets: Integers [...], or probabilities [..., m].
    """

    weight: Tensor
    inputs: Tensor
    targets: Tensor


class FusedLoss:
    """A module that computes a loss from inputs, weight and targets.

    Args:
        module: A loss in `LOSSES`.
    """

    def __init__(self, module: nn.Module) -> None:
        kind = _kind(module)
        assert kind is not None
        self.module = module
        self._names = LOSSES[kind]
        self.name = kind[1]

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> LossCall:
        """Return the arguments."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        tensors = {what: given[name] for name, what in self._names.items()}
        if "weight" not in tensors:
            tensors["weight"] = weight_of(self.module.get_submodule("linear"))
        return LossCall(**tensors)

    def counts(self, targets: Tensor) -> Tensor | None:
        """Return which inputs count, in the targets' shape, or None for probabilities.

        A loss that shifts its targets by one gets them unshifted, like Transformers' labels.
        """
        if targets.is_floating_point():
            return None
        ignored = getattr(self.module, "ignore_index", None)
        counts = targets.detach() != (IGNORE_INDEX if ignored is None else ignored)
        out_features = getattr(self.module, "out_features", ())
        if out_features:  # several targets per input
            return counts.flatten(counts.ndim - len(out_features)).any(-1)
        shift = int(getattr(self.module, "shift", 0))
        if shift:
            counts = torch.cat([counts[..., shift:], torch.zeros_like(counts[..., :shift])], dim=-1)
        return counts

    def aligned(self, targets: Tensor, counts: Tensor, *, ignored: int) -> Tensor | None:
        """Return one target per input, `ignored` if it does not count, or None if an input has several."""
        if targets.shape != counts.shape:
            return None
        shift = int(getattr(self.module, "shift", 0))
        if shift:
            targets = torch.cat([targets[..., shift:], torch.zeros_like(targets[..., :shift])], dim=-1)
        return torch.where(counts, targets.detach(), ignored)

    def source(self) -> str:
        """The mask's source, in words."""
        return f"targets of {self.name}"


def find_losses(model: nn.Module) -> list[FusedLoss]:
    """Return a model's losses that are in `LOSSES`, which multiply by a weight themselves."""
    return [FusedLoss(module) for module in model.modules() if _kind(module) is not None]


def own_head(model: nn.Module) -> nn.Module | None:
    """Return the linear layer inside the model's only PyTorch `LinearCrossEntropyLoss`."""
    losses = [module for module in model.modules() if _kind(module) == ("torch", "LinearCrossEntropyLoss")]
    return losses[0].get_submodule("linear") if len(losses) == 1 else None


def is_same(one: Any, other: Any) -> bool:
    """Whether two weights share their memory."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return one is other or (one.shape == other.shape and one.data_ptr() == other.data_ptr() != 0)


def _kind(module: nn.Module) -> tuple[str, str] | None:
    kinds = ((each.__module__.partition(".")[0], each.__name__) for each in type(module).__mro__)
    return next((kind for kind in kinds if kind in LOSSES), None)
