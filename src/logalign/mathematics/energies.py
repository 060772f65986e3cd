"""Energies: the sums of squares that give the log-alignment ratio of a linear layer.

Method: sums first, ratios and logs last. The sums of one layer `z = W x` merge exactly over tokens (micro-batches,
data parallel ranks) and over output rows (vocabulary shards). LARs do not merge. The alternative, averaging the LAR of
every batch, is simpler and wrong.

Shapes: `W [m, n]`, `X [T, n]`, `Z = X W^T [T, m]` without bias. Centering is the two-way analysis of variance of Z. The
centered forms need only its row sums (over the vocabulary), its column sums (over tokens) and its grand sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from logalign.errors import InputError
from logalign.mathematics.arrays import Array, Layer, checked_layer, to_numpy

Vector = np.ndarray[Any, np.dtype[np.float64]]

SMALLEST_GRAM_OVERLAP = 1e-10
"""Overlap below which the Gram form, an inner product of two matrices, may hold only rounding error in float64."""
SMALLEST_GRAM_OVERLAP_IN_EPSILONS = 1000.0
"""The same limit for sums in a narrower dtype, in units of its roundoff."""
GRAM_DIGITS = 100.0
"""Smallest energy, in unit roundoffs of `E_W E_X`, that the Gram form can distinguish from its rounding error."""


@dataclass(frozen=True, kw_only=True)
class Energies:
    """The energies of one linear layer over a set of tokens, and the sums that centering needs.

    With `E_W = ||W||^2`, `E_X = ||X||^2`, `E_Z = ||Z||^2` (Frobenius norms, Z without bias):

        overlap = E_Z / (E_W E_X),   LAR = 1 + log_n(overlap) / 2,   k = 1 / overlap

    The derived quantities are float. They are NaN where they are undefined: no tokens, a zero or non-finite energy, or
    an energy that is only rounding error. The class clamps nothing.

    Source: Shehper & Vaswani, arXiv 2605.28975; Everett et al., arXiv 2407.05872.

    Attributes:
        n: Fan-in, the columns of W.
        m: Fan-out, the rows of W (the vocabulary of an unembedding).
        tokens: T, the number of tokens in the sums.
        weight: E_W.
        input: E_X.
        output: E_Z.
        row_sum: Sum of the rows of W, shape [n].
        input_sum: Sum of the inputs over tokens, shape [n].
        output_sum_energy: Squared norm of the sum of Z over tokens, `|W input_sum|^2`.
        output_sum: The sum of Z over tokens, shape [m]. None where only its energy is kept. Tokens can then no longer
            be merged.
        logit_sum_energy: Squared norm of the sums of Z over the vocabulary, `|X row_sum|^2`.
        logit_sums: The sums of Z over the vocabulary, shape [T]. None where only their energy is kept. Parts of the
            vocabulary can then no longer be merged.
        nonfinite: Rows of W, X or Z that hold a NaN or an infinity.
        output_error: Standard error of E_Z where it is an estimate from a sample of tokens, 0 where it is exact.
        rounding: Bound on the relative error of the energies. A centered energy below this share of the plain energy
            is undefined. A bound of 1 or more makes every energy undefined.
        output_rounding: Bound on the computed E_Z where the true E_Z is zero. An output energy, plain or centered, that
            does not exceed it is undefined, for either sign. 0 where all outputs are exactly zero.

    Example:
        >>> import numpy as np
        >>> W, X = np.eye(6)[:3], np.eye(6)[:3]
        >>> round(Energies.of(W, X).effective_dim, 6)
        3.0
    """

    n: int
    m: int
    tokens: int
    weight: float
    input: float
    output: float
    row_sum: Vector = field(repr=False)
    input_sum: Vector = field(repr=False)
    logit_sum_energy: float
    output_sum_energy: float
    logit_sums: Vector | None = field(default=None, repr=False)
    output_sum: Vector | None = field(default=None, repr=False)
    nonfinite: int = 0
    output_error: float = 0.0
    rounding: float = 0.0
    output_rounding: float = 0.0

    @classmethod
    @np.errstate(invalid="ignore", over="ignore")  # `reason` counts and names values that are not finite
    def of(
        cls,
        weight: Array,
        inputs: Array,
        *,
        outputs: Array | None = None,
        bias: Array | None = None,
        mask: Array | None = None,
    ) -> Energies:
        """Sum the energies of a layer from its arrays, centered before squaring.

        Args:
            weight: [m, n] (out, in), the layout of torch.nn.Linear.
            inputs: [..., n].
            outputs: [..., m], the layer's outputs, with the bias if `bias` is given. Without them the method never
                forms `[T, m]`: E_Z comes from the Gram identity `<W^T W, X^T X>` or from blocks, whichever is cheaper.
            bias: [m], the layer's bias. The method subtracts it from the outputs and ignores it without outputs.
            mask: [...] of bool, the tokens to count.

        Arrays come from one library (NumPy, PyTorch, JAX, CuPy) and stay on their device. Sums are in float64, or in
        float32 where the library or device has no float64 (JAX by default, MPS).

        Raises:
            InputError: wrong shapes or dtypes, empty arrays, n = 1, a mask of another shape.
        """
        layer = checked_layer(weight, inputs, outputs=outputs, bias=bias, mask=mask)
        m, n = layer.weight.shape
        tokens = layer.inputs.shape[0]
        if tokens == 0:
            return cls._without_tokens(layer)
        xp = layer.xp
        row_sum = _sum_rows(layer, layer.weight)
        input_sum = _sum_rows(layer, layer.inputs)
        weight_mean, input_mean = row_sum / m, input_sum / tokens
        inputs_centered = layer.wide(layer.inputs) - input_mean
        input_centered_energy = float(xp.sum(inputs_centered * inputs_centered))
        logits_of_mean_row = inputs_centered @ weight_mean
        outputs_of_mean_input = xp.concat(
            [(block - weight_mean) @ input_mean for _, block in layer.blocks(layer.weight, n)]
        )
        grand_mean = float(to_numpy(weight_mean) @ to_numpy(input_mean))
        if layer.outputs is None:
            doubly_centered = _output_energy(layer, inputs_centered, weight_mean)
        else:
            offset = outputs_of_mean_input + grand_mean
            if layer.bias is not None:
                offset = offset + layer.wide(layer.bias)
            doubly_centered = sum(
                float(xp.sum((block - offset - logits_of_mean_row[part][:, None]) ** 2))
                for part, block in layer.blocks(layer.outputs, m)
            )
        # The two vectors have mean zero up to rounding. This step makes the mean exact. The centered energies are
        # differences and then lose no precision.
        token_effect = _centered(to_numpy(logits_of_mean_row))
        vocabulary_effect = _centered(to_numpy(outputs_of_mean_input))
        logit_sums = m * (token_effect + grand_mean)
        output_mean = vocabulary_effect + grand_mean
        weight_centered_energy = sum(
            float(xp.sum((block - weight_mean) ** 2)) for _, block in layer.blocks(layer.weight, n)
        )
        row_sum_host, input_sum_host = m * to_numpy(weight_mean), tokens * to_numpy(input_mean)
        output_energy = doubly_centered
        output_energy += m * float(token_effect @ token_effect) + tokens * float(output_mean @ output_mean)
        weight_energy = weight_centered_energy + float(row_sum_host @ row_sum_host) / m
        input_energy = input_centered_energy + float(input_sum_host @ input_sum_host) / tokens
        output_rounding = product_rounding(layer.epsilon, weight_energy, input_energy) if output_energy else 0.0
        if layer.outputs is not None:
            epsilon = max(layer.epsilon, float(xp.finfo(layer.outputs.dtype).eps))
            bias = np.zeros(m) if layer.bias is None else to_numpy(layer.bias)
            output_rounding += 4 * epsilon**2 * (output_energy + tokens * float(bias @ bias))
        by_weight, by_input = layer.weight_scale, layer.input_scale
        return cls(
            n=n,
            m=m,
            tokens=tokens,
            weight=by_weight**2 * weight_energy,
            input=by_input**2 * input_energy,
            output=(by_weight * by_input) ** 2 * output_energy,
            row_sum=by_weight * row_sum_host,
            input_sum=by_input * input_sum_host,
            logit_sum_energy=(by_weight * by_input) ** 2 * float(logit_sums @ logit_sums),
            output_sum_energy=(by_weight * by_input * tokens) ** 2 * float(output_mean @ output_mean),
            logit_sums=by_weight * by_input * logit_sums,
            output_sum=by_weight * by_input * tokens * output_mean,
            nonfinite=_nonfinite_rows(layer),
            rounding=max(16 * float(np.finfo(np.float64).eps), 4 * layer.epsilon**2),
            output_rounding=(by_weight * by_input) ** 2 * output_rounding,
        )

    @classmethod
    def _without_tokens(cls, layer: Layer) -> Energies:
        m, n = layer.weight.shape
        return cls(
            n=n,
            m=m,
            tokens=0,
            weight=layer.weight_scale**2
            * sum(float(layer.xp.sum(block**2)) for _, block in layer.blocks(layer.weight, n)),
            input=0.0,
            output=0.0,
            row_sum=layer.weight_scale * to_numpy(_sum_rows(layer, layer.weight)),
            input_sum=np.zeros(n),
            logit_sum_energy=0.0,
            output_sum_energy=0.0,
            logit_sums=np.zeros(0),
            output_sum=np.zeros(m),
            nonfinite=_nonfinite_rows(layer),
            rounding=16 * float(np.finfo(np.float64).eps),
        )

    @property
    def overlap(self) -> float:
        """`<p, q> = E_Z / (E_W E_X)`, in [0, 1]."""
        return math.nan if self._is_rounding(self.output) else _overlap(self.weight, self.input, self.output)

    @property
    def lar(self) -> float:
        """`1 + log_n(overlap) / 2`, the plain log-alignment ratio."""
        return _lar(self.overlap, self.n)

    @property
    def effective_dim(self) -> float:
        """`k = 1 / overlap = n^(2 (1 - LAR))`, in [1, inf)."""
        return 1 / self.overlap if self.overlap > 0 else math.nan

    @property
    def lar_vocab_centered(self) -> float:
        """LAR after subtracting the vocabulary mean from the rows of W, a shift that leaves a softmax unchanged."""
        return self._centered_lar(self._weight_centered, self.input, self._output_vocab_centered)

    @property
    def lar_token_centered(self) -> float:
        """LAR after subtracting the mean input from the inputs."""
        return self._centered_lar(self.weight, self._input_centered, self._output_token_centered)

    @property
    def lar_centered(self) -> float:
        """LAR after subtracting both means."""
        return self._centered_lar(self._weight_centered, self._input_centered, self._output_centered)

    @property
    def standard_errors(self) -> dict[str, float]:
        """Standard errors of the forms of LAR, by name, from the standard error of E_Z: `error / (2 ln(n) E_Z)`.

        The formula is first order. A centered form uses its centered output energy, and its other parts are exact. The
        error is 0 where E_Z is exact and NaN where the form is undefined.
        """
        outputs = {
            "lar": self.output,
            "lar_vocab_centered": self._output_vocab_centered,
            "lar_token_centered": self._output_token_centered,
            "lar_centered": self._output_centered,
        }
        scale = self.output_error / (2 * math.log(self.n))
        return {
            name: scale / output if math.isfinite(getattr(self, name)) else math.nan for name, output in outputs.items()
        }

    @property
    def reason(self) -> str | None:
        """The reason why the plain LAR is undefined, or None where it is defined."""
        if self.nonfinite:
            return f"{self.nonfinite} rows of weight, inputs or outputs hold a NaN or an infinity"
        if self.tokens == 0:
            return "no token: the mask keeps none"
        for name, energy in (("weight", self.weight), ("input", self.input), ("output", self.output)):
            if not math.isfinite(energy):
                return f"the {name} energy is not finite"
            if energy == 0 and (name != "output" or self.output_rounding == 0):
                return f"the {name} energy is zero"
        if self._is_rounding(self.output):
            return "nothing but rounding is left of the output energy"
        return None

    def merge_tokens(self, other: Energies) -> Energies:
        """Merge the energies over the tokens of both: E_X and E_Z add, E_W stays.

        Raises:
            InputError: the two have different weights, or one has no `output_sum`.
        """
        self._check_equal(other, "merge_tokens", m=(self.m, other.m), n=(self.n, other.n))
        self._check_close(other, "merge_tokens", "weight", self.weight, other.weight)
        if self.output_sum is None or other.output_sum is None:
            raise InputError(
                "merge_tokens: expected output_sum in both, found None; the mean over tokens has to be formed output "
                "by output, so merge the tokens before the sums over outputs are closed"
            )
        output_sum = self.output_sum + other.output_sum
        kept = self.logit_sums is not None and other.logit_sums is not None
        return replace(
            self,
            tokens=self.tokens + other.tokens,
            input=self.input + other.input,
            output=self.output + other.output,
            input_sum=self.input_sum + other.input_sum,
            logit_sum_energy=self.logit_sum_energy + other.logit_sum_energy,
            output_sum_energy=float(output_sum @ output_sum),
            logit_sums=np.concatenate([self.logit_sums, other.logit_sums]) if kept else None,
            output_sum=output_sum,
            nonfinite=self.nonfinite + other.nonfinite,
            output_error=math.hypot(self.output_error, other.output_error),
            rounding=max(self.rounding, other.rounding),
            output_rounding=self.output_rounding + other.output_rounding,
        )

    def merge_rows(self, other: Energies) -> Energies:
        """Merge the energies over the output rows of both (vocabulary shards): E_W and E_Z add, E_X stays.

        Raises:
            InputError: the two have different tokens, or one has no `logit_sums`.
        """
        self._check_equal(other, "merge_rows", n=(self.n, other.n), tokens=(self.tokens, other.tokens))
        self._check_close(other, "merge_rows", "input", self.input, other.input)
        if self.logit_sums is None or other.logit_sums is None:
            raise InputError(
                "merge_rows: expected logit_sums in both, found None; the mean over the vocabulary has to be formed "
                "token by token, so merge the rows before the sums over tokens are closed"
            )
        logit_sums = self.logit_sums + other.logit_sums
        kept = self.output_sum is not None and other.output_sum is not None
        return replace(
            self,
            m=self.m + other.m,
            weight=self.weight + other.weight,
            output=self.output + other.output,
            row_sum=self.row_sum + other.row_sum,
            logit_sum_energy=float(logit_sums @ logit_sums),
            output_sum_energy=self.output_sum_energy + other.output_sum_energy,
            logit_sums=logit_sums,
            output_sum=np.concatenate([self.output_sum, other.output_sum]) if kept else None,
            nonfinite=self.nonfinite + other.nonfinite,
            # Both cover the same tokens, so the errors may have the same sign.
            output_error=self.output_error + other.output_error,
            rounding=max(self.rounding, other.rounding),
            output_rounding=self.output_rounding + other.output_rounding,
        )

    @property
    def _weight_centered(self) -> float:
        return self.weight - _dot(self.row_sum, self.row_sum) / self.m

    @property
    def _input_centered(self) -> float:
        return self.input - _dot(self.input_sum, self.input_sum) / self.tokens if self.tokens else math.nan

    @property
    def _output_vocab_centered(self) -> float:
        return self.output - self._row_mean_energy

    @property
    def _output_token_centered(self) -> float:
        return self.output - self._column_mean_energy

    @property
    def _output_centered(self) -> float:
        if self.tokens == 0:
            return math.nan
        grand = _dot(self.row_sum, self.input_sum)
        return self._output_vocab_centered - self._column_mean_energy + grand * grand / (self.m * self.tokens)

    @property
    def _row_mean_energy(self) -> float:
        """`m |u|^2`: the energy of Z's means over the vocabulary."""
        return self.logit_sum_energy / self.m

    @property
    def _column_mean_energy(self) -> float:
        """`T |v|^2`: the energy of Z's means over tokens."""
        return self.output_sum_energy / self.tokens if self.tokens else math.nan

    def _centered_lar(self, weight: float, input_: float, output: float) -> float:
        for energy, whole in ((weight, self.weight), (input_, self.input)):
            if not energy > self.rounding * whole:
                return math.nan
        if self._is_rounding(output):
            return math.nan
        return _lar(_overlap(weight, input_, output), self.n)

    def _is_rounding(self, output: float) -> bool:
        """True if an output energy, plain or centered, is within the rounding error of the terms behind it."""
        return self.rounding >= 1 or output <= max(self.rounding * self.output, self.output_rounding)

    def _check_equal(self, other: Energies, method: str, **pairs: tuple[int, int]) -> None:
        for name, (mine, theirs) in pairs.items():
            if mine != theirs:
                raise InputError(f"{method}: expected equal {name}, found {mine} and {theirs}")

    def _check_close(self, other: Energies, method: str, name: str, mine: float, theirs: float) -> None:
        tolerance = 4 * max(self.rounding, other.rounding)
        if math.isfinite(mine) and math.isfinite(theirs) and abs(mine - theirs) > tolerance * max(mine, theirs):
            raise InputError(
                f"{method}: expected the same {name} energy in both, found {mine!r} and {theirs!r}; "
                f"they are not of the same {name}"
            )


def lar(
    weight: Array,
    inputs: Array,
    *,
    outputs: Array | None = None,
    bias: Array | None = None,
    mask: Array | None = None,
) -> float:
    """Compute the log-alignment ratio of a linear layer.

        LAR = log_n( ||Z||_RMS / (||W||_RMS ||X||_RMS) ) = 1 + log_n( E_Z / (E_W E_X) ) / 2

    Independent random W and X give about 1/2. A rank-one W with all inputs aligned to it gives 1.

    Args:
        weight: [m, n] (out, in), the layout of torch.nn.Linear.
        inputs: [..., n].
        outputs: [..., m], if available, with the bias if `bias` is given.
        bias: [m], never part of the ratio.
        mask: [...] of bool, the tokens to count.

    Returns:
        The ratio as a float, from sums in float64 where the framework has it. NaN where it is undefined (no token kept,
        a zero or non-finite norm).

    Raises:
        InputError: wrong shapes or dtypes, empty arrays, n = 1, a mask of another shape.

    Source: Everett et al., arXiv 2407.05872; Shehper & Vaswani, arXiv 2605.28975.

    Example:
        >>> import numpy as np
        >>> row = np.array([3.0, 4.0])
        >>> round(lar(np.outer([1.0, 2.0, -1.0], row), np.outer([1.0, -2.0], row)), 12)
        1.0
    """
    return Energies.of(weight, inputs, outputs=outputs, bias=bias, mask=mask).lar


def effective_dim(lar: float, n: int) -> float:
    """Compute the effective dimension `k = n^(2 (1 - LAR))` of the function that a layer of fan-in n has learned.

    Returns:
        k, in [1, inf) for LAR in (-inf, 1]. NaN for a LAR of NaN.

    Raises:
        InputError: n is less than 2.

    Source: Shehper & Vaswani, arXiv 2605.28975.

    Example:
        >>> effective_dim(0.5, 64)
        64.0
        >>> effective_dim(1.0, 64)
        1.0
    """
    if n < 2:
        raise InputError(f"n: expected a fan-in of at least 2, found {n}; log_n is undefined below")
    return float(n ** (2 * (1 - lar)))


def product_rounding(epsilon: float, weight: Any, input_: Any) -> Any:
    """Bound on the computed energy of `X W^T`, a sum of squares, where its true value is zero."""
    return epsilon**2 * weight * input_


def _overlap(weight: float, input_: float, output: float) -> float:
    defined = all(math.isfinite(energy) and energy > 0 for energy in (weight, input_, output))
    # Two divisions: the product of two energies may leave the range of a float where the overlap does not.
    return output / weight / input_ if defined else math.nan


def _lar(overlap: float, n: int) -> float:
    return 1 + math.log(overlap, n) / 2 if overlap > 0 else math.nan


def _sum_rows(layer: Layer, array: Array) -> Array:
    parts = [layer.xp.sum(block, axis=0) for _, block in layer.blocks(array, array.shape[1])]
    return layer.xp.sum(layer.xp.stack(parts), axis=0)


def _output_energy(layer: Layer, inputs: Array, row_offset: Array) -> float:
    """Compute `||X (W - 1 row_offset^T)^T||^2` without forming its [T, m] matrix."""
    xp = layer.xp
    m, n = layer.weight.shape
    tokens = inputs.shape[0]
    if (tokens + m) * n < tokens * m:
        gram = inputs.T @ inputs
        energy = weight_energy = 0.0
        for _, block in layer.blocks(layer.weight, n):
            rows = block - row_offset
            energy += float(xp.sum((rows @ gram) * rows))
            weight_energy += float(xp.sum(rows * rows))
        input_energy = float(xp.sum(inputs * inputs))
        smallest = max(SMALLEST_GRAM_OVERLAP, SMALLEST_GRAM_OVERLAP_IN_EPSILONS * layer.epsilon)
        if energy > smallest * weight_energy * input_energy:
            return energy
    return sum(
        float(xp.sum((inputs @ (block - row_offset).T) ** 2)) for _, block in layer.blocks(layer.weight, max(tokens, n))
    )


def _dot(a: Vector, b: Vector) -> float:
    """The inner product without `@`, which starts threads for long vectors that then spin beside the training."""
    return float((a * b).sum())


def _centered(vector: Vector) -> Vector:
    centered: Vector = vector - vector.mean()
    return centered


def _nonfinite_rows(layer: Layer) -> int:
    arrays = [array for array in (layer.weight, layer.inputs, layer.outputs) if array is not None]
    rows_finite = [layer.xp.all(layer.xp.isfinite(array), axis=1) for array in arrays]
    return sum(int(layer.xp.sum(layer.xp.astype(~finite, layer.xp.int32))) for finite in rows_finite)
