"""Meter: the sums of one layer over one monitored step, kept on the device until the step is read.

Every measured quantity is a sum over tokens, so the micro-batches of a step pool by addition. The step's first forward
gives each quantity of the weight. Only the transfer of `Packed` to the host waits for the device.

If a layer is split over several ranks, each rank adds its part, and a `Share` gives that part's share of the whole. The
ranks' vectors then add up to the whole's. Every rank that sees W computes the sums of W, which are divided by their
number. `|W s|^2`, with s the sum of all inputs, is not a sum over tokens. Across ranks the meter keeps the vector
`W s` [m] instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from logalign.errors import InputError
from logalign.mathematics.energies import Energies, product_rounding
from logalign.torch import reduce
from logalign.torch.linear import Dense, LinearMap
from logalign.torch.output_energy import OutputEnergy, Way

ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 5e-4, torch.float16: 5e-4}
"""Bound on the energies' relative error, by the outputs' dtype. A centered energy below it is undefined."""
ROUNDING_IN_EPSILONS = 16.0
"""That bound, at least, in units of one output's relative rounding."""

SCALARS = (
    "weight",
    "bias_energy",
    "weight_nonfinite",
    "weighed",
    "input",
    "logit_sum_energy",
    "tokens",
    "tokens_offered",
    "input_nonfinite",
    "biased_output",
    "output_nonfinite",
    "output_sum_energy",
    "bias_dot_output_sum",
    "masked",
    "output_variance",
    "output_rounding",
)
OF_WEIGHT = ("weight", "bias_energy", "weight_nonfinite")
"""Sums that every rank with the weight adds, `weighed` times in total."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's part of a layer whose W is [m, n].

    Attributes:
        shape: (m, n) of the whole.
        first_row: The first row of W on this rank. Its outputs belong to its rows.
        first_column: The first column of W on this rank. Its inputs have these features.
        of_weight: This rank's share in sums of W: 1 if its part is its own, 1/r if r ranks have the same part.
        of_input: The same for sums over inputs.
        of_output: The same for sums over outputs.
        of_tokens: The same for counts of tokens.
        spread: Whether other ranks, of any kind, also have sums.
        whole_row_sum: Turns the sum of a rank's rows [n] into the sum of all rows, by a collective.
    """

    shape: tuple[int, int]
    first_row: int = 0
    first_column: int = 0
    of_weight: float = 1.0
    of_input: float = 1.0
    of_output: float = 1.0
    of_tokens: float = 1.0
    spread: bool = False
    whole_row_sum: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Packed:
    """A meter's sums as one vector on the device for one transfer, and the facts needed to read it."""

    vector: Tensor
    n: int
    m: int
    rounding: float
    spread: bool = False


class Meter:
    """Sums of one layer `z = W x + b` over the forwards of one monitored step.

    Args:
        part: This rank's part of the layer, or (m, n) of W for all of it.
        device: The device of the layer's tensors.
        spectral: Also accumulate the Gram matrices `W^T W` and `X^T X`.
        softmax: Whether outputs are logits. The mean over the vocabulary is then measured.
        way: How to compute E_Z of calls without outputs (default: exactly).
    """

    def __init__(
        self,
        part: Share | tuple[int, int],
        device: torch.device,
        *,
        spectral: bool = False,
        softmax: bool = True,
        way: Way | None = None,
    ) -> None:
        self.part = part if isinstance(part, Share) else Share(shape=part)
        self.m, self.n = self.part.shape
        self.device = device
        dtype = reduce.wide(device)
        self._sums: dict[str, Tensor | float] = {}  # nonzero ones only, as numbers if the host knows them
        self._row_sum = torch.zeros(self.n, dtype=dtype, device=device)
        self._input_sum = torch.zeros(self.n, dtype=dtype, device=device)
        self._output_sum = torch.zeros(self.m if self.part.spread else 0, dtype=dtype, device=device)
        self._whole_row_sum: Tensor | None = None  # of this rank's columns
        self._rounding = 0.0
        self._biased = False
        self._spectral = spectral
        self._softmax = softmax
        self._output_energy = OutputEnergy(Way("exact") if way is None else way)
        self.grams: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def add(
        self,
        weight: LinearMap | Tensor,
        inputs: Tensor,
        *,
        outputs: Tensor | None = None,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Add this rank's part of one call of the layer.

        Shapes: weight [m, n], inputs [..., n], outputs [..., m] including the bias, mask [...] of bool. Without
        outputs, weight and inputs give E_Z.

        Raises:
            InputError: some calls of the step have a bias in their outputs and others do not.
        """
        mapped = weight if isinstance(weight, LinearMap) else Dense(weight)
        inputs = inputs.detach()
        if outputs is None:
            bias = None  # energies computed here exclude it
        if self._whole_row_sum is not None and self._biased != (bias is not None):
            raise InputError(
                "expected all calls of a layer within one step to be with a bias in their outputs, or all without, "
                "found both; pass outputs and bias to every call, or to none"
            )
        self._biased = bias is not None
        with torch.autocast(inputs.device.type, enabled=False):
            flat_mask = None if mask is None else mask.to(inputs.device).reshape(-1)
            n = mapped.shape[1]
            tokens = inputs.numel() // n
            part = self.part
            if flat_mask is None:
                rows = inputs.reshape(-1, n)
            else:
                # Selected, not multiplied: a NaN in a token that does not count must not survive as 0 * NaN.
                rows = torch.where(flat_mask[:, None], inputs.reshape(-1, n), inputs.new_zeros(()))
                self._sums["masked"] = 1.0
            input_rows = reduce.row_energies(rows)
            columns = slice(part.first_column, part.first_column + n)
            self._input_sum[columns] += _share(reduce.column_sum(rows), part.of_input)
            whole_row_sum = self._add_weight(mapped, bias, columns)
            self._add("input", input_rows.sum(), part.of_input)
            if self._softmax:
                logit_sums = reduce.product(rows, whole_row_sum)
                self._add("logit_sum_energy", logit_sums.square().sum(), part.of_input)
            self._add("input_nonfinite", reduce.count_nonfinite(input_rows), part.of_input)
            self._add("tokens", float(tokens) if flat_mask is None else flat_mask.sum(), part.of_tokens)
            self._add("tokens_offered", float(tokens), part.of_tokens)
            self._add_outputs(mapped, rows, outputs, flat_mask)
            if self._spectral:
                self._add_grams(mapped, rows)

    def _add(self, name: str, value: Tensor | float, share: float = 1.0) -> None:
        known, value = self._sums.get(name), _share(value, share)
        self._sums[name] = value if known is None else known + value

    def _add_weight(self, weight: LinearMap, bias: Tensor | None, columns: slice) -> Tensor:
        """Return the sum of all rows in these columns, after one pass over W by blocks that fit the cache.

        Every forward recomputes `W s` from s, the sum of the step's inputs so far, so that the last forward covers all
        inputs. Its vector of vocabulary length is kept only across ranks.
        """
        part = self.part
        first = self._whole_row_sum is None
        row_sum = torch.zeros_like(self._input_sum[columns])
        input_sum = _share(self._input_sum[columns], 1 / part.of_input)
        for name in ("output_sum_energy", "bias_dot_output_sum"):
            self._sums.pop(name, None)
        start = 0
        for block in weight.blocks():
            block = reduce.at_least_float32(block)
            end = start + block.shape[0]
            if first:
                energies = reduce.row_energies(block)
                self._add("weight", energies.sum(), part.of_weight)
                self._add("weight_nonfinite", reduce.count_nonfinite(energies), part.of_weight)
                row_sum += block.sum(0)
            output_sum = _share((block @ input_sum.to(block.dtype)).to(row_sum.dtype), part.of_weight)
            if part.spread:
                self._output_sum[part.first_row + start : part.first_row + end] = output_sum
            self._add("output_sum_energy", output_sum.square().sum())
            if bias is not None:
                own = bias.detach()[start:end].to(row_sum.dtype)
                self._add("bias_dot_output_sum", own @ output_sum)
                if first:
                    self._add("bias_energy", own.square().sum(), part.of_output)
            start = end
        if first:
            self._sums["weighed"] = part.of_tokens
            self._row_sum[columns] = _share(row_sum, part.of_weight)
            whole = part.whole_row_sum if self._softmax else None
            self._whole_row_sum = row_sum if whole is None else whole(row_sum)
        assert self._whole_row_sum is not None
        return self._whole_row_sum

    def _add_outputs(
        self,
        weight: LinearMap,
        rows: Tensor,
        outputs: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        share = self.part.of_output
        if outputs is None:
            row_mean = self._whole_row_sum / self.m if self._softmax and self._whole_row_sum is not None else None
            m, n = weight.shape
            if n < self.n:
                raise InputError(
                    f"expected outputs of a layer of which this rank has {n} of {self.n} columns, found none: what its "
                    "columns give is no energy of the whole; call monitor.observe(weight, inputs) with whole tensors"
                )
            found = self._output_energy.of(weight, rows, mask=mask, row_mean=row_mean, whole=m == self.m)
            self._add("biased_output", found.energy, share)
            self._add("output_variance", found.variance, share)
            self._add("output_rounding", found.rounding, share)
            self._rounding = max(self._rounding, ROUNDING[torch.promote_types(weight.dtype, torch.float32)])
            return
        energies = reduce.row_energies(outputs.detach()).reshape(-1)
        if mask is not None:
            energies = torch.where(mask, energies, energies.new_zeros(()))
        self._add("biased_output", energies.sum(), share)
        self._add("output_nonfinite", reduce.count_nonfinite(energies), share)
        self._rounding = max(self._rounding, ROUNDING.get(outputs.dtype, ROUNDING[torch.float32]))

    def _add_grams(self, weight: LinearMap, rows: Tensor) -> None:
        n = weight.shape[1]
        if n < self.n:
            return  # some columns only: their products with the others are unknown
        part = self.part
        inputs_gram = part.of_input * reduce.gram(reduce.blocks(rows), n, rows.device)
        weight_gram = self.grams[0] if self.grams else part.of_weight * reduce.gram(weight.blocks(), n, rows.device)
        self.grams = (weight_gram, inputs_gram if self.grams is None else self.grams[1] + inputs_gram)

    def pack(self) -> Packed:
        """All sums as one vector."""
        like: dict[str, Any] = {"dtype": self._row_sum.dtype, "device": self.device}
        numbers: dict[float, Tensor] = {}

        def scalar(value: Tensor | float) -> Tensor:
            if isinstance(value, Tensor):
                return value.to(like["dtype"])
            if value not in numbers:
                numbers[value] = torch.full((), value, **like)  # a copy from the host would wait for the device
            return numbers[value]

        scalars = torch.stack([scalar(self._sums.get(name, 0.0)) for name in SCALARS])
        vector = torch.cat([scalars, self._row_sum, self._input_sum, self._output_sum])
        return Packed(vector, self.n, self.m, self._rounding, self.part.spread)


@overload
def _share(value: Tensor, share: float) -> Tensor: ...
@overload
def _share(value: Tensor | float, share: float) -> Tensor | float: ...
def _share(value: Tensor | float, share: float) -> Tensor | float:
    """Return this rank's share of a sum, with no operation if it is 1."""
    return value if share == 1 else share * value


def unpack(packed: Packed, host: np.ndarray[Any, Any]) -> tuple[Energies, int, bool]:
    """Return a packed vector's energies from its host copy, the tokens before the mask, and whether a mask exists."""
    sums = dict(zip(SCALARS, host.tolist(), strict=False))
    ends = np.cumsum([len(SCALARS), packed.n, packed.n])
    row_sum, input_sum, output_sum = (part.astype(np.float64) for part in np.split(host, ends)[1:])
    weighed = sums["weighed"] or 1.0
    for name in OF_WEIGHT:
        sums[name] /= weighed
    if packed.spread:
        # No `@`: vectors this long would wake NumPy's BLAS threads, which then spin beside the training.
        sums["output_sum_energy"] = float(np.square(output_sum).sum())
    tokens = round(sums["tokens"])
    output, output_rounding = sums["biased_output"], sums["output_rounding"]
    if sums["bias_dot_output_sum"] != 0 or sums["bias_energy"] != 0:
        output -= 2 * sums["bias_dot_output_sum"] + tokens * sums["bias_energy"]
        output_rounding += packed.rounding * sums["biased_output"]
    if output != 0:
        output_rounding += product_rounding(packed.rounding / ROUNDING_IN_EPSILONS, sums["weight"], sums["input"])
    nonfinite = math.fsum(sums[f"{name}_nonfinite"] for name in ("weight", "input", "output"))
    energies = Energies(
        n=packed.n,
        m=packed.m,
        tokens=tokens,
        weight=sums["weight"],
        input=sums["input"],
        output=output,
        row_sum=row_sum / weighed,
        input_sum=input_sum,
        logit_sum_energy=sums["logit_sum_energy"],
        output_sum_energy=sums["output_sum_energy"],
        nonfinite=math.ceil(nonfinite - 1e-6),
        output_error=math.sqrt(sums["output_variance"]),
        rounding=packed.rounding,
        output_rounding=output_rounding,
    )
    return energies, round(sums["tokens_offered"]), sums["masked"] > 0
