"""Rows: a hash of its content identifies each row's sample, computed on the device without synchronization.

Method: 64-bit integer arithmetic that wraps around mixes every element with its position in the row, and the results
are summed. The alternative is to have the user number the samples, which needs a change of the data loader. A sum over
elements does not depend on the order in which the device adds.

Zeros add nothing, so zero padding at the end of a row does not change its hash. If an attention mask or a padding token
is known, positions count only the other tokens, so padding in front does not matter either.

Shapes: B rows of a batch, L elements of a row.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

HIGHEST = 2**63 - 1
"""The highest hash, and the mask of the bits in use."""
LARGEST_ROW = 4096
"""Elements hashed per row, evenly spaced if it has more. Text rows are hashed in full."""
NOT_ROWS = frozenset(
    [
        "attention_mask",
        "loss_mask",
        "label",
        "labels",
        "target",
        "y",
        "shift_labels",
        "targets",
        "position_ids",
        "token_type_ids",
        "cache_position",
        "decoder_input_ids",
        "decoder_attention_mask",
        "inputs_embeds",
        "past_key_values",
        "logits_to_keep",
        "num_items_in_batch",
    ]
)
"""Arguments of a forward that do not identify a row's sample."""
TOKENS = "input_ids"
MASK = "attention_mask"

# Odd numbers without structure: multiples of the golden ratio's fraction, and digits of pi and e.
_VALUE, _PLACE, _STIR = (each - 2**64 for each in (0x9E3779B97F4A7C15, 0xC2B7E151628AED2B, 0xA0761D6478BD6429))
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def row_hashes(rows: Tensor, *, mask: Tensor | None = None, padding: int | None = None) -> Tensor:
    """Hash the rows of a batch [B, ...] to int64 [B], from 0 to 2**63 - 1.

    Args:
        rows: Tokens, images or features: integers, booleans or floating-point numbers.
        mask: Mask of the same shape, nonzero at tokens other than padding.
        padding: The padding token.
    """
    flat = rows.detach().reshape(rows.shape[0], -1)
    length = flat.shape[1]
    is_text = rows.ndim == 2 and flat.dtype in (torch.int64, torch.int32, torch.int16)
    if length > LARGEST_ROW and not is_text:
        flat = flat[:, torch.arange(LARGEST_ROW, device=flat.device) * length // LARGEST_ROW]
    if flat.is_floating_point() or flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).flatten(1) if flat.is_complex() else flat
        values = flat.contiguous().view(_BITS[flat.element_size()]).to(torch.int64)
    else:
        values = flat.to(torch.int64)
    counts = values != 0
    relative = False
    if mask is not None and is_text and mask.shape == rows.shape:
        counts, relative = counts & (mask.reshape(flat.shape) != 0), True
    if padding is not None and is_text:
        counts, relative = counts & (values != padding), True
    first, end = 1, values.shape[1] + 1
    places = counts.cumsum(1) if relative else torch.arange(first, end, device=values.device)
    mixed = values * _VALUE + places * _PLACE
    mixed = (mixed ^ _shifted(mixed, 29)) * _STIR
    return mixed_up(torch.where(counts, mixed, mixed.new_zeros(())).sum(1))


def joined_hashes(tensors: Sequence[Tensor], *, mask: Tensor | None = None, padding: int | None = None) -> Tensor:
    """Hash rows made of the rows of several tensors to [B], like `row_hashes` for one tensor.

    Args:
        tensors: Tensors with B rows each. The first may have a mask or padding.
        mask: See `row_hashes`.
        padding: See `row_hashes`.
    """
    found = row_hashes(tensors[0], mask=mask, padding=padding)
    for i, tensor in enumerate(tensors[1:], 1):
        found = mixed_up(found + row_hashes(tensor) * (2 * i + 1))
    return found


def mixed_up(numbers: Tensor) -> Tensor:
    """Scramble integers [...] one by one to hashes from 0 to 2**63 - 1, equal ones to equal hashes."""
    mixed = numbers.to(torch.int64) + _PLACE
    for shift, factor in ((30, _VALUE), (27, _STIR)):
        mixed = (mixed ^ _shifted(mixed, shift)) * factor
    return (mixed ^ _shifted(mixed, 31)) & HIGHEST


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros, as for unsigned integers."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)


def rows_among(
    positional: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[Tensor], Tensor | None]:
    """The tensors among a forward's arguments whose rows make up a sample, and the attention mask.

    The first is `input_ids`, else the first integer matrix, else the first tensor. All others with as many rows belong
    to the sample, too, except labels, masks and the like. Compiled models trace it.
    """
    named: list[tuple[str, Any]] = [
        (positional[i] if len(args) <= len(positional) else "", each) for i, each in enumerate(args)
    ]
    named += list(kwargs.items())
    found: list[tuple[str, Tensor]] = []
    for name, each in named:
        if isinstance(each, dict | UserDict):
            found += [(str(key), value) for key, value in each.items() if isinstance(value, Tensor)]
        elif isinstance(each, list | tuple):
            found += [(name, value) for value in each if isinstance(value, Tensor)]
        elif isinstance(each, Tensor):
            found.append((name, each))
    mask = _first([each for name, each in found if name == MASK])
    usable = [(name, each) for name, each in found if name not in NOT_ROWS and each.ndim > 0]
    tokens = _first([each for name, each in usable if name == TOKENS])
    if tokens is None:
        whole = [each for _, each in usable if each.ndim == 2 and not each.is_floating_point()]
        tokens = _first([each for each in whole if each.dtype != torch.bool and not each.is_complex()])
    if tokens is None:
        tokens = _first([each for _, each in usable])
    if tokens is None:
        return [], mask
    others = [each for _, each in usable if each is not tokens and each.shape[0] == tokens.shape[0]]
    return [tokens, *others], mask


def _first(tensors: list[Tensor]) -> Tensor | None:
    return tensors[0] if tensors else None


def padding_token(model: nn.Module) -> int | None:
    """The padding token in a model's configuration, as in Transformers' models."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            token = getattr(config, "pad_token_id", None)
            return token if isinstance(token, int) and not isinstance(token, bool) else None
    return None


def can_be_hashed(rows: Tensor) -> bool:
    """Whether a tensor's elements are readable: not sparse, nested, quantized, traced, or empty."""
    if rows.layout != torch.strided or rows.is_quantized or rows.is_meta or rows.is_nested:
        return False
    traced = torch._C._len_torch_dispatch_stack() > 0 or torch._is_functional_tensor(rows)
    plain = type(rows).__torch_dispatch__ is Tensor.__torch_dispatch__
    return plain and not traced and rows.ndim > 0 and rows.numel() > 0
