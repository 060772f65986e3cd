"""Sums of squares of large tensors, without copies of the logits or synchronization.

Method: norms by row, squared and summed in float64. The alternatives are shorter and worse: `z.float().pow(2).sum()`
copies the logits twice, and one norm over a whole tensor accumulates in float32 and is off by percents on CPU
(docs/performance.md). No function needs autograd: callers hold `torch.no_grad()`.

Shapes: any leading axes, with the last one reduced. T tokens, `W [m, n]`, `X [..., n]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
SEGMENT = 512
"""Columns per norm on CPU, to keep each float32 sum short."""
SMALL = 1 << 22
"""Elements reduced at a time on CPU, and the most for which a float32 copy by blocks is cheap enough."""


def wide(device: torch.device) -> torch.dtype:
    """The widest dtype for sums on this device."""
    return torch.float32 if device.type == "mps" else torch.float64


def row_energies(rows: Tensor) -> Tensor:
    """Squared norms over the last axis, in float64 (float32 on MPS), of shape `rows.shape[:-1]`.

    PyTorch on CPU sums the squares of a row one after the other, which is off by 3e-5 in float32 for 50,304 equal
    entries. So norms over segments of 512 columns are squared and summed in float64. A half-precision norm in another
    dtype would copy the whole tensor there. So fp16 and small bfloat16 tensors are copied block by block. Bfloat16
    tensors of more than 4 M elements use PyTorch's own kernel, which rounds each norm to bfloat16. docs/performance.md
    has the relative error at 4096 x 50304. At worst, with all entries equal in bfloat16, it is 2**-8.
    """
    if not rows.shape[-1]:  # a rank whose rows are all padding
        return rows.new_zeros(rows.shape[:-1], dtype=wide(rows.device))
    if rows.device.type != "cpu":
        norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32 if rows.dtype in HALF else None)
        return norms.to(wide(rows.device)).square()
    flat = rows.reshape(-1, rows.shape[-1])
    copied = rows.dtype == torch.float16 or (rows.dtype == torch.bfloat16 and rows.numel() <= SMALL)
    if copied:
        parts = [_segment_energies(block.float()) for block in blocks(flat)]
    else:
        parts = [_segment_energies(block) for block in torch.split(flat, max(1, SMALL // flat.shape[-1]))]
    return torch.cat(parts).reshape(rows.shape[:-1])


def _segment_energies(rows: Tensor) -> Tensor:
    """Squared norms [rows] of the rows of a matrix [rows, columns], by segments."""
    count = rows.shape[-1] // SEGMENT
    whole = count * SEGMENT
    segments = rows[:, :whole].view(rows.shape[0], count, SEGMENT)
    energies: Tensor = torch.linalg.vector_norm(segments, dim=-1).to(torch.float64).square().sum(-1)
    if whole < rows.shape[-1]:
        energies += torch.linalg.vector_norm(rows[:, whole:], dim=-1).to(torch.float64).square()
    return energies


def blocks(rows: Tensor) -> Iterator[Tensor]:
    """Yield blocks of consecutive rows that fit in a CPU's cache (or make one large launch elsewhere)."""
    elements = 1 << 20 if rows.device.type == "cpu" else 1 << 24
    yield from torch.split(rows, max(1, elements // rows.shape[-1]))


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself, or a float32 copy of a half-precision one."""
    return tensor.float() if tensor.dtype in HALF else tensor


def count_nonfinite(values: Tensor) -> Tensor:
    """Count NaN or infinite entries: `x - x` is 0 for all others. It takes a third of `isfinite`'s operations."""
    return (values - values).count_nonzero()


def column_sum(rows: Tensor) -> Tensor:
    """Sum [columns] of the rows of a matrix [rows, columns], in the wide dtype."""
    parts = [at_least_float32(block).sum(0) for block in blocks(rows)]
    return torch.stack(parts).to(wide(rows.device)).sum(0)


def product(rows: Tensor, vector: Tensor) -> Tensor:
    """`rows @ vector` [R] in the wide dtype for rows [R, C] and vector [C], multiplied in at least float32."""
    parts = []
    for block in blocks(rows):
        block = at_least_float32(block)
        parts.append(block @ vector.to(block.dtype))
    return torch.cat(parts).to(wide(rows.device))


def gram(blocks: Iterable[Tensor], n: int, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`A^T A [n, n]` of the matrix A [rows, n], given in blocks of consecutive rows.

    It is computed in `dtype`, by default the wide one.
    """
    total = torch.zeros(n, n, dtype=wide(device) if dtype is None else dtype, device=device)
    for block in blocks:
        block = block.to(total.dtype)
        total.addmm_(block.T, block)
    return total


def energy_by_gram(weight_gram: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """`||X W^T||^2 = <W^T W, X^T X>` for `W^T W [n, n]` and X [T, n], in the wide dtype: T n^2 multiplications.

    Also returns `||W||^2 ||X||^2`, the scale of the rounding error: terms of both signs add up to the energy.
    """
    dtype = wide(inputs.device)
    inputs_gram = gram(blocks(inputs), inputs.shape[-1], inputs.device, weight_gram.dtype)
    traces = weight_gram.diagonal().sum(dtype=dtype) * inputs_gram.diagonal().sum(dtype=dtype)
    return inputs_gram.mul_(weight_gram).sum(-1, dtype=dtype).sum(), traces


def output_energies(blocks: Iterable[Tensor], inputs: Tensor) -> Tensor:
    """`|W x|^2` [T] for each row x of X [T, n] and W [m, n] in blocks of rows, in the wide dtype.

    It takes T m n multiplications, like the layer, without its [T, m] matrix.
    """
    tokens = inputs.shape[0]
    total = torch.zeros(tokens, dtype=wide(inputs.device), device=inputs.device)
    for rows in blocks:
        for block in torch.split(rows, max(1, SMALL // max(1, tokens))):
            dtype = torch.promote_types(block.dtype, inputs.dtype)
            total += row_energies(inputs.to(dtype) @ block.to(dtype).T)
    return total
