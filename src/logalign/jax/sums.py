"""Sums: the energies of one linear layer in JAX, from a pure function that returns a small pytree.

Method: JAX has no float64 by default, so the function centers everything before it squares. `Z = X W^T` splits into its
grand mean, an effect of the token, an effect of the vocabulary entry, and the rest, as in a two-way analysis of
variance. The device sums each part separately in float32, and the host combines them in float64. The alternative, plain
sums of squares, is simpler and loses the centered forms where means are large. The formula for a variance over groups
pools the sums over several sets of tokens. It is exact and subtracts nothing large either.

Shapes: `W [m, n]` (out, in), `X [..., n]`, `Z [..., m]`, with T tokens in all. Leading axes are never flattened, so
arrays that are sharded over several axes stay in place.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from logalign.errors import InputError
from logalign.mathematics.energies import GRAM_DIGITS, Energies, Vector, product_rounding

Axes = Hashable | Sequence[Hashable]

EXPONENTS = (-100, 100)
"""Smallest and largest exponent of the power of two that scales an array so that its squares fit in float32."""


@dataclass(frozen=True, kw_only=True)
class Sums:
    """The sums of one layer over a set of tokens, a pytree of arrays on the device.

    W is divided by 2^weight_exponent, X by 2^input_exponent. `vmap` and `scan` give every array a leading axis, which
    `pool()` removes.

    Attributes:
        tokens: T, the tokens that count.
        offered: Tokens before the mask, 0 where `energies(when=False)` summed nothing.
        masked: 1 where there was a mask, else 0.
        weight_centered: `||W - 1 row_mean^T||^2`.
        input_centered: `||X - 1 input_mean^T||^2`.
        output_centered: Energy of Z without its means over tokens and over the vocabulary.
        token_effect: `|(X - 1 input_mean^T) row_mean|^2`.
        vocabulary_effect: `(W - 1 row_mean^T) input_mean`, shape [m].
        row_mean: Mean of the rows of W, shape [n].
        input_mean: Mean of the inputs, shape [n].
        weight_exponent: See above.
        input_exponent: See above.
        nonfinite: Rows of W, X or Z that hold a NaN or an infinity.
        rounding: Bound on the relative error of the energies.
        output_rounding: Bound on the computed output energy where the true one is zero. 0 where all outputs are exactly
            zero.
    """

    tokens: jax.Array
    offered: jax.Array
    masked: jax.Array
    weight_centered: jax.Array
    input_centered: jax.Array
    output_centered: jax.Array
    token_effect: jax.Array
    vocabulary_effect: jax.Array
    row_mean: jax.Array
    input_mean: jax.Array
    weight_exponent: jax.Array
    input_exponent: jax.Array
    nonfinite: jax.Array
    rounding: jax.Array
    output_rounding: jax.Array

    def merge_tokens(self, other: Sums) -> Sums:
        """Merge the sums over the tokens of both, which share the same W, as a pure function."""
        both: Sums = jax.tree.map(lambda *parts: jnp.stack(parts), self, other)
        return both.pool()

    def pool(self) -> Sums:
        """Pool the sums along the leading axis, which share the same W, as a pure function.

        It pools the result of `vmap`, or of `scan` over the micro-batches of one optimizer step.
        """
        first = jnp.argmax(self.offered > 0)  # the other sums may be empty
        row_mean = self.row_mean[first]
        exponent = jnp.max(self.input_exponent)
        down = jnp.ldexp(jnp.ones_like(self.input_centered), self.input_exponent - exponent)
        tokens = self.tokens.astype(self.input_centered.dtype)
        share = tokens / jnp.maximum(jnp.sum(tokens), 1)

        def mean_and_deviations(groups: jax.Array) -> tuple[jax.Array, jax.Array]:
            groups = down[:, None] * groups
            rough = jnp.sum(share[:, None] * groups, axis=0)
            rest = jnp.sum(share[:, None] * (groups - rough), axis=0)
            return rough + rest, (groups - rough) - rest

        input_mean, input_deviations = mean_and_deviations(self.input_mean)
        vocabulary_effect, vocabulary_deviations = mean_and_deviations(self.vocabulary_effect)
        token_deviations = jnp.sum(input_deviations * row_mean, axis=1)

        def energy(within: jax.Array, deviation_energies: jax.Array) -> jax.Array:
            return jnp.sum(down * down * within) + jnp.sum(tokens * deviation_energies)

        return Sums(
            tokens=jnp.sum(self.tokens),
            offered=jnp.sum(self.offered),
            masked=jnp.max(self.masked),
            weight_centered=self.weight_centered[first],
            input_centered=energy(self.input_centered, jnp.sum(jnp.square(input_deviations), axis=1)),
            output_centered=energy(self.output_centered, jnp.sum(jnp.square(vocabulary_deviations), axis=1)),
            token_effect=energy(self.token_effect, jnp.square(token_deviations)),
            vocabulary_effect=vocabulary_effect,
            row_mean=row_mean,
            input_mean=input_mean,
            weight_exponent=self.weight_exponent[first],
            input_exponent=exponent,
            nonfinite=jnp.sum(self.nonfinite),
            rounding=jnp.max(self.rounding),
            output_rounding=jnp.sum(down * down * self.output_rounding),
        )

    def to_energies(self) -> Energies:
        """Wait for the device and return the energies in float64 on the host.

        Raises:
            InputError: the call is inside a traced function, or the sums have a leading axis.
        """
        check_concrete(self)
        host: dict[str, Any] = {name: np.asarray(value) for name, value in vars(jax.device_get(self)).items()}
        by_weight, by_input = (2.0 ** int(host[f"{name}_exponent"]) for name in ("weight", "input"))
        row_mean, input_mean = _wide(host["row_mean"]), _wide(host["input_mean"])
        vocabulary_effect = _wide(host["vocabulary_effect"])
        vocabulary_effect -= vocabulary_effect.mean()  # the mean is zero up to rounding
        numbers = {name: float(value) for name, value in host.items() if value.ndim == 0}
        m, n, tokens = vocabulary_effect.size, row_mean.size, int(host["tokens"])
        grand_mean = _dot(row_mean, input_mean)
        weight = numbers["weight_centered"] + m * _dot(row_mean, row_mean)
        inputs = numbers["input_centered"] + tokens * _dot(input_mean, input_mean)
        logit_sum_energy = m * m * (numbers["token_effect"] + tokens * grand_mean * grand_mean)
        output_sum = tokens * (vocabulary_effect + grand_mean)
        output = numbers["output_centered"] + m * numbers["token_effect"]
        output += tokens * (_dot(vocabulary_effect, vocabulary_effect) + m * grand_mean * grand_mean)
        by_both = by_weight * by_input
        return Energies(
            n=n,
            m=m,
            tokens=tokens,
            weight=by_weight**2 * weight,
            input=by_input**2 * inputs,
            output=by_both**2 * output,
            row_sum=by_weight * m * row_mean,
            input_sum=by_input * tokens * input_mean,
            logit_sum_energy=by_both**2 * logit_sum_energy,
            output_sum_energy=by_both**2 * _dot(output_sum, output_sum),
            output_sum=by_both * output_sum,
            nonfinite=int(host["nonfinite"]),
            rounding=numbers["rounding"],
            output_rounding=by_both**2 * numbers["output_rounding"],
        )


jax.tree_util.register_dataclass(Sums, data_fields=[each.name for each in fields(Sums)], meta_fields=[])


def energies(
    weight: jax.Array,
    inputs: jax.Array,
    *,
    outputs: jax.Array | None = None,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    vocabulary: int | None = None,
    when: jax.Array | bool | None = None,
    tokens_axis: Axes = (),
    rows_axis: Axes = (),
) -> Sums:
    """Sum the energies of a linear layer: a pure function, for use inside `jit`, `grad`, `scan`, `vmap`, `shard_map`.

    Gradients do not flow through it.

    Args:
        weight: [m, n] (out, in). Pass Equinox's `Linear.weight` unchanged. The kernel of Flax and of most Optax
            examples is [in, out], so pass `kernel.T`. An embedding table [vocabulary, features] that is tied to the
            head already has this layout.
        inputs: [..., n], the layer's inputs.
        outputs: [..., m], the layer's outputs, if available, with the bias if `bias` is given. Without them E_Z comes
            from `X W^T`, or, where it is cheaper (`(T + m) n < T m`), from the Gram form `<W^T W, X^T X>`.
        bias: [m]. The function subtracts it from the outputs and ignores it without outputs.
        mask: [...] of bool, the tokens to count.
        vocabulary: Number of rows of W before its padding, for a padded W.
        when: The switch for the sums: a bool or a traced scalar of bool, such as `step % 10 == 0`. False skips the
            computation, and the sums then cover no tokens.
        tokens_axis: The mesh axes that split the tokens inside `shard_map`, or the `axis_name` inside `vmap`.
        rows_axis: The mesh axes that split the rows of W (the vocabulary) inside `shard_map`. Outputs and bias then
            cover only the local rows.

    Returns:
        The sums over the whole of the named axes, equal on every device, so `out_specs=P()` fits. The sums accumulate
        in float32, or in float64 where an argument is float64. `to_energies()` reads them on the host.

    Raises:
        InputError: wrong shapes, dtypes other than floating point, n = 1, a mask of another dtype than bool.

    Source: Shehper & Vaswani, arXiv 2605.28975, and Everett et al., arXiv 2407.05872.

    Example:
        >>> import jax.numpy as jnp
        >>> W, X = jnp.eye(6)[:3], jnp.eye(6)[:3]
        >>> round(jax.jit(energies)(W, X).to_energies().effective_dim, 5)
        3.0
    """
    tokens_axes, rows_axes = _names(tokens_axis), _names(rows_axis)
    arrays = _checked(weight, inputs, outputs=outputs, bias=bias, mask=mask)
    rows = weight.shape[0] * _size(rows_axes)
    if vocabulary is not None and not 1 <= vocabulary <= rows:
        raise InputError(f"vocabulary: expected 1 to {rows}, the rows of the weight, found {vocabulary}")
    floats = {name: array for name, array in arrays.items() if name != "mask"}
    arrays |= lax.optimization_barrier(lax.stop_gradient(floats))  # type: ignore[no-untyped-call]
    sum_all = partial(
        _sum, rows=vocabulary or rows, tokens_axes=tokens_axes, rows_axes=rows_axes, padded=vocabulary is not None
    )
    if when is None:
        return sum_all(arrays)
    if jnp.shape(when) != () or jnp.result_type(when) != jnp.bool_:
        raise InputError(
            f"when: expected one bool, found {jnp.result_type(when)} of shape {jnp.shape(when)}; "
            "compare first, for example step % 10 == 0"
        )
    shapes = jax.eval_shape(sum_all, arrays)
    found: Sums = lax.cond(when, sum_all, lambda _: jax.tree.map(_zeros, shapes), arrays)
    return found


def check_concrete(sums: Sums) -> None:
    """Refuse sums without values and sums that are not yet pooled.

    Raises:
        InputError: the call is inside a traced function, or the sums have a leading axis.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(sums)):
        raise InputError(
            "sums: expected arrays with values, found traced ones: this is inside jit, grad, vmap or scan; return the "
            "sums from the traced function and use them outside"
        )
    if sums.tokens.ndim:
        raise InputError(
            f"sums: expected those of one step, found a leading axis of {sums.tokens.shape}, as vmap and scan give it; "
            "call sums.pool() where it holds parts of one step, or use the steps one by one"
        )


def _sum(
    arrays: dict[str, jax.Array],
    *,
    rows: int,
    tokens_axes: tuple[Hashable, ...],
    rows_axes: tuple[Hashable, ...],
    padded: bool,
) -> Sums:
    """Compute the sums, where `rows` is m of the whole weight without padding."""
    dtype = jnp.float64 if any(array.dtype == jnp.float64 for array in arrays.values()) else jnp.float32
    epsilon = _epsilon(dtype)
    weight, inputs = arrays["weight"].astype(dtype), arrays["inputs"].astype(dtype)
    outputs, mask = arrays.get("outputs"), arrays.get("mask")
    token_mask = None if mask is None else mask[..., None]
    leading = tuple(range(inputs.ndim - 1))
    first_row = lax.axis_index(rows_axes) * weight.shape[0] if rows_axes else 0
    row_mask = (first_row + jnp.arange(weight.shape[0]) < rows)[:, None] if padded else None

    over_tokens = partial(_total, over=tokens_axes, same=rows_axes)
    over_rows = partial(_total, over=rows_axes, same=tokens_axes)
    over_both = partial(_total, over=(*tokens_axes, *rows_axes))

    weight, weight_exponent = _scaled(_kept(weight, row_mask), (*tokens_axes, *rows_axes))
    inputs, input_exponent = _scaled(_kept(inputs, token_mask), (*tokens_axes, *rows_axes))
    offered = over_tokens(jnp.asarray(math.prod(inputs.shape[:-1]), jnp.int32))
    tokens = offered if mask is None else over_tokens(jnp.sum(mask, dtype=jnp.int32))
    count = jnp.maximum(tokens, 1).astype(dtype)

    row_mean, weight = _centered(weight, row_mask, (0,), lambda total: over_rows(total) / rows)
    input_mean, inputs = _centered(inputs, token_mask, leading, lambda total: over_tokens(total) / count)
    # The mean in each product is finite, so only the product of a non-finite row is not finite.
    of_token = _products(inputs, _finite(row_mean))
    of_entry = _products(weight, _finite(input_mean))
    nonfinite = over_rows(_count_nonfinite(of_entry)) + over_tokens(_count_nonfinite(of_token))
    weight_centered = over_rows(jnp.sum(jnp.square(weight)))
    input_centered = over_tokens(jnp.sum(jnp.square(inputs)))
    output_rounding = jnp.zeros((), dtype)
    if outputs is None:
        is_gram = _gram_costs_less(inputs, weight)
        if is_gram:
            output_rounding = GRAM_DIGITS * epsilon / 2 * weight_centered * input_centered
        output_energy = _gram_energy(weight, inputs) if is_gram else _product_energy(weight, inputs)
    else:
        epsilon_of_outputs = _epsilon(outputs.dtype)
        offset = of_entry + jnp.sum(row_mean * input_mean)
        for exponent in (weight_exponent, input_exponent):
            outputs = outputs.astype(dtype) * jnp.ldexp(jnp.ones((), dtype), -exponent)
            if "bias" in arrays:
                arrays = arrays | {"bias": arrays["bias"].astype(dtype) * jnp.ldexp(jnp.ones((), dtype), -exponent)}
        if "bias" in arrays:
            offset = offset + arrays["bias"]
        rest = outputs - _finite(offset) - _finite(of_token)[..., None]
        if row_mask is not None:
            rest = jnp.where(row_mask[:, 0], rest, jnp.zeros((), dtype))
        output_energies = jnp.sum(jnp.square(_kept(rest, token_mask)), axis=-1)
        nonfinite = nonfinite + over_both(_count_nonfinite(output_energies))
        output_energy = jnp.sum(output_energies)
        output_rounding = 4 * epsilon_of_outputs**2 * over_both(output_energy)
        if "bias" in arrays:
            bias = _kept(arrays["bias"], None if row_mask is None else row_mask[:, 0])
            output_rounding += 4 * epsilon_of_outputs**2 * count * over_rows(jnp.sum(jnp.square(bias)))
    output_centered = over_both(output_energy)
    token_effect = over_tokens(jnp.sum(jnp.square(of_token)))
    weight_energy = weight_centered + rows * jnp.sum(jnp.square(row_mean))
    input_energy = input_centered + count * jnp.sum(jnp.square(input_mean))
    is_zero = (output_centered == 0) & (token_effect == 0) & (over_rows(jnp.sum(jnp.square(of_entry))) == 0)
    is_zero &= jnp.sum(row_mean * input_mean) == 0
    output_rounding += jnp.where(is_zero, 0, product_rounding(epsilon, weight_energy, input_energy))
    if rows_axes:
        spread = jnp.zeros(of_entry.shape[0] * _size(rows_axes), dtype)
        of_entry = lax.dynamic_update_slice(spread, of_entry, (first_row,))
    return Sums(
        tokens=tokens,
        offered=offered,
        masked=jnp.asarray(0 if mask is None else 1, jnp.int32),
        weight_centered=weight_centered,
        input_centered=input_centered,
        output_centered=output_centered,
        token_effect=token_effect,
        vocabulary_effect=over_rows(of_entry)[:rows],
        row_mean=row_mean,
        input_mean=input_mean,
        weight_exponent=weight_exponent,
        input_exponent=input_exponent,
        nonfinite=nonfinite,
        rounding=jnp.asarray(
            max(16 * epsilon**2, 16 * 2.0**-52, 0.0 if outputs is None else 4 * epsilon_of_outputs**2), dtype
        ),
        output_rounding=jnp.asarray(output_rounding, dtype),
    )


def _total(value: jax.Array, *, over: tuple[Hashable, ...], same: tuple[Hashable, ...] = ()) -> jax.Array:
    """Sum over the axes `over`, and mark the value as equal over the axes `same`, where all devices hold it."""
    if over:
        value = lax.psum(value, over)  # type: ignore[no-untyped-call]
    if same:
        value = lax.pmax(value, same)  # type: ignore[no-untyped-call]
    return value


def _scaled(array: jax.Array, axes: tuple[Hashable, ...]) -> tuple[jax.Array, jax.Array]:
    """Return the array divided by a power of two near its largest magnitude, and the exponent."""
    largest = jnp.max(jnp.abs(array))
    exponent = jnp.where(jnp.isfinite(largest), jnp.frexp(largest)[1].astype(jnp.int32), 0)
    exponent = jnp.clip(jnp.where(largest == 0, EXPONENTS[0], exponent), *EXPONENTS)
    exponent = _total(exponent, over=(), same=axes)
    return array * jnp.ldexp(jnp.ones((), array.dtype), -exponent), exponent


def _centered(
    array: jax.Array, kept: jax.Array | None, axes: tuple[int, ...], mean: Any
) -> tuple[jax.Array, jax.Array]:
    """Return the mean and the array without it, in two passes: the first leaves the rounding of its own mean."""
    rough = mean(jnp.sum(array, axis=axes))
    array = _kept(array - _finite(rough), kept)
    rest = mean(jnp.sum(array, axis=axes))
    return rough + rest, _kept(array - _finite(rest), kept)


def _kept(array: jax.Array, kept: jax.Array | None) -> jax.Array:
    """Select, not multiply: a NaN in a token that does not count must not survive as 0 * NaN."""
    return array if kept is None else jnp.where(kept, array, jnp.zeros((), array.dtype))


def _finite(offset: jax.Array) -> jax.Array:
    """Set non-finite entries of an offset to zero, so that only non-finite rows stay non-finite and can be counted.

    The mean itself and the energies do not change.
    """
    return jnp.where(jnp.isfinite(offset), offset, jnp.zeros((), offset.dtype))


def _products(rows: jax.Array, vector: jax.Array) -> jax.Array:
    return jnp.sum(rows * vector, axis=-1)


def _count_nonfinite(sums: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(sums), dtype=jnp.int32)


def _gram_costs_less(inputs: jax.Array, weight: jax.Array) -> bool:
    m, n = weight.shape
    tokens = math.prod(inputs.shape[:-1])
    return (tokens + m) * n < tokens * m


def _gram_energy(weight: jax.Array, inputs: jax.Array) -> jax.Array:
    leading = list(range(inputs.ndim - 1))
    gram = jnp.tensordot(inputs, inputs, axes=(leading, leading), precision=lax.Precision.HIGHEST)
    return jnp.sum(jnp.matmul(weight, gram, precision=lax.Precision.HIGHEST) * weight)


def _product_energy(weight: jax.Array, inputs: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(jnp.matmul(inputs, weight.T, precision=lax.Precision.HIGHEST)))


def _zeros(like: Any) -> jax.Array:
    zeros = jnp.zeros(like.shape, like.dtype)
    # The mesh axes along which the array varies, by shard_map's types. JAX before 0.10 names them `vma`.
    varying = getattr(getattr(like, "manual_axis_type", like), "varying", getattr(like, "vma", None))
    return lax.pcast(zeros, tuple(varying), to="varying") if varying else zeros


def _size(axes: tuple[Hashable, ...]) -> int:
    return int(lax.psum(1, axes)) if axes else 1  # type: ignore[no-untyped-call]


def _epsilon(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps)  # type: ignore[no-untyped-call]


def _names(axes: Axes) -> tuple[Hashable, ...]:
    return tuple(axes) if isinstance(axes, tuple | list) else (axes,)


def _checked(weight: Any, inputs: Any, **rest: Any) -> dict[str, jax.Array]:
    given = {"weight": weight, "inputs": inputs, **rest}
    arrays = {name: array for name, array in given.items() if array is not None}
    for name, array in arrays.items():
        if not isinstance(array, jax.Array | np.ndarray):
            raise InputError(f"{name}: expected a JAX array, found {type(array).__name__}; pass its value")
        if name == "mask":
            if array.dtype != jnp.bool_:
                raise InputError(f"mask: expected dtype bool, found {array.dtype}; compare it first, such as mask != 0")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(
                f"{name}: expected a real floating-point array, found dtype {array.dtype}; convert it first"
            )
        if math.prod(array.shape) == 0:
            raise InputError(f"{name}: expected at least one element, found shape {array.shape}")
    if weight.ndim != 2:
        raise InputError(
            f"weight: expected shape [m, n] (out, in), found {weight.shape}; reshape it to the matrix of the linear map"
        )
    m, n = weight.shape
    found = {name: array.shape for name, array in arrays.items() if name in ("inputs", "outputs")}
    widths = {"inputs": n, "outputs": m}
    if any(not shape or shape[-1] != widths[name] for name, shape in found.items()):
        fits = {"inputs": m, "outputs": n}
        is_kernel = all(shape and shape[-1] == fits[name] for name, shape in found.items())
        told = ", ".join(f"{name} {shape}" for name, shape in found.items())
        advice = "; this is a kernel stored as [in, out]: pass kernel.T" if is_kernel else ""
        raise InputError(
            f"expected inputs [..., {n}] and outputs [..., {m}] for a weight of shape {(m, n)} (out, in), "
            f"found {told}{advice}"
        )
    if n == 1:
        raise InputError(f"weight: expected fan-in n of at least 2, found shape {(m, n)}; log_n is undefined for n = 1")
    leading = inputs.shape[:-1]
    for name, shape in (("outputs", found.get("outputs", (*leading, m))[:-1]), ("mask", _shape(arrays, "mask"))):
        if shape is not None and shape != leading:
            raise InputError(f"{name}: expected leading shape {leading} as the inputs have, found {shape}")
    if _shape(arrays, "bias") not in (None, (m,)):
        raise InputError(f"bias: expected shape ({m},) for a weight of shape {(m, n)}, found {arrays['bias'].shape}")
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def _shape(arrays: dict[str, Any], name: str) -> tuple[int, ...] | None:
    return tuple(arrays[name].shape) if name in arrays else None


def _wide(array: np.ndarray[Any, Any]) -> Vector:
    return array.astype(np.float64)


def _dot(a: Vector, b: Vector) -> float:
    """The inner product without `@`, which starts threads for long vectors that then spin beside the training."""
    return float((a * b).sum())
