"""Meter: the sums of one layer over one monitored step, kept on the device until the step is read.

Everything that is measured is a sum over tokens, so the micro-batches of a step pool by addition. Of the weight, each
quantity is taken at the step's first forward. Nothing here waits for the device but `Packed` on its way to the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logalign.energies import Energies
from logalign.torch import reduce

ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 5e-4, torch.float16: 5e-4}
"""Bound on the relative error of the energies, by the dtype of the outputs; a centered energy below it is undefined."""

SCALARS = (
    "weight",
    "input",
    "biased_output",
    "logit_sum_energy",
    "bias_dot_output_sum",
    "bias_energy",
    "tokens",
    "tokens_offered",
    "nonfinite",
)


@dataclass(frozen=True)
class Packed:
    """A meter's sums as one vector on the device, ready for one transfer, and what is needed to read it there."""

    vector: Tensor
    n: int
    m: int
    rounding: float
    masked: bool


class Meter:
    """Sums of one layer `z = W x + b` over the forwards of one monitored step.

    Args:
        n: Fan-in.
        m: Fan-out.
        device: Where the layer's tensors are.
        spectral: Accumulate the Gram matrices `W^T W` and `X^T X`, too.
    """

    def __init__(self, n: int, m: int, device: torch.device, *, spectral: bool = False) -> None:
        self.n, self.m = n, m
        dtype = reduce.wide(device)
        self._sums = {name: torch.zeros((), dtype=dtype, device=device) for name in SCALARS}
        self._row_sum: Tensor | None = None
        self._input_sum = torch.zeros(n, dtype=dtype, device=device)
        self._output_sum = torch.zeros(m, dtype=dtype, device=device)
        self._rounding = 0.0
        self._masked = False
        self._spectral = spectral
        self.grams: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def add(
        self,
        weight: Tensor,
        inputs: Tensor,
        *,
        outputs: Tensor | None = None,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Add one call of the layer.

        Shapes: weight [m, n], inputs [..., n], outputs [..., m] with the bias in it, mask [...] of bool. Without
        outputs E_Z is taken from weight and inputs.
        """
        weight, inputs = weight.detach(), inputs.detach()
        if outputs is None:
            bias = None  # what is computed here has none in it
        with torch.autocast(inputs.device.type, enabled=False):
            flat_mask = None if mask is None else mask.to(inputs.device).reshape(-1)
            tokens = inputs.numel() // self.n
            if flat_mask is None:
                rows = inputs.reshape(-1, self.n)
            else:
                # Selected, not multiplied: a NaN in a token that does not count must not survive as 0 * NaN.
                rows = torch.where(flat_mask[:, None], inputs.reshape(-1, self.n), inputs.new_zeros(()))
                self._masked = True
            input_rows = reduce.row_energies(rows)
            input_sum = reduce.column_sum(rows)
            first = self._row_sum is None
            if first:
                self._row_sum = self._add_weight(weight, bias)
            assert self._row_sum is not None
            output_sum = reduce.product(weight, input_sum)
            sums = self._sums
            sums["input"] += input_rows.sum()
            sums["logit_sum_energy"] += reduce.product(rows, self._row_sum).square().sum()
            sums["nonfinite"] += (~input_rows.isfinite()).sum()
            sums["tokens"] += tokens if flat_mask is None else flat_mask.sum()
            sums["tokens_offered"] += tokens
            self._input_sum += input_sum
            self._output_sum += output_sum
            self._add_outputs(weight, rows, outputs, bias, output_sum, flat_mask)
            if self._spectral:
                self._add_grams(weight, rows)

    def _add_weight(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        parts, row_energies = [], []
        for block in reduce.blocks(weight):
            block = reduce.at_least_float32(block)
            row_energies.append(reduce.row_energies(block))
            parts.append(block.sum(0))
        energies = torch.cat(row_energies)
        self._sums["weight"] += energies.sum()
        self._sums["nonfinite"] += (~energies.isfinite()).sum()
        if bias is not None:
            self._sums["bias_energy"] += bias.detach().to(energies.dtype).square().sum()
        return torch.stack(parts).to(energies.dtype).sum(0)

    def _add_outputs(
        self,
        weight: Tensor,
        rows: Tensor,
        outputs: Tensor | None,
        bias: Tensor | None,
        output_sum: Tensor,
        mask: Tensor | None,
    ) -> None:
        if outputs is None:
            self._sums["biased_output"] += reduce.output_energy(weight, rows)
            self._rounding = max(self._rounding, ROUNDING[torch.promote_types(weight.dtype, torch.float32)])
            return
        energies = reduce.row_energies(outputs.detach()).reshape(-1)
        if mask is not None:
            energies = torch.where(mask, energies, energies.new_zeros(()))
        self._sums["biased_output"] += energies.sum()
        self._sums["nonfinite"] += (~energies.isfinite()).sum()
        self._rounding = max(self._rounding, ROUNDING.get(outputs.dtype, ROUNDING[torch.float32]))
        if bias is not None:
            self._sums["bias_dot_output_sum"] += bias.detach().to(output_sum.dtype) @ output_sum

    def _add_grams(self, weight: Tensor, rows: Tensor) -> None:
        inputs_gram = reduce.gram(rows)
        weight_gram = reduce.gram(weight) if self.grams is None else self.grams[0]
        self.grams = (weight_gram, inputs_gram if self.grams is None else self.grams[1] + inputs_gram)

    def pack(self) -> Packed:
        """All sums as one vector."""
        assert self._row_sum is not None
        scalars = torch.stack([self._sums[name] for name in SCALARS])
        vector = torch.cat([scalars, self._row_sum, self._input_sum, self._output_sum])
        return Packed(vector, self.n, self.m, self._rounding, self._masked)


def unpack(packed: Packed, host: np.ndarray[Any, Any]) -> tuple[Energies, int, bool]:
    """The energies that a packed vector holds once it is on the host; tokens before the mask; whether there was one."""
    sums = dict(zip(SCALARS, host.tolist(), strict=False))
    row_sum, input_sum, output_sum = np.split(host[len(SCALARS) :].astype(np.float64), [packed.n, 2 * packed.n])
    tokens = int(sums["tokens"])
    correction = 2 * sums["bias_dot_output_sum"] + tokens * sums["bias_energy"]
    if sums["bias_dot_output_sum"] == 0 and sums["bias_energy"] == 0:
        correction = 0.0
    output = sums["biased_output"] - correction
    magnified = sums["biased_output"] / output if output > 0 and math.isfinite(output) else 1.0
    energies = Energies(
        n=packed.n,
        m=packed.m,
        tokens=tokens,
        weight=sums["weight"],
        input=sums["input"],
        output=output,
        row_sum=row_sum,
        input_sum=input_sum,
        output_sum=output_sum,
        logit_sum_energy=sums["logit_sum_energy"],
        nonfinite=int(sums["nonfinite"]),
        rounding=packed.rounding * max(1.0, magnified),
    )
    return energies, int(sums["tokens_offered"]), packed.masked
