"""Adapters: the linear map of a layer that PEFT wraps, from its base weight and its active adapters.

The module to watch is the wrapper, because only its outputs include the adapters. Supported are LoRA (with
rank-stabilized scaling, its own bias, DoRA), (IA)^3, trainable tokens and `modules_to_save`. A merged adapter is in
the base weight. An inactive or disabled adapter does not count, as in the wrapper's own forward.

With dropout on a LoRA adapter, a training forward's logits are not a linear map of the inputs, because the adapter and
the base get different inputs. The library then measures the map itself, `W = W_base + s B A`, on the inputs before
dropout. W and the inputs give E_Z, as they give the other energies. The alternative, the energy of the actual logits,
includes dropout noise and is inconsistent: centering subtracts parts of E_Z computed from W and the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from logalign.errors import SiteError
from logalign.torch import linear
from logalign.torch.linear import LinearMap, version_of

Change = Callable[[Tensor, slice], Tensor]
"""Applies an adapter to some rows of W, given the rows and their slice."""


class Adapted(LinearMap):
    """A base map whose rows adapters change in turn.

    Args:
        base: The map without adapters.
        changes: The adapters' changes, in order.
        made_of: Their tensors.
        bias: b with theirs.
        exact: Whether the module returns `W x + b`.
        what: A label for W.
    """

    def __init__(
        self,
        base: LinearMap,
        changes: list[Change],
        *,
        made_of: list[Tensor],
        bias: Tensor | None,
        exact: bool,
        what: str,
    ) -> None:
        self.shape, self.dtype, self.device = base.shape, base.dtype, base.device
        self.parameter, self.bias, self.exact = base.parameter, bias, exact and base.exact
        self.what = f"{base.what}, {what}" if base.what else what
        own = version_of(*made_of)
        self.version = None if own is None or base.version is None else base.version + own
        self._base, self._changes = base, changes

    def blocks(self) -> Iterator[Tensor]:
        """Yield W in row blocks, in at least float32.

        Raises:
            SiteError: the base weight is split over ranks.
        """
        if linear.is_loaded(self.parameter, "torch.distributed.tensor", "DTensor"):
            raise self.error(
                f"expected an adapted weight that is whole when its layer runs, found a DTensor; {linear.OBSERVE}"
            )
        start = 0
        for block in self._base.blocks():
            rows = slice(start, start + block.shape[0])
            start = rows.stop
            block = block.to(torch.promote_types(block.dtype, torch.float32))
            for change in self._changes:
                block = change(block, rows)
            yield block


def adapted(module: Any, map_of: Callable[[nn.Module], LinearMap | None]) -> LinearMap | None:
    """Return the map of a PEFT module, or None if the wrapped module is not a linear layer.

    Raises:
        SiteError: the adapter or its variant is not supported.
    """
    from peft.tuners.ia3.layer import IA3Layer
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, ModulesToSaveWrapper):
        return map_of(_in_use(module))
    if isinstance(module, TrainableTokensWrapper):
        return adapted(module.token_adapter, map_of)
    base = map_of(module.base_layer if hasattr(module, "base_layer") else module.original_module)
    if base is None:
        return None
    # Only Linear forms: adapters for other layers or for bare parameters compute something else.
    is_linear = any(cls.__name__ in ("Linear", "Linear8bitLt", "Linear4bit") for cls in type(module).__mro__)
    if isinstance(module, LoraLayer) and is_linear:
        return _with_lora(module, base)
    if isinstance(module, IA3Layer) and is_linear:
        return _with_ia3(module, base)
    if isinstance(module, TrainableTokensLayer):
        return _with_tokens(module, base)
    raise SiteError(
        f"expected an adapter that is known (LoRA, DoRA, (IA)^3, trainable tokens, modules_to_save), found "
        f"{_name(module)}; {linear.OBSERVE}"
    )


def _in_use(wrapper: Any) -> nn.Module:
    """Return the copy trained in a module's place, or the module itself while adapters are disabled."""
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or active[0] not in wrapper.modules_to_save:
        original: nn.Module = wrapper.original_module
        return original
    copy: nn.Module = wrapper.modules_to_save[active[0]]
    return copy


def _with_lora(module: Any, base: LinearMap) -> LinearMap:
    active = _active(module, module.lora_A)
    if not active:
        return base
    changes: list[Change] = []
    made_of: list[Tensor] = []
    bias = None if base.bias is None else base.bias.detach()
    words, dropout = [], False
    for name in active:
        A, B, scaling = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach(), module.scaling[name]
        made_of += [module.lora_A[name].weight, module.lora_B[name].weight]
        magnitude = None
        variant = module.lora_variant.get(name)
        if variant is not None:
            if type(variant).__name__ != "DoraLinearVariant" or len(active) > 1:
                raise SiteError(
                    f"expected plain LoRA adapters, or a single one with DoRA, found adapter {name!r} of "
                    f"{type(variant).__name__} among {len(active)} that are active; {linear.OBSERVE}"
                )
            magnitude = module.lora_magnitude_vector[name].weight.detach()
            made_of.append(module.lora_magnitude_vector[name].weight)
        changes.append(_low_rank(A, B, scaling, magnitude))
        if module.lora_bias.get(name):
            own = scaling * module.lora_B[name].bias.detach()
            bias = own if bias is None else bias + own
        rate = getattr(module.lora_dropout[name], "p", 0.0)
        dropout |= rate > 0
        words.append(f"{name!r} of rank {A.shape[0]}" + (f" and dropout {rate:g}, left out" if rate > 0 else ""))
    dora = " with DoRA" if module.lora_variant else ""
    what = f"with LoRA{dora}: {', '.join(words)}"
    exact = not (dropout and module.training)
    return Adapted(base, changes, made_of=made_of, bias=bias, exact=exact, what=what)


def _low_rank(A: Tensor, B: Tensor, scaling: float, magnitude: Tensor | None) -> Change:
    """Return `W + s B A`. DoRA scales each row to its learned norm."""

    def change(block: Tensor, rows: slice) -> Tensor:
        block = torch.addmm(block, B[rows].to(block.dtype), A.to(block.dtype), alpha=scaling)
        if magnitude is None:
            return block
        norms: Tensor = torch.linalg.vector_norm(block, dim=1)
        return block * (magnitude[rows].to(block.dtype) / norms)[:, None]

    return change


def _with_ia3(module: Any, base: LinearMap) -> LinearMap:
    active = _active(module, module.ia3_l)
    if not active:
        return base
    made_of = [module.ia3_l[name] for name in active]
    scale = torch.stack([each.detach().flatten() for each in made_of]).prod(0)
    bias = None if base.bias is None else base.bias.detach()

    def inputs(block: Tensor, rows: slice) -> Tensor:
        return block * scale.to(block.dtype)

    def outputs(block: Tensor, rows: slice) -> Tensor:
        return block * scale[rows, None].to(block.dtype)

    if not module.is_feedforward and bias is not None:
        bias = bias * scale
    what = f"with (IA)^3: {', '.join(map(repr, active))} on its {'inputs' if module.is_feedforward else 'outputs'}"
    change = inputs if module.is_feedforward else outputs
    return Adapted(base, [change], made_of=made_of, bias=bias, exact=True, what=what)


def _with_tokens(module: Any, base: LinearMap) -> LinearMap:
    active = _active(module, module.trainable_tokens_delta)
    if not active:
        return base
    made_of = [module.trainable_tokens_delta[name] for name in active]
    changes = [_rows_of_tokens(module.token_indices[name], module.trainable_tokens_delta[name]) for name in active]
    count = sum(len(module.token_indices[name]) for name in active)
    # The wrapper's forward multiplies by W and adds no bias.
    return Adapted(base, changes, made_of=made_of, bias=None, exact=True, what=f"with {count} trainable rows")


def _rows_of_tokens(tokens: list[int], trained: Tensor) -> Change:
    """Replace some rows of W."""

    def change(block: Tensor, rows: slice) -> Tensor:
        own = [place for place, token in enumerate(tokens) if rows.start <= token < rows.stop]
        index = torch.tensor([tokens[place] - rows.start for place in own], dtype=torch.long, device=block.device)
        return block.index_copy(0, index, trained.detach()[own].to(block.dtype))

    return change


def _active(module: Any, own: Any) -> list[str]:
    """Return the adapters that the module's forward applies."""
    if module.disable_adapters or module.merged:
        return []
    return [name for name in module.active_adapters if name in own]


def _name(module: Any) -> str:
    """Return PEFT's name for the adapter type, as in `lora.Linear`."""
    where = type(module).__module__.removeprefix("peft.tuners.").removeprefix("peft.").removesuffix(".layer")
    return f"PEFT's {where}.{type(module).__name__}"
