"""Compiled models: the operator that a hook leaves in code traced by torch.compile.

Method: a traced hook leaves an operator in its place, opaque to the compiler. The operator runs outside the compiled
code, as plain Python on real tensors, and does what the uncompiled hook does. So there is no graph break. The operator
checks at run time if a step is monitored, so no second graph is compiled. The alternative is to trace the sums
themselves. It saves the operator's few microseconds, but needs one graph for monitored steps and one for all others. It
also cannot reach what a step keeps in Python: masks, Gram matrices, what backward recomputes.

The operator declares that it mutates a small tensor, the anchor. Otherwise the compiler would drop or reorder it,
because nothing reads its result.

Code traced for one module may run for another: the compiler does not tell modules of one class with equally many hooks
apart, such as a model's blocks compiled one by one. So the traced code must be the same for all of them. The operator
gets a parameter of the module that it runs for, and calls the hook at the module with that parameter. The compiler may
reuse the code of a module without a hook for one with a hook, but not the reverse: a watched block may run the code of
an unwatched one. So unwatched blocks get a hook, too, which does nothing.

The operator's inputs must be in memory. Inputs and outputs of a matrix product are. If the same code casts logits to
float32, inductor may keep those for backward in place of the narrower ones that the operator reads. That takes 2 bytes
more per logit (PyTorch 2.13).
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
    """The owner of hooks, which run only while it listens."""

    @property
    def listens(self) -> bool:
        """Whether the owner listens to forwards."""


def as_written(function: Callable[..., None]) -> Callable[..., None]:
    """Mark a hook to run uncompiled where the compiler would compile it by itself.

    The compiler does so with the outermost module's hooks, one graph each. It traces hooks inside a module as before.
    """
    frames = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):  # older PyTorch has none, and compiles the hook
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    return function


def is_transformed() -> bool:
    """Whether a forward is transformed: traced to TorchScript, or under `torch.func.vmap`.

    Its tensors lack the layer's shapes, or operations on them would become part of the program.
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
        module: The module with the hook.
        model: The model with the module. Operators of one model keep their order.
        kind: Distinguishes hooks at one module.
        owner: The hook's owner.
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
        """Whether the hook is still at its module."""
        raise NotImplementedError

    def run(self, tensors: Sequence[Tensor], name: str, number: int) -> None:
        """Process one forward. The operator calls this with the arguments of `leave()`."""
        raise NotImplementedError

    def leave(self, module: nn.Module, *tensors: Tensor, name: str = "", number: int = 0) -> None:
        """Leave an operator that calls `run()` in the traced code, for a forward with gradients.

        Every value read here becomes a guard of the code. So this method reads nothing that changes during training or
        differs between modules that could share code.
        """
        if _is_exporting():  # no monitor there
            return
        parameter = None if self._by_key else _parameter_of(module)
        key = -1 if parameter is not None else self._key
        known_by = None if parameter is None else parameter.detach()
        plain = [_part(tensor.detach()) for tensor in tensors]
        torch.ops.logalign.hook(_anchors[self._device], known_by, plain, name, number, key, self.kind)


def bystanders(model: nn.Module, hooked: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules without a hook that may share compiled code with hooked ones, in blocks of the same class."""
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
    """The hook of a kind at the module whose parameter has this address."""

    def is_it(hook: TraceableHook) -> bool:
        parameter = _parameter_of(hook.module) if hook.kind == kind else None
        return parameter is not None and parameter.data_ptr() == address and hook.is_attached

    found = _hooks_found.get((address, kind))
    if found is None or not is_it(found):  # memory is reused
        found = next(filter(is_it, list(_hooks.values())), None)
        if found is not None:
            _hooks_found[address, kind] = found
    return found


def _first(module: nn.Module) -> Tensor | None:
    return next(module.parameters(), None)


def _parameter_of(module: nn.Module) -> Tensor | None:
    """A module's first parameter, to identify it, or None if its memory cannot identify it."""
    parameter = _first(module)
    return parameter if type(parameter) in (nn.Parameter, Tensor) else None


def _part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, because custom operators take no DTensor."""
    part: Tensor = tensor.to_local() if type(tensor).__name__ == "DTensor" else tensor  # type: ignore[attr-defined]
    return part


# CUDA graphs are split at the operator, because a replay runs no Python.
_unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
torch.library.define(
    "logalign::hook",
    "(Tensor(a!) anchor, Tensor? parameter, Tensor[] tensors, str name, SymInt number, int key, str kind) -> ()",
    tags=() if _unsafe is None else (_unsafe,),
)
torch.library.impl("logalign::hook", "default", _run)
torch.library.register_fake("logalign::hook", lambda *_: None)
