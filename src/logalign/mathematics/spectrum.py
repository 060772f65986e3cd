"""Spectra of a linear layer: the directions that its weight offers and the directions that its inputs use.

Method: one eigendecomposition of the Gram matrix `G = W^T W [n, n]`. The activations enter through `C = X^T X [n, n]`.
The alternative, an SVD of `W [m, n]`, gives the small singular values to more digits, at many times the cost and with
a copy of W. This module needs only the squares of singular values.

(The module's name is not `spectra`, because the public function is `logalign.spectra`.)
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import array_api_compat as compat

from logalign.common import markup
from logalign.mathematics.arrays import Array, Layer, checked_layer

DEGENERATE = 1e-10
"""Eigenvalues of G closer than this share of the largest belong to one eigenspace (in float64)."""
SHOWN = 80
"""Number of directions that a notebook shows, evenly spaced in the logarithm of the index."""
WIDE, STRIPS = 256, 4
"""The width from which a Gram matrix is computed in strips, and the number of strips."""


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """The weight spectrum p and the activation spectrum q of a layer, in its right singular directions.

    With the SVD `W = U diag(s) V^T` over all n directions (s padded with zeros where m < n):

        p_i = s_i^2 / E_W,   q_i = ||X v_i||^2 / E_X,   overlap = sum_i p_i q_i = E_Z / (E_W E_X)
        d_p = 1 / sum p_i^2,   d_q = 1 / sum q_i^2,   c = overlap / (|p| |q|),   k = sqrt(d_p d_q) / c

    The basis is arbitrary within an eigenspace of equal singular values, so q is spread evenly there. LAR and k do not
    depend on this choice. They are undefined where the overlap does not exceed `rounding`.

    Attributes:
        n: Fan-in of W.
        p: [n], in descending order, sums to 1, an array of the caller's library.
        q: [n], in the same order, sums to 1.
    """

    n: int
    p: Array = field(repr=False)
    q: Array = field(repr=False)

    @cached_property
    def overlap(self) -> float:
        """`<p, q>`, in [0, 1]."""
        return self._sum(self.p * self.q)

    @property
    def lar(self) -> float:
        """`1 + log_n(overlap) / 2`, or NaN where the overlap is undefined or only rounding error."""
        return 1 + math.log(self.overlap, self.n) / 2 if self.overlap > self.rounding else math.nan

    @property
    def effective_dim(self) -> float:
        """`k = 1 / overlap`, or NaN where LAR is NaN."""
        return 1 / self.overlap if self.overlap > self.rounding else math.nan

    @property
    def rounding(self) -> float:
        """Bound on the absolute error of the overlap: the distance within which values of p count as equal."""
        return _tolerance(self.p) * float(self.p[0])

    @cached_property
    def weight_participation(self) -> float:
        """`d_p = 1 / sum p_i^2`, in [1, n]: the effective number of directions of the weight."""
        return 1 / self._sum(self.p * self.p)

    @cached_property
    def input_participation(self) -> float:
        """`d_q = 1 / sum q_i^2`, in [1, n]: the effective number of the weight's directions that the inputs use."""
        return 1 / self._sum(self.q * self.q)

    @property
    def coherence(self) -> float:
        """`c = <p, q> / (|p| |q|)`, in [0, 1]: how well the two spectra match."""
        return self.overlap * math.sqrt(self.weight_participation * self.input_participation)

    def _repr_html_(self) -> str:
        """Draw p and q over the index of the direction in a notebook, with both axes logarithmic."""
        facts = {
            "LAR": markup.number(self.lar),
            "k": markup.number(self.effective_dim),
            "weight participation": markup.number(self.weight_participation),
            "input participation": markup.number(self.input_participation),
            "coherence": markup.number(self.coherence),
        }
        rows = sorted({round(self.n ** (i / (SHOWN - 1))) - 1 for i in range(SHOWN)})
        drawn = [
            markup.Drawn(name, color, [math.log10(row + 1) for row in rows], [_log10(values[row]) for row in rows])
            for name, color, values in (
                ("log10 p (weights)", markup.BLUE, self.p),
                ("log10 q (inputs)", markup.ORANGE, self.q),
            )
        ]
        title = f"Spectra of {self.n:,} directions"
        return markup.card(title, markup.facts(facts), markup.curves(drawn, x_name="log10 of the direction"))

    def _sum(self, array: Array) -> float:
        return float(compat.array_namespace(array).sum(array))


def _log10(value: Any) -> float | None:
    number = float(value)
    return math.log10(number) if number > 0 else None


def _tolerance(p: Array) -> float:
    """The share of the largest p within which two values count as equal."""
    n: int = p.shape[0]
    return max(DEGENERATE, n * float(compat.array_namespace(p).finfo(p.dtype).eps))


def spectra(weight: Array, inputs: Array, *, mask: Array | None = None) -> Spectra:
    """Compute the spectra p and q of a linear layer `z = W x` and decompose its effective dimension.

    Args:
        weight: [m, n] (out, in).
        inputs: [..., n].
        mask: [...] of bool, the tokens to count.

    Returns:
        Spectra, with arrays of the caller's library and device, in float64 where available. All values are NaN where W
        or the kept inputs are zero or not finite.

    Raises:
        InputError: wrong shapes or dtypes, empty arrays, n = 1, a mask of another shape.

    Source: arXiv 2605.28975. The convention for equal singular values is ours (docs/architecture.md).

    Example:
        >>> import numpy as np
        >>> found = spectra(np.diag([2.0, 1.0, 1.0]), np.eye(3))
        >>> found.p.round(3).tolist(), found.q.round(3).tolist()
        ([0.667, 0.167, 0.167], [0.333, 0.333, 0.333])
    """
    layer = checked_layer(weight, inputs, mask=mask)
    return spectra_of_grams(_gram(layer, layer.weight), _gram(layer, layer.inputs), xp=layer.xp)


def gram(rows: Array) -> Array:
    """Compute `A^T A [n, n]` of A [rows, n], block by block in the widest float of its library and device."""
    layer = checked_layer(rows, rows)
    return _gram(layer, layer.weight) * layer.weight_scale**2


def _gram(layer: Layer, rows: Array) -> Array:
    """Compute `A^T A [n, n]` from only the strips on and right of the diagonal: 5/8 of the products."""
    n, xp = rows.shape[1], layer.xp
    edges = [n * i // STRIPS for i in range(STRIPS + 1)] if n >= WIDE else [0, n]
    bounds = list(itertools.pairwise(edges))
    strips = [
        xp.zeros((end - start, n - start), dtype=layer.dtype, device=compat.device(rows)) for start, end in bounds
    ]
    for _, block in layer.blocks(rows, n):
        for i, (start, end) in enumerate(bounds):
            strips[i] = strips[i] + block[:, start:end].T @ block[:, start:]
    lines = []
    for i, (start, end) in enumerate(bounds):
        mirrored = [strips[j][:, start - first : end - first].T for j, (first, _) in enumerate(bounds[:i])]
        lines.append(xp.concat([*mirrored, strips[i]], axis=1))
    return xp.concat(lines, axis=0)


def spectra_of_grams(weight_gram: Array, input_gram: Array, *, xp: Any = None) -> Spectra:
    """Compute the spectra from `G = W^T W` and `C = X^T X`, both [n, n], which add over rows and over tokens.

    Source: see `spectra`.
    """
    xp = xp or compat.array_namespace(weight_gram, input_gram)
    n = weight_gram.shape[0]
    weight_energy, input_energy = xp.linalg.trace(weight_gram), xp.linalg.trace(input_gram)
    usable = xp.isfinite(weight_energy) & xp.isfinite(input_energy) & (weight_energy > 0) & (input_energy > 0)
    if not bool(usable):
        undefined = xp.full((n,), math.nan, dtype=weight_gram.dtype, device=compat.device(weight_gram))
        return Spectra(n=n, p=undefined, q=undefined)
    # Scaling comes first: a Gram matrix with very small or large entries would leave the range of the eigensolver.
    eigenvalues, basis = xp.linalg.eigh(weight_gram / weight_energy)
    eigenvalues, basis = xp.flip(eigenvalues), xp.flip(basis, axis=1)
    # G is positive semi-definite: a negative eigenvalue here is the rounding of a zero.
    p = xp.where(eigenvalues > 0, eigenvalues, xp.zeros_like(eigenvalues))
    p = p / xp.sum(p)
    q = xp.sum(basis * ((input_gram / input_energy) @ basis), axis=0)
    starts = xp.concat([xp.zeros_like(p[:1]), xp.astype(p[:-1] - p[1:] > _tolerance(p) * p[0], p.dtype)])
    group = xp.cumulative_sum(starts)
    same = xp.astype(group[:, None] == group[None, :], p.dtype)
    return Spectra(n=n, p=p, q=(same @ q) / xp.sum(same, axis=1))
