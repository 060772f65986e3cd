"""The spectrum of one weight, from its Gram matrix, a block of rows at a time.

Method: BLAS's symmetric update computes `G = W^T W`, or `W W^T` where it is smaller and has the same nonzero
eigenvalues, with half the work of a product. Large matrices sum products in float32 inside a block of rows and in
float64 over blocks. Small matrices use float64 throughout. The alternatives: float64 for all takes twice as long, and
an SVD needs the whole matrix in at least float32 and many times the work. docs/checkpoints.md gives the error.

Shapes: `W [m, n]` with n the fan-in, G is [min(m, n), min(m, n)].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.linalg import blas, eigvalsh

from logalign.checkpoints.choice import Chosen
from logalign.checkpoints.stored import EIGHT_BIT, Checkpoint, Rows, decoded

BLOCK_ELEMENTS = 1 << 24
"""Numbers in a block: 64 MiB in float32."""
SMALL = 1 << 37
"""Most multiplications of a matrix that runs entirely in float64, which takes seconds."""
SAFE_IN_FLOAT32 = (1e-12, 1e15)
"""Bounds on the largest magnitude of a block within which its products stay in the range of float32."""


@dataclass(frozen=True, kw_only=True)
class WeightSpectrum:
    """The spectrum of one weight W [m, n] and the quantities that follow without any input.

    With the singular values `s_i` (n of them, padded with zeros) and `E_W = sum s_i^2`:

        p_i = s_i^2 / E_W,   d_p = 1 / sum p_i^2,   stable rank = E_W / s_1^2 = 1 / p_1,   norm = sqrt(E_W)
        LAR <= 1 - log_n(stable rank) / 2, for all inputs

    LAR reaches the bound where all inputs lie in the direction that W stretches most.

    Attributes:
        site: "unembedding" for the head, else the tensor's name without ".weight".
        name: Name of the tensor.
        m: Fan-out.
        n: Fan-in.
        dtype: Stored dtype.
        how: The reason for the choice. For the head, the rule that found it.
        is_transposed: True if it is stored as [n, m].
        p: [n], in descending order, sums to 1. p and the next four are None where undefined.
        participation: d_p, in [1, n]: the effective number of directions of the weight.
        stable_rank: In [1, d_p].
        lar_bound: The largest LAR that any inputs can have.
        norm: Frobenius norm. Also None for an 8-bit weight with one separate scale, which affects only the norm.
        nonfinite: Stored rows that hold a NaN or an infinity.
        reason: The reason why the numbers are None.
    """

    site: str
    name: str
    m: int
    n: int
    dtype: str
    how: str
    is_transposed: bool = False
    p: np.ndarray[Any, np.dtype[np.float64]] | None = field(default=None, repr=False)
    participation: float | None = None
    stable_rank: float | None = None
    lar_bound: float | None = None
    norm: float | None = None
    nonfinite: int = 0
    reason: str | None = None

    def record(self) -> dict[str, Any]:
        """All fields but p, as JSON values."""
        names = ("site", "name", "m", "n", "dtype", "how", "is_transposed", "participation", "stable_rank")
        return {name: getattr(self, name) for name in (*names, "lar_bound", "norm", "nonfinite", "reason")}


def spectrum_of(checkpoint: Checkpoint, chosen: Chosen) -> WeightSpectrum:
    """Compute the spectrum of one matrix of a checkpoint.

    Memory holds a block of rows in float32, and G in float64 and again in float32. It also holds the stored matrix
    where the matrix has fewer rows than columns.

    Raises:
        CheckpointError: the matrix is not readable.
    """
    stored = checkpoint.tensors[chosen.name]
    m, n = stored.shape[::-1] if chosen.is_transposed else stored.shape
    known: dict[str, Any] = {
        "site": chosen.site,
        "name": chosen.name,
        "m": m,
        "n": n,
        "dtype": stored.dtype,
        "how": chosen.how,
        "is_transposed": chosen.is_transposed,
    }
    scales = _scales(checkpoint, chosen.name)
    if scales is not None and scales[1] > 1:
        return WeightSpectrum(
            **known, reason=f"8-bit codes with {scales[1]} scales in {scales[0]}, which are not applied"
        )
    gram, nonfinite = _gram(checkpoint, chosen.name)
    if nonfinite:
        reason = f"{nonfinite} stored rows of the weight hold a NaN or an infinity"
        return WeightSpectrum(**known, nonfinite=nonfinite, reason=reason)
    energy = float(np.trace(gram))
    if not 0 < energy < math.inf:
        reason = "the weight is zero" if energy == 0 else "the energy of the weight is not finite"
        return WeightSpectrum(**known, norm=0.0 if energy == 0 else None, reason=reason)
    gram /= energy
    eigenvalues = eigvalsh(gram, lower=True, overwrite_a=True, check_finite=False, driver="evd")[::-1]
    # G is positive semi-definite: a negative eigenvalue here is the rounding of a zero.
    p = np.zeros(n)
    p[: len(eigenvalues)] = np.maximum(eigenvalues, 0)
    p /= p.sum()
    stable_rank = 1 / float(p[0])
    return WeightSpectrum(
        **known,
        p=p,
        participation=1 / float(np.square(p).sum()),
        stable_rank=stable_rank,
        lar_bound=1 - math.log(stable_rank, n) / 2 if n > 1 else None,
        norm=None if scales else math.sqrt(energy),
        reason=None if n > 1 else "fan-in 1: log_n is undefined",
    )


def _gram(checkpoint: Checkpoint, name: str) -> tuple[Rows, int]:
    """Compute the lower triangle of the smaller Gram matrix, incomplete if the returned count of bad rows is not 0."""
    rows, columns = checkpoint.tensors[name].shape
    side = min(rows, columns)
    exact = checkpoint.tensors[name].dtype == "F64" or rows * columns * side <= SMALL
    gram = np.zeros((side, side), order="F")
    part = None if exact else np.zeros((side, side), dtype=np.float32, order="F")
    bad = np.zeros(rows, dtype=bool)
    for places, block in _blocks(checkpoint, name):
        size = float(np.abs(block).max())
        if not math.isfinite(size):
            bad[places] |= ~np.isfinite(block).all(axis=1)
        if bad.any():
            continue
        # BLAS orders by columns. It reads an array of rows as its transpose, without a copy.
        by_columns = int(rows < columns)
        if part is not None and (size == 0 or SAFE_IN_FLOAT32[0] <= size <= SAFE_IN_FLOAT32[1]):
            part = blas.ssyrk(1.0, block.T, beta=0.0, c=part, trans=by_columns, lower=1, overwrite_c=1)
            gram += part
        else:
            wide = block.astype(np.float64, copy=False).T
            gram = blas.dsyrk(1.0, wide, beta=1.0, c=gram, trans=by_columns, lower=1, overwrite_c=1)
    return gram, int(bad.sum())


def _blocks(checkpoint: Checkpoint, name: str) -> Iterator[tuple[slice, Rows]]:
    """Yield the rows of each block and the block: rows, or columns where the matrix has fewer rows than columns."""
    stored = checkpoint.tensors[name]
    rows, columns = stored.shape
    if rows >= columns:
        step = max(1, BLOCK_ELEMENTS // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield slice(start, stop), decoded(checkpoint.rows(name, start, stop), stored.dtype)
        return
    whole = checkpoint.rows(name, 0, rows)
    step = max(1, BLOCK_ELEMENTS // rows)
    for start in range(0, columns, step):
        block = decoded(whole[:, start : start + step], stored.dtype)
        yield slice(0, rows), np.ascontiguousarray(block)


def _scales(checkpoint: Checkpoint, name: str) -> tuple[str, int] | None:
    """The tensor that scales an 8-bit weight and its number of elements, or None without one."""
    if checkpoint.tensors[name].dtype in EIGHT_BIT:
        for scale in (f"{name}_scale_inv", f"{name}_scale"):
            if scale in checkpoint.tensors:
                return scale, math.prod(checkpoint.tensors[scale].shape)
    return None
