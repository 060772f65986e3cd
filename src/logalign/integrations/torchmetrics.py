"""torchmetrics: the log-alignment ratio as a `Metric`, whose states are sums over updates and ranks.

Method: the metric holds the sums of `logalign.torch.meter` in one vector. Updates, `forward()`, a MetricCollection and
ranks merge by addition, and `compute()` takes the ratios. A mean of the batches' LARs would be simpler but wrong.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from logalign.common.extras import load
from logalign.errors import InputError, LogAlignWarning
from logalign.mathematics.arrays import checked_layer
from logalign.mathematics.energies import Energies
from logalign.torch.meter import SCALARS, Meter, Packed, Share, unpack
from logalign.torch.reduce import wide

if TYPE_CHECKING:
    from torchmetrics import Metric
else:
    Metric = load(
        "torchmetrics", extra="torchmetrics", purpose="LogAlignmentRatio", supported="1.2,2", package="torchmetrics"
    ).Metric

Form = Literal["lar", "lar_vocab_centered", "lar_token_centered", "lar_centered", "effective_dim"]
STATES = ("sums", "weight_squares", "rounding")
DOT, BIAS_ENERGY, TOKENS, WEIGHT, WEIGHED = (
    SCALARS.index(name) for name in ("bias_dot_output_sum", "bias_energy", "tokens", "weight", "weighed")
)
SAME_WEIGHT = 1e-6
"""Relative spread of W's energies over updates and ranks, above which W counts as changed."""


class LogAlignmentRatio(Metric):
    """The log-alignment ratio of a linear layer `z = W x + b`, over all tokens of all updates and ranks.

        LAR = 1 + log_n( E_Z / (E_W E_X) ) / 2

    E_X and E_Z add over updates and ranks. E_W is the same in all of them, because the metric describes one weight. If
    W changes between updates, E_W is the mean over updates and belongs to no actual layer. `compute()` then warns: call
    `reset()` after every optimizer step. The metric adds up all updates, in training and evaluation alike.

    Args:
        shape: (m, n) of the weight (out, in), as `head.weight.shape` gives it.
        form: The result of `compute()`: "lar", "lar_vocab_centered", "lar_token_centered", "lar_centered", or
            "effective_dim".
        **options: Arguments of `torchmetrics.Metric`: sync_on_compute, process_group and so on.

    States are float64 (float32 on MPS) and stay so under `.to(torch.bfloat16)`, `.half()` and the like. `set_dtype()`
    changes them. They take 2n + m numbers.

    Raises:
        InputError: the shape is not valid, or the form is unknown.

    Source: Shehper & Vaswani, arXiv 2605.28975, as in `logalign.lar`, the functional version.

    Example:
        >>> import torch
        >>> metric = LogAlignmentRatio((3, 2))
        >>> row = torch.tensor([3.0, 4.0])
        >>> weight = torch.outer(torch.tensor([1.0, 2.0, -1.0]), row)
        >>> metric.update(weight, torch.outer(torch.tensor([1.0, -2.0]), row))
        >>> round(float(metric.compute()), 6)
        1.0
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    sums: Tensor
    weight_squares: Tensor
    rounding: Tensor

    def __init__(self, shape: Sequence[int], *, form: Form = "lar", **options: Any) -> None:
        super().__init__(**options)
        if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
            raise InputError(
                f"shape: expected (m, n) of a weight (out, in) with fan-in n of at least 2, found {tuple(shape)}"
            )
        if form not in get_args(Form):
            raise InputError(f"form: expected one of {', '.join(get_args(Form))}, found {form!r}")
        self.m, self.n = (int(length) for length in shape)
        self.form = form
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("sums", torch.zeros(len(SCALARS) + 2 * self.n + self.m, dtype=torch.float64), "sum")
        self.add_state("weight_squares", zero.clone(), "sum")
        self.add_state("rounding", zero.clone(), "max")

    def update(
        self,
        weight: Tensor,
        inputs: Tensor,
        outputs: Tensor | None = None,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Add a batch without waiting for the device.

        Args:
            weight: [m, n].
            inputs: [..., n].
            outputs: [..., m] with the bias, if available. Without them weight and inputs give E_Z.
            bias: [m], if the outputs contain one.
            mask: [...] of bool, the tokens that count.

        Raises:
            InputError: a shape or dtype is wrong.
        """
        checked_layer(weight, inputs, outputs=outputs, bias=bias)
        if tuple(weight.shape) != (self.m, self.n):
            raise InputError(f"weight: expected shape {(self.m, self.n)}, found {tuple(weight.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != inputs.shape[:-1]):
            raise InputError(
                f"mask: expected bool of shape {tuple(inputs.shape[:-1])}, found {mask.dtype} of {tuple(mask.shape)}"
            )
        meter = Meter(Share(shape=(self.m, self.n), spread=True), inputs.device)
        meter.add(weight.detach(), inputs, outputs=outputs, bias=bias, mask=mask)
        packed = meter.pack()
        vector = packed.vector.clone()
        # Each update has its own part for the bias, because only some updates may have a bias.
        vector[DOT] += vector[TOKENS] * vector[BIAS_ENERGY] / 2
        vector[BIAS_ENERGY] = 0
        energy = vector[WEIGHT]
        self.sums = self.sums + vector.to(self.sums)
        self.weight_squares = self.weight_squares + energy.square().to(self.weight_squares)
        self.rounding = self.rounding.clamp(min=packed.rounding)

    def compute(self) -> Tensor:
        """Return the ratio over all updates and ranks, or NaN with a warning that says why it is undefined."""
        energies = self.energies()
        value = getattr(energies, self.form)
        if math.isnan(value):
            reason = energies.reason or "nothing but rounding is left of an energy once it is centered"
            self._warn(f"{self.form} is undefined, for {reason}")
        return torch.tensor(value, dtype=self.sums.dtype, device=self.sums.device)

    def energies(self) -> Energies:
        """Return the energies summed over this rank, or over all ranks inside `sync_context()`."""
        host = torch.cat([self.sums, self.weight_squares[None], self.rounding[None]]).double().cpu().numpy()
        vector, squares, rounding = host[:-2], float(host[-2]), float(host[-1])
        times = vector[WEIGHED]
        if times:
            mean = vector[WEIGHT] / times
            spread = squares / times - mean * mean
            if spread > max(SAME_WEIGHT**2, 16 * torch.finfo(self.sums.dtype).eps) * mean * mean:
                self._warn(
                    "the weight changed between updates, and its energy is the mean over them; call reset() after "
                    "every optimizer step"
                )
        return unpack(Packed(self.sums, self.n, self.m, rounding, spread=True), vector)[0]

    def _apply(self, fn: Callable[..., Any], *rest: Any, **options: Any) -> LogAlignmentRatio:
        """Let `.to(torch.bfloat16)` move states and not cast them, as torchmetrics does for `.bfloat16()`."""
        if self._dtype_convert:  # set_dtype()
            super()._apply(fn, *rest, **options)
            return self
        # A float32 number finds the states' new device, because some devices have no float64.
        probe = torch.zeros((), device=self.sums.device)
        held = {name: getattr(self, name) for name in (*STATES, "_computed", "_forward_cache")}
        defaults = {name: self._defaults[name] for name in STATES}
        for name in STATES:
            setattr(self, name, probe)
            self._defaults[name] = probe
        self._computed = self._forward_cache = None
        device = probe.device
        try:
            super()._apply(fn, *rest, **options)
            device = self.sums.device
        finally:
            for name, value in held.items():
                setattr(self, name, _moved(value, device))
            for name, value in defaults.items():
                self._defaults[name] = _moved(value, device)
        return self

    def _warn(self, message: str) -> None:
        warnings.warn(f"logalign: LogAlignmentRatio: {message}", LogAlignWarning, stacklevel=3)


def _moved(value: Any, device: torch.device) -> Any:
    """Return a tensor on another device, in its own width if the device has it, and any other value as it is."""
    if not isinstance(value, Tensor):
        return value
    narrow = value.dtype == torch.float64 and wide(device) != torch.float64
    return value.to(device, torch.float32 if narrow else value.dtype)
