"""Loss masks: which tokens of a forward count, from the forward's labels or from the user.

A mask has the tokens' shape and is true where a token counts. Labels of a causal language model in Transformers are
unshifted: position t counts if `labels[t + 1]` does.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from logalign.errors import InputError

LOSS_MASK = "loss_mask"
"""An argument that marks ignored tokens with 0 and overrides the labels."""
TARGETS = ("shift_labels", "labels", "targets")
LABELS = (LOSS_MASK, *TARGETS)
SHIFTING_CLASSES = re.compile(r"(ForCausalLM|LMHeadModel|DoubleHeadsModel)$")
NO_MASK = "none seen: every token counts"
WRAPPER_ATTRIBUTES = ("module", "_orig_mod")


class TokenMask:
    """The mask of the current forward.

    Args:
        model: The model, which gives its forward's arguments and whether it shifts labels.
        ignore_index: The label that does not count.
        shift_labels: Whether the model shifts labels by one. None infers it from a Transformers class name.

    Attributes:
        ignore_index: The label that does not count.
        shifts: Whether the model shifts labels by one.
        positional: The positional argument names of the model's forward.
        micro_batches: Whether the user's mask covers a whole step, whose forwards take consecutive sequences.
    """

    def __init__(self, model: nn.Module, *, ignore_index: int, shift_labels: bool | None) -> None:
        self.source = NO_MASK
        self.ignore_index = ignore_index
        self.shifts = shifts_labels(model) if shift_labels is None else shift_labels
        self.positional = positional_arguments(model)
        self.last = 0  # number of last tokens with logits in this forward, 0 for all, -1 if unknown
        self._mask: Tensor | None = None
        self._given = False  # by the user
        self._waiting = False  # for the forward that it belongs to
        self._cursors: dict[str, int] = {}
        self.micro_batches = False
        self._rows = (0, 0)  # where this micro-batch and the next begin in the user's mask

    @property
    def was_seen(self) -> bool:
        """Whether any mask has been seen so far."""
        return self.source != NO_MASK

    @property
    def current(self) -> Tensor | None:
        """The mask of the whole forward, or None."""
        return self._mask

    def give(self, mask: Tensor) -> None:
        """Take the user's mask for the next forward.

        Raises:
            InputError: not a bool tensor.
        """
        dtype = getattr(mask, "dtype", type(mask).__name__)
        if dtype != torch.bool:
            raise InputError(f"mask: expected a tensor of bool, found {dtype}; compare it first, as in mask != 0")
        self._mask, self._cursors, self._rows = mask.detach(), {}, (0, 0)
        self._given = self._waiting = True
        self.source = "monitor.mask()"

    def see(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Read labels from a forward's arguments, unless the user gave a mask for it."""
        self.take(*labels_among(self.positional, args, kwargs))

    def take(self, name: str, labels: Tensor | None, last: int) -> None:
        """Take what `labels_among` found."""
        self._cursors, self.last = {}, last
        if self._waiting:
            return
        self._mask, self._given = None, False
        if name == LOSS_MASK and labels is not None:
            self._mask, self.source = labels.detach() != 0, f"forward argument '{name}' != 0"
            return
        if labels is None or labels.is_floating_point():
            return
        targets = aligned(name, labels.detach(), last, shifts=self.shifts, ignored=self.ignore_index)
        shifted = is_shifted(name, labels, shifts=self.shifts)
        self._mask = targets != self.ignore_index
        self.source = f"forward argument '{name}' != {self.ignore_index}" + (", shifted by one" if shifted else "")

    def see_targets(self, counts: Tensor, source: str) -> None:
        """Take the mask from a loss's own arguments, unless the user gave a mask."""
        if not self._given:
            self._mask, self._cursors, self.source = counts, {}, source

    def of(self, tokens: torch.Size) -> Tensor | None:
        """Return the mask for a layer call on tokens of this shape, or None if every token counts.

        Calls on consecutive chunks of the sequence get consecutive chunks of the mask.

        Raises:
            InputError: the user's mask has a different number of tokens.
        """
        part = self.part(tokens)
        if part is None and self._mask is not None:
            self.mismatch(tokens)
        return part

    def part(self, tokens: torch.Size, *, caller: str = "") -> Tensor | None:
        """Act as `of` for one of several layers, each with its own place, or return None if the mask does not fit."""
        mask = self._mask
        if mask is None or mask.shape == tokens:
            return mask
        if self.micro_batches and self._given and mask.ndim == len(tokens) and mask.shape[1:] == tokens[1:]:
            begin = self._rows[0]
            self._rows = (begin, begin + tokens[0])
            return mask[slice(*self._rows)] if self._rows[1] <= mask.shape[0] else None
        if mask.numel() == tokens.numel() and not _is_turned(mask.shape, tokens):
            return mask.reshape(tokens)
        flat = mask.reshape(-1) if len(tokens) == 1 else mask
        start = self._cursors.get(caller, 0)
        end = start + (tokens[-1] if tokens else 1)
        if flat.shape[:-1] != tokens[:-1] or end > flat.shape[-1]:
            return None
        self._cursors[caller] = end
        return flat[..., start:end]

    def forward_over(self) -> None:
        """End the forward. Its recomputation in backward or a later call of the head still gets its mask."""
        self._rows = (self._rows[1], self._rows[1])
        self._waiting = self._given and self._mask is not None and 0 < self._rows[0] < self._mask.shape[0]
        self._cursors = {}

    def step_over(self) -> None:
        """End the step."""
        self._mask, self._cursors = None, {}
        self._given = self._waiting = False

    def mismatch(self, tokens: torch.Size) -> None:
        """Report that the mask does not fit the tokens.

        Raises:
            InputError: the mask is the user's.
        """
        assert self._mask is not None
        shape = tuple(self._mask.shape)
        if self._given:
            raise InputError(
                f"mask: expected one value for each of the tokens {tuple(tokens)} that reach the layer, "
                f"found shape {shape}"
            )
        self.source = f"none: labels of shape {shape} do not match the tokens {tuple(tokens)}, every token counts"


def is_shifted(name: str, labels: Tensor, *, shifts: bool) -> bool:
    """Whether position t of these labels is the target of position t - 1."""
    return name == "labels" and shifts and labels.ndim > 1


def aligned(name: str, labels: Tensor, last: int, *, shifts: bool, ignored: int) -> Tensor:
    """Return one target per token with logits, from labels shifted as the model does and cut to the last `last`.

    Args:
        name: The labels' name among the forward's arguments.
        labels: Integers [...].
        last: The number of last tokens with logits, 0 for all.
        shifts: Whether the model shifts `labels` by one.
        ignored: The label that does not count. The last token gets it if labels are shifted.
    """
    if is_shifted(name, labels, shifts=shifts):
        labels = torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], ignored)], dim=-1)
    return labels[..., -last:] if last > 0 and labels.ndim > 1 else labels


def _is_turned(one: torch.Size, other: torch.Size) -> bool:
    """Whether two shapes have the same axes in another order, like [b, s] and [s, b], so a reshape mixes tokens."""
    return one != other and sorted(one) == sorted(other) and sum(length > 1 for length in one) > 1


def positional_arguments(model: nn.Module) -> tuple[str, ...]:
    """Return the positional argument names of the unwrapped model's forward."""
    try:
        parameters = inspect.signature(_unwrapped(model).forward).parameters.values()
    except ValueError:  # from a built-in function
        return ()
    return tuple(each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD))


def labels_among(
    positional: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, Tensor | None, int]:
    """Find the name and labels among a forward's arguments, and the number of last tokens with logits.

    Without labels they are "" and None. The number is 0 for all tokens, -1 if a tensor selects them. A compiled model
    traces this function.
    """
    # Too many arguments mean a wrapper with its own arguments.
    given = dict(zip(positional, args, strict=False)) if len(args) <= len(positional) else {}
    given = {**given, **kwargs}
    last = given.get("logits_to_keep")
    last = last if isinstance(last, int) else -1 if isinstance(last, Tensor) else 0
    for name in LABELS:
        labels = given.get(name)
        if isinstance(labels, Tensor):
            return name, labels, last
    return "", None, last


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model itself shifts its labels by one, inferred from its Transformers class name."""
    return any(SHIFTING_CLASSES.search(type(module).__name__) for module in model.modules())


def _unwrapped(model: nn.Module) -> nn.Module:
    for attribute in WRAPPER_ATTRIBUTES:
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module):
            return _unwrapped(inner)
    return model
