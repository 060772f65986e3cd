"""Compiled models: what a hook leaves in the code that torch.compile makes of it, and what that does when it runs.

Method: a hook that is traced leaves an operator in its place, opaque to the compiler. The operator runs outside the
compiled code, as plain Python on real tensors, and goes the way of the uncompiled hook. So there is no graph break, and
whether a step is monitored is asked at run time: no second graph is compiled for it. The alternative, to let the sums
themselves be traced, would save the operator's few microseconds, but needs one graph for monitored steps and one for
all others, and cannot reach what a step keeps in Python: masks, Gram matrices, what backward recomputes.

The operator claims to change a small tensor, the anchor: otherwise the compiler would drop it, for nothing reads what
it gives, or change its place among others.

Code that was traced once may run for another module: to the compiler, modules of one class with as many hooks are the
same, as the blocks of a model that are compiled one by one. So what is traced must be the same for all of them, and the
operator is handed a parameter of the module that it runs for: the hook that it calls is the one at the module whose
parameter that is. Modules without a hook are for the compiler the same as those with one, but not the other way round:
a block that is watched may run the code of one that is not. So the latter get a hook, too, which does nothing.

What the operator reads has to be in memory. Inputs and outputs of a matrix product are; but where logits are cast to
float32 in the same code, inductor may keep those for backward in place of the narrower ones that the operator reads,
2 bytes more for each logit (PyTorch 2.13).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")

_keys = itertools.count()
_owners: WeakSet[Owner] = WeakSet()
_hooks: WeakValueDictionary[int, TraceableHook] = WeakValueDictionary()
_hooks_found: WeakValueDictionary[tuple[int, str], TraceableHook] = WeakValueDictionary()  # by memory and kind
_anchors = {CPU: torch.zeros(1)}
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # older PyTorch has none


class Owner(Protocol):
    """Who hooks belong to: what they are for is done while it listens."""

    @property
    def listens(self) -> bool:
        """Whether it wants to know of forwards now."""


def as_written(function: Callable[..., None]) -> Callable[..., None]:
    """Mark a hook to run as it is written where the compiler would compile it by itself.

    It does so with the hooks of the outermost module, a graph for each. Inside of a module the hook is traced as ever.
    """
    frames = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):  # older PyTorch has none, and compiles the hook
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    return function


def is_transformed() -> bool:
    """Whether a forward is not run as it stands: traced to TorchScript, or under `torch.func.vmap`.

    Its tensors have not the layer's shapes, or what is done with them would become part of the program.
    """
    if torch._C._get_tracing_state() is not None:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    from torch._C._functorch import TransformType
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    return any(each.key() == TransformType.Vmap for each in retrieve_all_functorch_interpreters())


class TraceableHook:
    """A hook at a module that may be compiled.

    Args:
        module: The module that it is at.
        model: The model that it is for; operators of one model stay in their order.
        kind: Tells hooks at one module apart.
        owner: Who it belongs to.
    """

    def __init__(self, module: nn.Module, model: nn.Module, kind: str, owner: Owner) -> None:
        self.module = module
        self.kind = kind
        self.owner = owner
        self._key = next(_keys)
        self._by_key = False
        for hook in list(_hooks.values()):
            if hook.kind == kind and hook.is_attached and _first(hook.module) is _first(module):
                self._by_key = hook._by_key = True  # modules that share their first parameter
        first = _first(model)
        self._device = CPU if first is None or first.is_meta else first.device
        if self._device not in _anchors:
            _anchors[self._device] = torch.zeros(1, device=self._device)
        _hooks[self._key] = self
        _owners.add(owner)

    @property
    def is_attached(self) -> bool:
        """Whether its owner still wants it at its module."""
        raise NotImplementedError

    def run(self, tensors: Sequence[Tensor], name: str, number: int) -> None:
        """Do what the hook is for; called by the operator with what `leave()` was given."""
        raise NotImplementedError

    def leave(self, module: nn.Module, *tensors: Tensor, name: str = "", number: int = 0) -> None:
        """Leave an operator in the code that is traced, for a forward with gradients; it calls `run()`.

        What is read here becomes a condition of the code: nothing may be that changes while training goes on, or that
        differs between modules whose code could be the same.
        """
        if _is_exporting():  # to where no monitor is
            return
        parameter = None if self._by_key else _parameter_of(module)
        key = -1 if parameter is not None else self._key
        known_by = None if parameter is None else parameter.detach()
        plain = [_part(tensor.detach()) for tensor in tensors]
        torch.ops.logalign.hook(_anchors[self._device], known_by, plain, name, number, key, self.kind)


def bystanders(model: nn.Module, hooked: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules without a hook that the compiler may take for others that have one: those in blocks of the same class."""
    names = {module: name for name, module in model.named_modules()}
    by_class: dict[type[nn.Module], list[nn.Module]] = {}
    for module in names:
        by_class.setdefault(type(module), []).append(module)
    hooked = set(hooked)
    found: dict[nn.Module, None] = {}
    for module in hooked:
        path = names[module].split(".")
        for depth in range(1, len(path)):
            block = model.get_submodule(".".join(path[:depth]))
            for other in by_class[type(block)]:
                try:
                    twin = other.get_submodule(".".join(path[depth:]))
                except AttributeError:
                    continue
                if twin not in hooked:
                    found[twin] = None
    return list(found)


def _run(
    anchor: Tensor, parameter: Tensor | None, tensors: Sequence[Tensor], name: str, number: int, key: int, kind: str
) -> None:
    if not any(owner.listens for owner in _owners):
        return
    hook = _hooks.get(key) if parameter is None else _hook_at(parameter.data_ptr(), kind)
    if hook is not None and hook.owner.listens and hook.is_attached:
        hook.run(tensors, name, number)


def _hook_at(address: int, kind: str) -> TraceableHook | None:
    """The hook of a kind at the module whose parameter is there in memory."""

    def is_it(hook: TraceableHook) -> bool:
        parameter = _parameter_of(hook.module) if hook.kind == kind else None
        return parameter is not None and parameter.data_ptr() == address and hook.is_attached

    found = _hooks_found.get((address, kind))
    if found is None or not is_it(found):  # memory is used again
        found = next(filter(is_it, list(_hooks.values())), None)
        if found is not None:
            _hooks_found[address, kind] = found
    return found


def _first(module: nn.Module) -> Tensor | None:
    return next(module.parameters(), None)


def _parameter_of(module: nn.Module) -> Tensor | None:
    """The first parameter of a module, to know it by; None where it has none whose memory tells."""
    parameter = _first(module)
    return parameter if type(parameter) in (nn.Parameter, Tensor) else None


def _part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor: operators of one's own take none that is spread over ranks."""
    part: Tensor = tensor.to_local() if type(tensor).__name__ == "DTensor" else tensor  # type: ignore[attr-defined]
    return part


# Under CUDA graphs the code is cut at the operator: in a replay no Python would run.
_unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
torch.library.define(
    "logalign::hook",
    "(Tensor(a!) anchor, Tensor? parameter, Tensor[] tensors, str name, SymInt number, int key, str kind) -> ()",
    tags=() if _unsafe is None else (_unsafe,),
)
torch.library.impl("logalign::hook", "default", _run)
torch.library.register_fake("logalign::hook", lambda *_: None)
