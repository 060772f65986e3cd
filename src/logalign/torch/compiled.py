"""Compiled models: what a hook leaves in the code that torch.compile makes of it, and what that does when it runs.

Method: a hook that is traced leaves an operator in its place, opaque to the compiler. The operator runs outside the
compiled code, as plain Python on real tensors, and goes the way of the uncompiled hook. So there is no graph break, and
whether a step is monitored is asked at run time: no second graph is compiled for it. The alternative, to let the sums
themselves be traced, would save the operator's few microseconds, but needs one graph for monitored steps and one for
all others, and cannot reach what a step keeps in Python: masks, Gram matrices, what backward recomputes.

The operator claims to change a small tensor, the anchor: otherwise the compiler would drop it, for nothing reads what
it gives, or change its place among others.

Code that was traced once may run for another module, and when its monitor is long closed: to the compiler, two modules
of one class with as many hooks are the same. So the operator is handed a parameter of the module that it runs for, and
looks for the hook at the module whose parameter that is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")

_keys = itertools.count()
_hooks: WeakValueDictionary[int, TraceableHook] = WeakValueDictionary()
_hooks_found: WeakValueDictionary[tuple[int, str], TraceableHook] = WeakValueDictionary()  # by memory and kind
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # PyTorch 2.7 and later
_anchors = {CPU: torch.zeros(1)}


def as_written(function: Callable[..., None]) -> Callable[..., None]:
    """Mark a hook to run as it is written where the compiler would compile it by itself.

    It does so with the hooks of the outermost module, a graph for each. Inside of a module the hook is traced as ever.
    """
    frames = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):  # PyTorch before 2.7 has none, and compiles the hook
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    return function


class TraceableHook:
    """A hook at a module that may be compiled.

    Args:
        module: The module that it is at.
        model: The model that it is for; operators of one model stay in their order.
        kind: Tells hooks at one module apart.
    """

    def __init__(self, module: nn.Module, model: nn.Module, kind: str) -> None:
        self.key = next(_keys)
        self.module = module
        self.kind = kind
        _hooks[self.key] = self
        parameter = next(model.parameters(), None)
        self._device = CPU if parameter is None or parameter.is_meta else parameter.device
        if self._device not in _anchors:
            _anchors[self._device] = torch.zeros(1, device=self._device)

    @property
    def is_on(self) -> bool:
        """Whether there is anything to do now."""
        raise NotImplementedError

    def leave(self, module: nn.Module, *tensors: Tensor, name: str = "", number: int = 0) -> None:
        """Leave an operator in the code that is traced, for a forward with gradients; it calls `run()`.

        Nothing may be read here that changes while training goes on: the compiler would make it a condition of the
        code.
        """
        if _is_exporting():  # to where no monitor is
            return
        parameter = _parameter_of(module)
        plain = [tensor.detach() for tensor in tensors]
        torch.ops.logalign.hook(_anchors[self._device], parameter, plain, name, number, self.key, self.kind)

    def run(self, tensors: Sequence[Tensor], name: str, number: int) -> None:
        """Do what the hook is for; called by the operator with what `leave()` was given."""
        raise NotImplementedError

    def serves(self, address: int) -> bool:
        """Whether a parameter of its module is there in memory."""
        parameter = _parameter_of(self.module)
        return parameter is not None and parameter.data_ptr() == address


def _run(
    anchor: Tensor, parameter: Tensor | None, tensors: Sequence[Tensor], name: str, number: int, key: int, kind: str
) -> None:
    hook = _hooks.get(key)
    address = 0 if parameter is None else parameter.data_ptr()
    if address and (hook is None or not hook.serves(address)):
        hook = _hook_at(address, kind)
    if hook is not None and hook.is_on:
        hook.run(tensors, name, number)


def _hook_at(address: int, kind: str) -> TraceableHook | None:
    """The hook of a kind at the module that has its first parameter there in memory."""
    found = _hooks_found.get((address, kind))
    if found is None or not found.is_on or not found.serves(address):
        others = list(_hooks.values())
        found = next((other for other in others if other.kind == kind and other.is_on and other.serves(address)), None)
        if found is not None:
            _hooks_found[address, kind] = found
    return found


def _parameter_of(module: nn.Module) -> Tensor | None:
    """The first parameter of a module, to know it by; None where it has none whose memory tells."""
    for parameter in module.parameters():
        return parameter.detach() if type(parameter) in (nn.Parameter, Tensor) else None
    return None


# Under CUDA graphs the code is cut at the operator: in a replay no Python would run.
_unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
torch.library.define(
    "logalign::hook",
    "(Tensor(a!) anchor, Tensor? parameter, Tensor[] tensors, str name, SymInt number, int key, str kind) -> ()",
    tags=() if _unsafe is None else (_unsafe,),
)
torch.library.impl("logalign::hook", "default", _run)
torch.library.register_fake("logalign::hook", lambda *_: None)
