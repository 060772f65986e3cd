"""The spectrum of one weight, from its Gram matrix, a block of rows at a time.

Method: `G = W^T W` (or `W W^T`, where that is smaller: the eigenvalues other than zero are the same) by BLAS's
symmetric update, half the work of a product. The products of large matrices are summed in float32 inside a block of
rows and in float64 over blocks, small ones in float64 throughout. The alternatives: float64 for all takes twice as
long, and an SVD needs the whole matrix in float32 or more and many times the work. docs/checkpoints.md has the error.

Shapes: `W [m, n]`, n the fan-in; G is [min(m, n), min(m, n)].
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
"""Numbers to a block: 64 MiB in float32."""
SMALL = 1 << 37
"""Multiplications up to which all are done in float64, which takes seconds."""
SAFE_IN_FLOAT32 = (1e-12, 1e15)
"""Largest magnitudes of a block between which its products stay in the range of float32."""


@dataclass(frozen=True, kw_only=True)
class WeightSpectrum:
    """The spectrum of one weight W [m, n], and what it says without any input.

    With the singular values `s_i` (n of them, padded with zeros) and `E_W = sum s_i^2`:

        p_i = s_i^2 / E_W,   d_p = 1 / sum p_i^2,   stable rank = E_W / s_1^2 = 1 / p_1,   norm = sqrt(E_W)
        LAR <= 1 - log_n(stable rank) / 2, whatever the inputs are

    The bound is reached where all inputs lie in the direction that W stretches most.

    Attributes:
        site: "unembedding" for the head, else the tensor's name without ".weight".
        name: Of the tensor.
        m: Fan-out.
        n: Fan-in.
        dtype: As stored.
        how: Why it was chosen; for the head, how it was found.
        is_transposed: Whether it is stored as [n, m].
        p: [n], from the largest down, sums to 1; None where undefined, as are the next four.
        participation: d_p, in [1, n]: over how many directions the weight is spread.
        stable_rank: In [1, d_p].
        lar_bound: The largest LAR that any inputs can have.
        norm: Frobenius norm; None, too, where an 8-bit weight has one scale beside it, on which nothing else depends.
        nonfinite: Rows as stored that hold a NaN or an infinity.
        reason: Why the numbers are None.
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
        """All but p, as JSON has it."""
        names = ("site", "name", "m", "n", "dtype", "how", "is_transposed", "participation", "stable_rank")
        return {name: getattr(self, name) for name in (*names, "lar_bound", "norm", "nonfinite", "reason")}


def spectrum_of(checkpoint: Checkpoint, chosen: Chosen) -> WeightSpectrum:
    """The spectrum of one matrix of a checkpoint.

    In memory at once: a block of rows as float32, G in float64 and once more in float32; where the matrix has fewer
    rows than columns, the matrix as it is stored, too.

    Raises:
        CheckpointError: the matrix cannot be read.
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
    # G is positive semi-definite: what is negative here is the rounding of a zero.
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
    """The lower triangle of the smaller Gram matrix; and how many stored rows are not finite (then it is undone)."""
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
        # BLAS goes by columns: to it, an array of rows is its own transpose, and is not copied.
        by_columns = int(rows < columns)
        if part is not None and (size == 0 or SAFE_IN_FLOAT32[0] <= size <= SAFE_IN_FLOAT32[1]):
            part = blas.ssyrk(1.0, block.T, beta=0.0, c=part, trans=by_columns, lower=1, overwrite_c=1)
            gram += part
        else:
            wide = block.astype(np.float64, copy=False).T
            gram = blas.dsyrk(1.0, wide, beta=1.0, c=gram, trans=by_columns, lower=1, overwrite_c=1)
    return gram, int(bad.sum())


def _blocks(checkpoint: Checkpoint, name: str) -> Iterator[tuple[slice, Rows]]:
    """The matrix in blocks of rows, or of columns where it has fewer rows; and which rows they are of."""
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
    """The tensor that an 8-bit weight is to be multiplied by, and how many numbers it has; None without one."""
    if checkpoint.tensors[name].dtype in EIGHT_BIT:
        for scale in (f"{name}_scale_inv", f"{name}_scale"):
            if scale in checkpoint.tensors:
                return scale, math.prod(checkpoint.tensors[scale].shape)
    return None
