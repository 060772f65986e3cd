"""The energy of outputs that never exist: `||X W^T||^2` from weight and inputs, exactly or from a sample of tokens.

Method: the cheapest allowed of three ways.

    one by one   |W x|^2 for every token x        T m n multiplications, as many as the layer itself
    Gram         <W^T W, X^T X>                   m n^2 once a step, and T n^2
    sample       S tokens drawn at random         S m n; unbiased, with a standard error that falls as 1 / sqrt(S)

The first two are exact. A sample estimates only the part that no sum gives exactly. With x the mean of the inputs, w
the mean of the rows of W and `y = x_t - x` for each token,

    ||X W^T||^2 = T |W x|^2  +  sum m (w.y)^2  +  sum (|W y|^2 - m (w.y)^2)
                     exact            exact             estimated

So a direction common to all tokens or to the whole vocabulary, where most of the energy may lie, adds nothing to the
error. The centered forms of LAR, which are differences from it, are thus as good as the plain one. Tokens are drawn
with replacement, with a probability proportional to `|y|^2`. The average is then over the last term divided by `|y|^2`,
which varies less than the term itself. The average is unbiased. A token that does not count has y = 0 and is never
drawn, so the host need not know its place. A sample of rows of W would be cheaper still, but its value depends on how
unequal the rows are.

Shapes: W [m, n], X [T, n].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from logalign.errors import InputError
from logalign.mathematics.energies import GRAM_DIGITS
from logalign.torch import reduce
from logalign.torch.linear import LinearMap

SAMPLE = 256
"""Tokens in each forward's sample."""
AFFORDABLE = 0.01
"""Allowed mean cost of exactness over all steps, as a share of the layer's forward and backward."""
SEED = 20_260_528


class Way:
    """How to compute output energy without outputs, and the random numbers for it.

    Args:
        asked: "exact", "sample", a number of tokens to sample, or "auto" to sample unless exactness is affordable.
        every: One step in this many is monitored.

    Raises:
        InputError: If `asked` is none of these.
    """

    def __init__(self, asked: str | int = "auto", *, every: int = 1) -> None:
        number = isinstance(asked, int) and not isinstance(asked, bool) and asked > 1
        if not number and asked not in ("auto", "exact", "sample"):
            raise InputError(
                f"without_logits: expected 'auto', 'exact', 'sample' or a number of tokens from 2 on, found {asked!r}"
            )
        self.size = asked if isinstance(asked, int) else SAMPLE
        self._asked = asked
        self._every = every
        self._generators: dict[torch.device, torch.Generator] = {}

    def samples(self, exact: int, *, tokens: int, m: int, n: int) -> bool:
        """Whether to sample if exactness takes `exact` multiplications."""
        if self._asked == "exact" or tokens <= self.size:
            return False
        if self._asked == "auto" and m <= self.size:
            return False  # a router, a classifier: small whatever its share
        affordable = AFFORDABLE * self._every * 3 * tokens * m * n
        return self._asked != "auto" or exact > max(self.size * m * n, affordable)

    def uniform(self, count: int, device: torch.device) -> Tensor:
        """Random numbers in [0, 1), from a private generator."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(SEED)
        return torch.rand(count, generator=self._generators[device], dtype=reduce.wide(device), device=device)


class Estimate(NamedTuple):
    """An energy, the variance of its estimate (0 if it is exact), and a bound on its rounding error.

    The bound is 0 if the energy is a sum of squares, because rounding spares its leading digits.
    """

    energy: Tensor
    variance: Tensor
    rounding: Tensor | float = 0.0


class OutputEnergy:
    """The output energy of one layer over the calls of one monitored step without outputs.

    Args:
        way: How to compute it.
    """

    def __init__(self, way: Way) -> None:
        self._way = way
        self._one_by_one = 0  # tokens so far
        self._gram: Tensor | None = None

    def of(
        self,
        weight: LinearMap,
        rows: Tensor,
        *,
        mask: Tensor | None = None,
        row_mean: Tensor | None = None,
        whole: bool = True,
    ) -> Estimate:
        """Estimate the energy of one more call.

        Args:
            weight: W. Its Gram matrix is computed once a step.
            rows: X, zero at tokens that the mask excludes.
            mask: The tokens that count, [T] of bool.
            row_mean: The mean of the rows of W [n], if known.
            whole: Whether these are all of the layer's rows. A part is never sampled: ranks would draw the same tokens
                for their parts, and their errors would have one sign.
        """
        (m, n), tokens = weight.shape, rows.shape[0]
        # The number of calls is unknown. Gram starts where all of them one by one would have cost as much as its
        # m n^2. That is at most twice the cheapest.
        by_gram = self._gram is not None or (self._one_by_one + tokens) * m > (tokens + m) * n
        exact = (tokens * n * n if self._gram is not None else (m + tokens) * n * n) if by_gram else tokens * m * n
        if whole and self._way.samples(exact, tokens=tokens, m=m, n=n):
            return self._sample(weight, rows, mask, row_mean)
        if not by_gram:
            self._one_by_one += tokens
            total = reduce.output_energies(weight.blocks(), reduce.at_least_float32(rows)).sum()
        else:
            if self._gram is None:
                dtype = torch.promote_types(torch.promote_types(weight.dtype, rows.dtype), torch.float32)
                self._gram = reduce.gram(weight.blocks(), n, rows.device, dtype)
            total, traces = reduce.energy_by_gram(self._gram, rows)
            unit = torch.finfo(self._gram.dtype).eps / 2
            return Estimate(total, torch.zeros_like(total), GRAM_DIGITS * unit * traces)
        return Estimate(total, torch.zeros_like(total))

    def _sample(self, weight: LinearMap, rows: Tensor, mask: Tensor | None, row_mean: Tensor | None) -> Estimate:
        size, m = self._way.size, weight.shape[0]
        count = torch.tensor(rows.shape[0], device=rows.device) if mask is None else mask.sum().clamp(min=1)
        precise = reduce.at_least_float32(rows)
        mean = (reduce.column_sum(rows) / count).to(precise.dtype)
        common = count * reduce.output_energies(weight.blocks(), mean[None]).sum()
        deviations = precise - mean
        if mask is not None:
            deviations = torch.where(mask[:, None], deviations, deviations.new_zeros(()))
        energies = reduce.row_energies(deviations)
        known = torch.zeros_like(energies)
        if row_mean is not None:
            known = m * reduce.product(deviations, row_mean).square()
        ends = energies.cumsum(0)
        total = ends[-1]
        places = torch.searchsorted(ends, self._way.uniform(size, rows.device) * total, right=True)
        drawn = places.clamp(max=rows.shape[0] - 1)
        # In the precision, and at the cost, of the layer itself.
        outputs = reduce.output_energies(weight.blocks(), deviations[drawn].to(rows.dtype))
        ratios = (outputs - known[drawn]) / energies[drawn]
        # If no two tokens differ, there is nothing to draw from or to add.
        none = torch.zeros_like(total)
        estimate = torch.where(total > 0, total * ratios.mean(), none)
        variance = torch.where(total > 0, total.square() * ratios.var() / size, none)
        return Estimate(common + known.sum() + estimate, variance)
