"""Sites: the measured layers of a model, and how each was found."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from logalign.common.head_names import HEADS_ANYWHERE, HEADS_AT_TOP
from logalign.errors import InputError, SiteError
from logalign.runs.reading import UNEMBEDDING
from logalign.torch.fused import own_head
from logalign.torch.linear import OBSERVE, LinearMap, is_loaded, kind, weight_of
from logalign.torch.megatron import megatron_map, shared_weight
from logalign.torch.module_map import linear_map

WRAPPERS = ("module", "_orig_mod", "model", "net", "network")
"""Attributes in which wrappers (DDP, torch.compile, the user's own) hold the model."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One measured linear layer.

    Attributes:
        label: Its name in readings: "unembedding", or the module's name.
        name: The module's name in the model.
        module: The layer.
        how: How it was found, in words.
        softmax: Whether its outputs are two or more logits, so that vocabulary-centering is defined.
        holder: The parent module and the layer's attribute name in it, or None for the model itself.
        tied_to: Names of other parameters that are the same tensor as its weight.
        vocabulary: How many of its rows count, or None for all. The others are padding.
        shared: Returns its weight, if the model passes it to the layer's forward.
    """

    label: str
    name: str
    module: nn.Module
    how: str
    softmax: bool
    holder: tuple[nn.Module, str] | None = None
    tied_to: tuple[str, ...] = ()
    vocabulary: int | None = None
    shared: Callable[[], Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the weight, with only the rows that count."""
        m, n = self.map.shape
        return (m if self.vocabulary is None else self.vocabulary), n

    @property
    def map(self) -> LinearMap:
        """The map that the layer computes now.

        Raises:
            SiteError: the layer has changed since it was found.
        """
        self._check_in_place()
        found = _map(self.module, self.name, self.shared)
        if found is None:
            raise SiteError(
                f"layer {self.name!r}: expected the linear layer that it was when watch() was called, found "
                f"{type(self.module).__name__} without a floating-point weight [m, n]; watch the model again"
            )
        return found

    def _check_in_place(self) -> None:
        """Refuse adapters around the layer or another layer in its place. Other wrappers are allowed."""
        if self.holder is None:
            return
        parent, attribute = self.holder
        now = getattr(parent, attribute, None)
        if now is self.module:
            return
        inside = isinstance(now, nn.Module) and any(part is self.module for part in now.modules())
        if not inside or _is_adapter(now):
            raise SiteError(
                f"layer {self.name!r}: expected the {kind(self.module)} that was there when watch() was called, found "
                f"{kind(now)} in its place; add adapters and change layers first, then watch the model"
            )

    def description(self) -> dict[str, Any]:
        """Its entry in run.json."""
        mapped = self.map
        m, n = mapped.shape
        return {
            "module": self.name,
            "kind": type(self.module).__name__,
            "how": self.how,
            "softmax": self.softmax,
            "tied_to": list(self.tied_to),
            "m": m,
            "n": n,
            "bias": mapped.bias is not None,
            "dtype": str(mapped.dtype).removeprefix("torch."),
            **({"weight": mapped.what} if mapped.what else {}),
        }

    def sentence(self) -> str:
        """A one-line summary."""
        mapped = self.map
        m, n = mapped.shape
        padding = "" if self.vocabulary is None else f" of which {self.vocabulary} count"
        bias = "with bias" if mapped.bias is not None else "no bias"
        tied = f", tied to {', '.join(self.tied_to)}" if self.tied_to else ""
        what = f", {mapped.what}" if mapped.what else ""
        place = f"'{self.name}'" if self.name else "the model itself"
        return (
            f"{self.label} = {place}, {type(self.module).__name__} {m} x {n}{padding}{what}, {bias}{tied}: {self.how}"
        )


@dataclass(frozen=True, kw_only=True)
class Found:
    """The sites of a model, and the candidates for an unembedding that is still unknown.

    Attributes:
        sites: The known sites.
        candidates: Linear layers. The last to run in the first forward is the unembedding.
        main: The label of the site that `Readings.main` gives.
        is_idle: Whether there is nothing to measure, as in a pipeline stage without the head.
    """

    sites: tuple[Site, ...] = ()
    candidates: tuple[Site, ...] = ()
    main: str = UNEMBEDDING
    is_idle: bool = False


def find_sites(model: nn.Module, layers: str | Sequence[str], *, vocabulary: int | None = None) -> Found:
    """Find the requested layers.

    Args:
        model: The network, wrapped or not.
        layers: "unembedding", the name of the unembedding module, or a list of module names, shell-style patterns
            and "unembedding". An empty list means none: the user passes all to `observe()`.
        vocabulary: How many rows of the unembedding count.

    Raises:
        InputError: `layers` is not text, or the unembedding has fewer rows than `vocabulary`.
        SiteError: no such module, a module that is not linear, no linear layer at all, or fan-in 1.
    """
    asked: Any = [layers] if isinstance(layers, str) else layers
    if not isinstance(asked, Sequence) or not all(isinstance(name, str) for name in asked):
        raise InputError(f"layers: expected a module name, a pattern or a list of them, found {layers!r}")
    rows: Any = vocabulary
    if rows is not None and (not isinstance(rows, int) or rows < 2):
        raise InputError(f"vocabulary: expected a number of rows of the unembedding, 2 at least, found {rows!r}")
    sites: list[Site] = []
    candidates: tuple[Site, ...] = ()
    for pattern in asked:
        if pattern == UNEMBEDDING:
            site = _find_unembedding(model)
            if site is None:
                candidates = tuple(_candidates(model))
            else:
                sites.insert(0, site)
        elif isinstance(layers, str):
            sites.append(_site(model, _only(model, pattern), label=UNEMBEDDING, how="named by the user", softmax=True))
        else:
            sites.extend(_matching(model, pattern))
    unembedding = [site.module for site in sites if site.label == UNEMBEDDING]
    unique: dict[str, Site] = {}
    for site in sites:
        if site.label == UNEMBEDDING or site.module not in unembedding:
            unique.setdefault(site.label, site)
    main = UNEMBEDDING if UNEMBEDDING in asked or isinstance(layers, str) or not unique else next(iter(unique))
    if vocabulary is not None:
        if UNEMBEDDING not in unique:
            raise InputError(
                f"vocabulary={vocabulary}: expected an unembedding that is known when watch() is called, found none; "
                "name it with layers='...'"
            )
        unique[UNEMBEDDING] = _without_padding(unique[UNEMBEDDING], vocabulary)
    return Found(sites=tuple(unique.values()), candidates=candidates, main=main)


def _without_padding(site: Site, vocabulary: int) -> Site:
    m, n = site.shape
    if vocabulary > m:
        raise InputError(f"vocabulary={vocabulary}: expected at most the rows of layer {site.name!r}, found {(m, n)}")
    return replace(site, vocabulary=vocabulary)


def _find_unembedding(model: nn.Module) -> Site | None:
    for owner in model.modules():
        getter = getattr(owner, "get_output_embeddings", None)
        if callable(getter):
            head = getter()
            name = next((name for name, module in model.named_modules() if module is head), None)
            # A container of several heads, or None, does not identify the head.
            if name is not None and not isinstance(head, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                how = f"{type(owner).__name__}.get_output_embeddings()"
                return _site(model, name, label=UNEMBEDDING, how=how, softmax=True)
    head = own_head(model)
    if head is not None:
        name = next(name for name, module in model.named_modules() if module is head)
        return _site(model, name, label=UNEMBEDDING, how="inside of the model's LinearCrossEntropyLoss", softmax=True)
    linears = [name for name, module in _layers(model) if name and _is_linear(module)]
    for known in (*HEADS_ANYWHERE, *HEADS_AT_TOP):
        named = [
            name
            for name in linears
            if (_bare(name) == known or (known in HEADS_ANYWHERE and name.endswith(f".{known}")))
        ]
        if len(named) == 1:
            return _site(model, named[0], label=UNEMBEDDING, how=f"the well-known name '{known}'", softmax=True)
    return None


def _candidates(model: nn.Module) -> Iterator[Site]:
    found = False
    for name, module in _layers(model):
        is_candidate = isinstance(module, nn.Linear) or (_is_adapter(module) and _is_linear(module))
        if is_candidate and (mapped := _map(module, name)) and mapped.shape[1] > 1:
            found = True
            how = "the last linear layer to run in the first forward"
            yield _site(model, name, label=UNEMBEDDING, how=how, softmax=True)
    if not found:
        kinds = sorted({type(module).__name__ for module in model.modules() if not list(module.children())})
        raise SiteError(
            f"{type(model).__name__}: expected a model with a linear layer, found none among {', '.join(kinds)}; name "
            f"the module whose weight is the unembedding with layers='...', or {OBSERVE}"
        )


def _only(model: nn.Module, name: str) -> str:
    names = [each for each, _ in model.named_modules() if fnmatchcase(each, name)]
    if len(names) > 1:
        raise SiteError(
            f"layers={name!r}: expected one module, found {len(names)} ({', '.join(names[:3])}, ...); "
            "pass a list to watch several layers"
        )
    return _existing(model, name, names)[0]


def _matching(model: nn.Module, pattern: str) -> Iterator[Site]:
    names = [name for name, _ in model.named_modules() if name and fnmatchcase(name, pattern)]
    names = _existing(model, pattern, names)
    if any(symbol in pattern for symbol in "*?["):
        outer = {name for name, _ in _layers(model)}
        names = [name for name in names if name in outer and _is_linear(model.get_submodule(name))]
        if not names:
            raise SiteError(f"layers={pattern!r}: expected linear layers, found that none of the matches is one")
    for name in names:
        yield _site(model, name, label=name, how=f"matches {pattern!r}", softmax=False)


def _existing(model: nn.Module, pattern: str, names: list[str]) -> list[str]:
    if names:
        return names
    linear = [name for name, module in _layers(model) if _is_linear(module)]
    near = difflib.get_close_matches(pattern, linear, n=3, cutoff=0.4) or linear[-3:]
    raise SiteError(
        f"layers={pattern!r}: expected a module of {type(model).__name__}, found none of that name; "
        f"near matches: {', '.join(near) or 'none, the model has no linear layer'}"
    )


def _site(model: nn.Module, name: str, *, label: str, how: str, softmax: bool) -> Site:
    module = model.get_submodule(name)
    shared = shared_weight(model, module)
    mapped = _map(module, name, shared)
    if mapped is None:
        weight = weight_of(module)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else "no weight"
        raise SiteError(
            f"layer {name!r}: expected a linear layer with a floating-point weight [m, n], found "
            f"{type(module).__name__} ({shape}); name a torch.nn.Linear, or {OBSERVE}"
        )
    m, n = mapped.shape
    if n < 2:
        raise SiteError(
            f"layer {name!r}: expected fan-in n of at least 2, found weight {mapped.shape}; log_n is undefined"
        )
    parent, _, attribute = name.rpartition(".")
    return Site(
        label=label,
        name=name,
        module=module,
        how=how,
        softmax=softmax and m > 1,
        holder=(model.get_submodule(parent), attribute) if name else None,
        tied_to=_tied_to(model, module, mapped.parameter),
        shared=shared,
    )


def _tied_to(model: nn.Module, module: nn.Module, weight: Tensor | None) -> tuple[str, ...]:
    """Names of parameters outside a layer that are the same tensor as its weight."""
    own = [name for name, other in model.named_modules(remove_duplicate=False) if other is module]
    return tuple(
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is weight and not any(name.startswith(f"{prefix}.".removeprefix(".")) for prefix in own)
    )


def _map(module: nn.Module, name: str, shared: Callable[[], Tensor] | None = None) -> LinearMap | None:
    try:
        found = megatron_map(module, shared) or linear_map(module)
    except SiteError as error:
        raise SiteError(f"layer {name!r}: {error}") from None
    if found is not None:
        found.name = name
    return found


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by name. An adapter and its wrapped layer are one."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module not in inside:
            yield name, module
            if _is_adapter(module):
                inside.update(module.modules())


def _is_adapter(module: object) -> bool:
    """Whether this is a PEFT wrapper around a layer."""
    return is_loaded(module, "peft.tuners.tuners_utils", "BaseTunerLayer") or is_loaded(
        module, "peft.utils.other", "AuxiliaryTrainingWrapper"
    )


def _is_linear(module: nn.Module) -> bool:
    """Whether a module seems to map [..., n] to [..., m] by a weight [m, n], judged before it runs."""
    try:
        return (megatron_map(module) or linear_map(module)) is not None
    except SiteError:
        return True  # not measurable: a request for this layer raises the reason


def _bare(name: str) -> str:
    parts: Iterable[str] = name.split(".")
    rest = list(parts)
    while len(rest) > 1 and rest[0] in WRAPPERS:
        rest = rest[1:]
    return ".".join(rest)
