"""The energy of outputs that never exist: `||X W^T||^2` from weight and inputs, exactly or from a sample of tokens.

Method: of three ways the cheapest that is asked for.

    one by one   |W x|^2 for every token x            T m n multiplications, as many as the layer itself
    Gram         <W^T W, X^T X>                       m n^2 once a step, and T n^2
    sample       the mean of |W x|^2 / |x|^2 over     S m n; unbiased, with a standard error that falls as 1 / sqrt(S)
                 S tokens, times ||X||^2

The first two are exact. Tokens are drawn with a probability proportional to `|x|^2`, with replacement: so what is
averaged is `|W x|^2 / |x|^2`, which varies less than `|W x|^2`; the average is unbiased; and a token that the mask has
set to zero is never drawn, without its place having to be known on the host. A sample of rows of W would be cheaper
still, but what it is worth depends on how unequal the rows are.

Shapes: W [m, n], X [T, n].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from logalign.errors import InputError
from logalign.torch import reduce
from logalign.torch.linear import LinearMap

SAMPLE = 256
"""Tokens of a sample, of each forward."""
AFFORDABLE = 0.01
"""Share of the layer's own forward and backward that exactness may cost in the mean over all steps."""
SEED = 20_260_528


class Way:
    """How the output energy is had where there are no outputs, and the random numbers for it.

    Args:
        asked: "exact"; "sample", or the number of tokens to sample; "auto" for a sample unless exactness is affordable.
        every: Of how many steps one is monitored.

    Raises:
        InputError: none of these.
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
        """Whether to sample where exactness takes so many multiplications."""
        if self._asked == "exact" or tokens <= self.size:
            return False
        affordable = AFFORDABLE * self._every * 3 * tokens * m * n
        return self._asked != "auto" or exact > max(self.size * m * n, affordable)

    def uniform(self, count: int, device: torch.device) -> Tensor:
        """Random numbers in [0, 1), from a generator of our own."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(SEED)
        return torch.rand(count, generator=self._generators[device], dtype=reduce.wide(device), device=device)


class Estimate(NamedTuple):
    """An energy, and the variance of its estimate; 0 where it is exact."""

    energy: Tensor
    variance: Tensor


class OutputEnergy:
    """The output energy of one layer over the calls of one monitored step, of which no outputs are at hand.

    Args:
        way: How it is had.
    """

    def __init__(self, way: Way) -> None:
        self._way = way
        self._one_by_one = 0  # tokens so far
        self._gram: Tensor | None = None

    def of(self, weight: LinearMap, rows: Tensor, energies: Tensor) -> Estimate:
        """That of one more call.

        Args:
            weight: W; where it is needed again, that of the step's first call is taken.
            rows: X, zero where the mask leaves tokens out.
            energies: `|x|^2` of each of them.
        """
        (m, n), tokens = weight.shape, rows.shape[0]
        # How many calls there will be is not known: by Gram from where all of them together, one by one, would have
        # cost as much as its m n^2. That is at most twice the cheapest.
        by_gram = self._gram is not None or (self._one_by_one + tokens) * m > (tokens + m) * n
        exact = (tokens * n * n if self._gram is not None else (m + tokens) * n * n) if by_gram else tokens * m * n
        if self._way.samples(exact, tokens=tokens, m=m, n=n):
            return self._sample(weight, rows, energies)
        if not by_gram:
            self._one_by_one += tokens
            total = reduce.output_energies(weight.blocks(), reduce.at_least_float32(rows)).sum()
        else:
            if self._gram is None:
                dtype = torch.promote_types(torch.promote_types(weight.dtype, rows.dtype), torch.float32)
                self._gram = reduce.gram(weight.blocks(), n, rows.device, dtype)
            total = reduce.energy_by_gram(self._gram, rows)
        return Estimate(total, torch.zeros_like(total))

    def _sample(self, weight: LinearMap, rows: Tensor, energies: Tensor) -> Estimate:
        size = self._way.size
        ends = energies.cumsum(0)
        total = ends[-1]
        places = torch.searchsorted(ends, self._way.uniform(size, rows.device) * total, right=True)
        drawn = places.clamp(max=rows.shape[0] - 1)
        # Of the dtype that the layer would have computed in, at its price.
        outputs = reduce.output_energies(weight.blocks(), rows[drawn])
        ratios = outputs / energies[drawn]
        # Without a token that counts there is nothing to draw from, and nothing to add.
        none = torch.zeros_like(total)
        energy = torch.where(total > 0, total * ratios.mean(), none)
        return Estimate(energy, torch.where(total > 0, total.square() * ratios.var() / size, none))
