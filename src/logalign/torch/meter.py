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
from logalign.errors import InputError
from logalign.torch import reduce

ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 5e-4, torch.float16: 5e-4}
"""Bound on the relative error of the energies, by the dtype of the outputs; a centered energy below it is undefined."""

SCALARS = (
    "weight",
    "input",
    "biased_output",
    "logit_sum_energy",
    "output_sum_energy",
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
        self._rounding = 0.0
        self._masked = False
        self._biased = False
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

        Raises:
            InputError: some calls of the step have a bias in their outputs and others have not.
        """
        weight, inputs = weight.detach(), inputs.detach()
        if outputs is None:
            bias = None  # what is computed here has none in it
        if self._row_sum is not None and self._biased != (bias is not None):
            raise InputError(
                "expected all calls of a layer within one step to be with a bias in their outputs, or all without, "
                "found both; pass outputs and bias to every call, or to none"
            )
        self._biased = bias is not None
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
            self._input_sum += reduce.column_sum(rows)
            self._row_sum = self._add_weight(weight, bias)
            sums = self._sums
            sums["input"] += input_rows.sum()
            sums["logit_sum_energy"] += reduce.product(rows, self._row_sum).square().sum()
            sums["nonfinite"] += (~input_rows.isfinite()).sum()
            sums["tokens"] += tokens if flat_mask is None else flat_mask.sum()
            sums["tokens_offered"] += tokens
            self._add_outputs(weight, rows, outputs, flat_mask)
            if self._spectral:
                self._add_grams(weight, rows)

    def _add_weight(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One pass over W, block by block while a block is in the cache; the sum of its rows.

        What needs the inputs of the whole step, `|W s|^2` with s their sum, is formed anew at every forward from the
        sum so far, so that the last one has it all, and no vector of the vocabulary's length is kept.
        """
        sums, row_sum = self._sums, self._row_sum
        first = row_sum is None
        if row_sum is None:
            row_sum = torch.zeros_like(self._input_sum)
        for name in ("output_sum_energy", "bias_dot_output_sum", "bias_energy"):
            sums[name].zero_()
        start = 0
        for block in reduce.blocks(weight):
            block = reduce.at_least_float32(block)
            if first:
                energies = reduce.row_energies(block)
                sums["weight"] += energies.sum()
                sums["nonfinite"] += (~energies.isfinite()).sum()
                row_sum += block.sum(0)
            output_sum = (block @ self._input_sum.to(block.dtype)).to(row_sum.dtype)
            sums["output_sum_energy"] += output_sum.square().sum()
            if bias is not None:
                part = bias.detach()[start : start + block.shape[0]].to(row_sum.dtype)
                sums["bias_dot_output_sum"] += part @ output_sum
                sums["bias_energy"] += part.square().sum()
            start += block.shape[0]
        return row_sum

    def _add_outputs(
        self,
        weight: Tensor,
        rows: Tensor,
        outputs: Tensor | None,
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

    def _add_grams(self, weight: Tensor, rows: Tensor) -> None:
        inputs_gram = reduce.gram(rows)
        weight_gram = reduce.gram(weight) if self.grams is None else self.grams[0]
        self.grams = (weight_gram, inputs_gram if self.grams is None else self.grams[1] + inputs_gram)

    def pack(self) -> Packed:
        """All sums as one vector."""
        assert self._row_sum is not None
        scalars = torch.stack([self._sums[name] for name in SCALARS])
        vector = torch.cat([scalars, self._row_sum, self._input_sum])
        return Packed(vector, self.n, self.m, self._rounding, self._masked)


def unpack(packed: Packed, host: np.ndarray[Any, Any]) -> tuple[Energies, int, bool]:
    """The energies that a packed vector holds once it is on the host; tokens before the mask; whether there was one."""
    sums = dict(zip(SCALARS, host.tolist(), strict=False))
    row_sum, input_sum = np.split(host[len(SCALARS) :].astype(np.float64), 2)
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
        logit_sum_energy=sums["logit_sum_energy"],
        output_sum_energy=sums["output_sum_energy"],
        nonfinite=int(sums["nonfinite"]),
        rounding=packed.rounding * max(1.0, magnified),
    )
    return energies, int(sums["tokens_offered"]), packed.masked
