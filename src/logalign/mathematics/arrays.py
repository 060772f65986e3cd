"""Checks on the arrays of one linear layer: NumPy, PyTorch, JAX or CuPy through the array API standard.

Shapes: weight `W [m, n]` (out, in), inputs `X [T, n]`, outputs `Z [T, m]`, bias `b [m]`. T counts only the tokens
that the mask keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import array_api_compat as compat
import numpy as np

from logalign.errors import InputError

Array = Any  # an array of any library that supports the array API, because Python has no common type for them

BLOCK_ELEMENTS = 1 << 22
"""Elements in the working copy of one block of a large array (32 MiB in float64)."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer's arrays in one namespace, on one device, masked and flattened over tokens.

    Squares soon leave the range of float32. Sums in float32 therefore divide `weight` and `inputs` by their largest
    magnitudes, `weight_scale` and `input_scale`, and divide outputs and bias by the product of the two.
    """

    xp: Any
    dtype: Any
    weight: Array
    inputs: Array
    outputs: Array | None
    bias: Array | None
    weight_scale: float = 1.0
    input_scale: float = 1.0

    @property
    def epsilon(self) -> float:
        """Unit roundoff of the dtype of the sums."""
        return float(self.xp.finfo(self.dtype).eps)

    def wide(self, array: Array) -> Array:
        """The array in the dtype of the sums: float64 where the framework and device have it."""
        return self.xp.astype(array, self.dtype)

    def blocks(self, array: Array, row_elements: int) -> Iterator[tuple[slice, Array]]:
        """Yield blocks of consecutive rows of `array`, widened, with a bound on rows * row_elements."""
        rows = max(1, BLOCK_ELEMENTS // max(1, row_elements))
        for start in range(0, array.shape[0], rows):
            part = slice(start, min(start + rows, array.shape[0]))
            yield part, self.wide(array[part, :])


def checked_layer(
    weight: Array,
    inputs: Array,
    *,
    outputs: Array | None = None,
    bias: Array | None = None,
    mask: Array | None = None,
) -> Layer:
    """Check shapes and dtypes, flatten the leading axes to T tokens, and drop the masked tokens.

    Raises InputError: not arrays of one library, not floating point, wrong shapes, empty arrays, n = 1, a mask of
    another dtype than bool or another shape than the tokens.
    """
    given = {"weight": weight, "inputs": inputs, "outputs": outputs, "bias": bias}
    arrays = {name: _detached(array) for name, array in given.items() if array is not None}
    xp = _common_namespace(arrays)
    for name, array in arrays.items():
        if not xp.isdtype(array.dtype, "real floating"):
            raise InputError(
                f"{name}: expected a real floating-point array, found dtype {array.dtype}; convert it first"
            )
        if prod(array.shape) == 0:
            raise InputError(f"{name}: expected at least one element, found shape {tuple(array.shape)}")
    if arrays["weight"].ndim != 2:
        raise InputError(
            f"weight: expected shape [m, n] (out, in), found shape {tuple(weight.shape)}; "
            "reshape it to the matrix of the linear map"
        )
    m, n = arrays["weight"].shape
    if n == 1:
        raise InputError(f"weight: expected fan-in n of at least 2, found shape {(m, n)}; log_n is undefined for n = 1")
    leading = _leading_shape("inputs", arrays["inputs"], n, (m, n))
    flat_mask = None if mask is None else _flat_mask(xp, mask, leading, compat.device(arrays["inputs"]))
    if bias is not None and tuple(arrays["bias"].shape) != (m,):
        raise InputError(f"bias: expected shape ({m},) for a weight of shape {(m, n)}, found {tuple(bias.shape)}")
    if outputs is not None and _leading_shape("outputs", arrays["outputs"], m, (m, n)) != leading:
        raise InputError(
            f"outputs: expected leading shape {leading} as the inputs have, found {tuple(outputs.shape[:-1])}"
        )

    def tokens_first(name: str, width: int) -> Array | None:
        if name not in arrays:
            return None
        flat = xp.reshape(arrays[name], (-1, width))
        return flat if flat_mask is None else flat[flat_mask]

    layer = Layer(
        xp=xp,
        dtype=_widest_float(xp, arrays["weight"]),
        weight=arrays["weight"],
        inputs=tokens_first("inputs", n),
        outputs=tokens_first("outputs", m),
        bias=arrays.get("bias"),
    )
    return layer if layer.dtype == xp.float64 else _scaled(layer)


def to_numpy(array: Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Copy the array to the host as NumPy float64."""
    array = _detached(array)
    if compat.is_torch_array(array) or compat.is_cupy_array(array):
        array = compat.to_device(array, "cpu")
    return np.asarray(array, dtype=np.float64)


def _scaled(layer: Layer) -> Layer:
    def magnitude(array: Array) -> float:
        largest = float(layer.xp.max(layer.xp.abs(layer.wide(array)))) if prod(array.shape) else 1.0
        return largest if math.isfinite(largest) and largest > 0 else 1.0

    by_weight, by_input = magnitude(layer.weight), magnitude(layer.inputs)

    def divided(array: Array | None, *scales: float) -> Array | None:
        for scale in scales if array is not None else ():
            array = layer.wide(array) / scale
        return array

    return replace(
        layer,
        weight=divided(layer.weight, by_weight),
        inputs=divided(layer.inputs, by_input),
        outputs=divided(layer.outputs, by_weight, by_input),
        bias=divided(layer.bias, by_weight, by_input),
        weight_scale=by_weight,
        input_scale=by_input,
    )


def _detached(array: Array) -> Array:
    return array.detach() if compat.is_torch_array(array) else array


def _common_namespace(arrays: dict[str, Array]) -> Any:
    for name, array in arrays.items():
        if not compat.is_array_api_obj(array):
            raise InputError(
                f"{name}: expected a NumPy, PyTorch, JAX or CuPy array, found {type(array).__name__}; "
                "convert it first, for example with numpy.asarray"
            )
    try:
        return compat.array_namespace(*arrays.values())
    except TypeError as error:
        found = ", ".join(f"{name} {type(array).__module__}" for name, array in arrays.items())
        raise InputError(f"expected arrays of one library, found {found}; convert them to one") from error


def _leading_shape(name: str, array: Array, width: int, weight_shape: tuple[int, int]) -> tuple[int, ...]:
    if array.ndim < 1 or array.shape[-1] != width:
        raise InputError(
            f"{name}: expected shape [..., {width}] for a weight of shape {weight_shape} (out, in), "
            f"found {tuple(array.shape)}; a kernel stored as [in, out] has to be transposed"
        )
    return tuple(array.shape[:-1])


def _flat_mask(xp: Any, mask: Array, leading: tuple[int, ...], device: Any) -> Array:
    mask = _detached(mask)
    shape = tuple(getattr(mask, "shape", np.shape(mask)))
    if shape != leading:
        raise InputError(f"mask: expected shape {leading}, one value a token, found {shape}")
    dtype = getattr(mask, "dtype", np.asarray(mask).dtype)
    if str(dtype).removeprefix("torch.") != "bool":
        raise InputError(f"mask: expected dtype bool, found {dtype}; compare it first, for example mask != 0")
    return xp.reshape(xp.asarray(mask, device=device), (-1,))


def _widest_float(xp: Any, like: Array) -> Any:
    """The widest dtype: float64 where the namespace and the array's device have it, else float32."""
    available = xp.__array_namespace_info__().dtypes(kind="real floating", device=None)
    if "float64" not in available or "mps" in str(compat.device(like)):
        return xp.float32
    return xp.float64
