"""Loss masks: which tokens of a forward count, from the labels that the forward was given or from the user.

A mask has the tokens' shape, true where a token counts. Labels of a causal language model in Transformers are
unshifted: position t counts by `labels[t + 1]`.
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
"""An argument that says itself what counts, with 0 for what does not, whatever the labels hold there."""
TARGETS = ("shift_labels", "labels", "targets")
LABELS = (LOSS_MASK, *TARGETS)
SHIFTING_CLASSES = re.compile(r"(ForCausalLM|LMHeadModel|DoubleHeadsModel)$")
NO_MASK = "none seen: every token counts"
WRAPPER_ATTRIBUTES = ("module", "_orig_mod")


class TokenMask:
    """The mask of the forward under way.

    Args:
        model: The model, to know its forward's arguments and whether it shifts labels.
        ignore_index: The label that does not count.
        shift_labels: Whether the model shifts labels by one; None to tell by its class, as Transformers names them.

    Attributes:
        ignore_index: The label that does not count.
        shifts: Whether the model shifts labels by one.
        positional: What the model's forward calls its positional arguments.
        micro_batches: Whether the user's mask is of a whole step, whose forwards take consecutive sequences of it.
    """

    def __init__(self, model: nn.Module, *, ignore_index: int, shift_labels: bool | None) -> None:
        self.source = NO_MASK
        self.ignore_index = ignore_index
        self.shifts = shifts_labels(model) if shift_labels is None else shift_labels
        self.positional = positional_arguments(model)
        self.last = 0  # of how many last tokens the forward under way keeps logits; 0 for all, -1 if it is not known
        self._mask: Tensor | None = None
        self._given = False  # by the user
        self._waiting = False  # for the forward that it was given for
        self._cursors: dict[str, int] = {}
        self.micro_batches = False
        self._rows = (0, 0)  # of the user's mask, that this micro-batch and the next begin at

    @property
    def was_seen(self) -> bool:
        """Whether any mask has been seen so far."""
        return self.source != NO_MASK

    @property
    def current(self) -> Tensor | None:
        """The mask of the whole forward, if there is one."""
        return self._mask

    def give(self, mask: Tensor) -> None:
        """Take the user's mask for the next forward.

        Raises:
            InputError: not a tensor of bool.
        """
        dtype = getattr(mask, "dtype", type(mask).__name__)
        if dtype != torch.bool:
            raise InputError(f"mask: expected a tensor of bool, found {dtype}; compare it first, as in mask != 0")
        self._mask, self._cursors, self._rows = mask.detach(), {}, (0, 0)
        self._given = self._waiting = True
        self.source = "monitor.mask()"

    def see(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look for labels in a forward's arguments, unless the user has given a mask for it."""
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
        """Take what a loss counts, from its own arguments, unless the user has given a mask."""
        if not self._given:
            self._mask, self._cursors, self.source = counts, {}, source

    def of(self, tokens: torch.Size) -> Tensor | None:
        """The mask for a call of the layer on tokens of this shape; None where every token counts.

        A layer that is called on consecutive chunks of the sequence gets consecutive chunks of the mask.

        Raises:
            InputError: the user's mask has another number of tokens.
        """
        part = self.part(tokens)
        if part is None and self._mask is not None:
            self.mismatch(tokens)
        return part

    def part(self, tokens: torch.Size, *, caller: str = "") -> Tensor | None:
        """As `of`, for one of several layers, each with its own place in the sequence; None where it does not fit."""
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
        """The forward is over; what backward recomputes of it, or a head called after it, still takes its mask."""
        self._rows = (self._rows[1], self._rows[1])
        self._waiting = self._given and self._mask is not None and 0 < self._rows[0] < self._mask.shape[0]
        self._cursors = {}

    def step_over(self) -> None:
        """The step is over."""
        self._mask, self._cursors = None, {}
        self._given = self._waiting = False

    def mismatch(self, tokens: torch.Size) -> None:
        """Say that the mask does not fit the layer's tokens.

        Raises:
            InputError: it is the user's own.
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
    """Whether position t of these labels stands for the prediction at t - 1."""
    return name == "labels" and shifts and labels.ndim > 1


def aligned(name: str, labels: Tensor, last: int, *, shifts: bool, ignored: int) -> Tensor:
    """Labels as one target for each token that has logits: shifted by one where the model does so, the last `last`.

    Args:
        name: What they are called among the forward's arguments.
        labels: Whole numbers [...].
        last: Of how many last tokens logits are kept; 0 for all.
        shifts: Whether the model shifts `labels` by one.
        ignored: The label that does not count, which the last token gets where they are shifted.
    """
    if is_shifted(name, labels, shifts=shifts):
        labels = torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], ignored)], dim=-1)
    return labels[..., -last:] if last > 0 and labels.ndim > 1 else labels


def _is_turned(one: torch.Size, other: torch.Size) -> bool:
    """Whether two shapes are the same axes in another order, as [b, s] and [s, b]: a reshape would mix up tokens."""
    return one != other and sorted(one) == sorted(other) and sum(length > 1 for length in one) > 1


def positional_arguments(model: nn.Module) -> tuple[str, ...]:
    """What the forward of the model, without its wrappers, calls its positional arguments."""
    try:
        parameters = inspect.signature(_unwrapped(model).forward).parameters.values()
    except ValueError:  # of a function that is built in
        return ()
    return tuple(each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD))


def labels_among(
    positional: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, Tensor | None, int]:
    """The labels among a forward's arguments, what they are called, and of how many last tokens logits are kept.

    No labels, an empty name, where there are none; 0 for all tokens, -1 where a tensor says which. It is traced where
    the model is compiled.
    """
    # More than the forward takes: a wrapper with arguments of its own.
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
    """Whether the model shifts its labels by one itself, told by its class as Transformers names it."""
    return any(SHIFTING_CLASSES.search(type(module).__name__) for module in model.modules())


def _unwrapped(model: nn.Module) -> nn.Module:
    for attribute in WRAPPER_ATTRIBUTES:
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module):
            return _unwrapped(inner)
    return model
