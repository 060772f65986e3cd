"""Fused: layers whose forward never runs, for the loss multiplies by their weight itself, chunk by chunk.

Method: the inputs are taken where they still are. Inside of a model as Transformers builds them that is the output of
its body, whatever the loss is: Liger's, TRL's, or one of the user's own. A loss that is a module has inputs, weight and
targets as its arguments. A loss that is a plain function leaves no trace in the model; other people's functions are not
replaced here, so the user calls `Monitor.observe()`. The alternative, to look for a use of the weight among all
operations of a forward, would find that, too, at the price of a Python call for each of them and of a second graph of
each compiled model.
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
"""Losses that are modules, by package and class: the first arguments of their forward, in order, and what they are."""
IGNORE_INDEX = -100
"""The target that does not count where the loss does not say."""
OBSERVE = "call monitor.observe(weight, inputs, mask=labels != -100) beside it"
"""What the user can do about a loss that is a plain function."""


class Body(NamedTuple):
    """What computes the inputs of a head.

    Attributes:
        module: Its output is, or begins with, the last hidden state.
        name: Its name in the model.
    """

    module: nn.Module
    name: str

    def words(self) -> str:
        """For the line that says what is measured."""
        return f"the output of '{self.name}' ({type(self.module).__name__})"


def find_body(model: nn.Module, head: nn.Module) -> tuple[Body | None, str | None]:
    """The body of the model that the head belongs to; or None, and why not, where there might have been one.

    It is that of the innermost module whose `get_output_embeddings()` gives the head. Where other layers than the head
    are outside of it, its output need not be what the head gets.
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
    """The last hidden state in what a body gives: itself, an attribute, or the first of a tuple; None in another."""
    found = getattr(output, "last_hidden_state", None)
    if found is None:
        found = output[0] if isinstance(output, Sequence) and output else output
    return found if isinstance(found, Tensor) else None


class WithoutForward:
    """What is known of layers whose own forward may not run, in the forward under way.

    Args:
        model: The model.
        heads: The layers that give logits, by site.

    Attributes:
        bodies: What computes their inputs, by site, where that is known.
        losses: Losses in the model that multiply by a weight themselves.
        described: Where the inputs come from, in words, for sites whose own forward was seen not to run.
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
        """A forward of the model begins."""
        self._under_way = True
        self._hidden.clear()

    def keep(self, site: str, hidden: Tensor | None) -> None:
        """The body has run; outside of a forward of the model, what its output is for is not known."""
        if self._under_way and hidden is not None and site not in self._run_later:
            self._hidden[site] = hidden.detach()

    def runs(self, site: str) -> None:
        """The layer's own forward, or its loss, runs."""
        self._ran.add(site)
        self._hidden.pop(site, None)

    def has_run(self, site: str) -> bool:
        """Whether the layer's own forward, or its loss, was seen to run."""
        return site in self._ran

    def left(self) -> dict[str, Tensor]:
        """At the end of the model's forward: what the bodies gave of layers whose own forward did not run in it."""
        hidden, self._hidden = self._hidden, {}
        return hidden

    def end(self) -> None:
        """The forward of the model is over."""
        self._under_way = False

    def fits(self, site: str, hidden: Tensor, *, n: int, last: int) -> Tensor | None:
        """The inputs that the layer would have got: the last `last` tokens, or all; None where that cannot be told."""
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
        """The layer was measured in the forward that ends, from what its body gave."""
        self.described[site] = self.bodies[site].words()
        self._measured.add(site)

    def is_late(self, site: str) -> bool:
        """Whether the layer runs after the model's forward, in which it was taken not to run at all; from now on known.

        So it is where the user calls it, or its loss, on what the model's forward returned.
        """
        if self._under_way or site not in self._measured:
            return False
        self._measured.discard(site)
        self.described.pop(site, None)
        self._run_later.add(site)
        return True

    def step_over(self) -> None:
        """The step is over."""
        self._hidden.clear()
        self._measured.clear()

    def advice(self, site: str) -> str:
        """What to do where neither the layer nor anything in its place was seen to run."""
        unknown = f"; {self._unknown[site]} is not known here" if site in self._unknown else ""
        return f"where a fused loss takes the layer's place, {OBSERVE}{unknown}"


class LossCall(NamedTuple):
    """What a loss was called with.

    Attributes:
        weight: W [m, n].
        inputs: X [..., n].
        targets: [...], of whole numbers or, for probabilities, [..., m].
    """

    weight: Tensor
    inputs: Tensor
    targets: Tensor


class FusedLoss:
    """A module that computes a loss from inputs, weight and targets.

    Args:
        module: One that is known here.
    """

    def __init__(self, module: nn.Module) -> None:
        kind = _kind(module)
        assert kind is not None
        self.module = module
        self._names = LOSSES[kind]
        self.name = kind[1]

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> LossCall:
        """The arguments of its forward."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        tensors = {what: given[name] for name, what in self._names.items()}
        if "weight" not in tensors:
            tensors["weight"] = weight_of(self.module.get_submodule("linear"))
        return LossCall(**tensors)

    def counts(self, targets: Tensor) -> Tensor | None:
        """Which inputs count, of the targets' shape; None for targets that are probabilities.

        A loss that shifts its targets by one has them unshifted, as Transformers' labels are.
        """
        if targets.is_floating_point():
            return None
        ignored = getattr(self.module, "ignore_index", None)
        counts = targets.detach() != (IGNORE_INDEX if ignored is None else ignored)
        out_features = getattr(self.module, "out_features", ())
        if out_features:  # several targets to one input
            return counts.flatten(counts.ndim - len(out_features)).any(-1)
        shift = int(getattr(self.module, "shift", 0))
        if shift:
            counts = torch.cat([counts[..., shift:], torch.zeros_like(counts[..., :shift])], dim=-1)
        return counts

    def aligned(self, targets: Tensor, counts: Tensor, *, ignored: int) -> Tensor | None:
        """One target for each input, `ignored` where it does not count; None where there are several to one."""
        if targets.shape != counts.shape:
            return None
        shift = int(getattr(self.module, "shift", 0))
        if shift:
            targets = torch.cat([targets[..., shift:], torch.zeros_like(targets[..., :shift])], dim=-1)
        return torch.where(counts, targets.detach(), ignored)

    def source(self) -> str:
        """Where the mask comes from, in words."""
        return f"targets of {self.name}"


def find_losses(model: nn.Module) -> list[FusedLoss]:
    """All losses in a model that multiply by a weight themselves, as far as they are known here."""
    return [FusedLoss(module) for module in model.modules() if _kind(module) is not None]


def own_head(model: nn.Module) -> nn.Module | None:
    """The linear layer inside of the only loss that has one of its own, as that of PyTorch has."""
    losses = [module for module in model.modules() if _kind(module) == ("torch", "LinearCrossEntropyLoss")]
    return losses[0].get_submodule("linear") if len(losses) == 1 else None


def is_same(one: Any, other: Any) -> bool:
    """Whether two weights are the same memory."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return one is other or (one.shape == other.shape and one.data_ptr() == other.data_ptr() != 0)


def _kind(module: nn.Module) -> tuple[str, str] | None:
    kinds = ((each.__module__.partition(".")[0], each.__name__) for each in type(module).__mro__)
    return next((kind for kind in kinds if kind in LOSSES), None)
