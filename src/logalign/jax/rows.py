"""Rows: the device hashes the content of each row of a batch, and the hash identifies the sample.

Method: JAX has no 64-bit integers by default. Two independent functions therefore mix every element with its position
in the row, in 32-bit arithmetic that wraps around. The device sums the results over the row, and the host joins the two
sums to a hash of 63 bits. A sum over elements does not depend on the order in which the device adds.

Shapes: B rows of a batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logalign.errors import InputError
from logalign.samples.visits import HIGHEST

Hashes = np.ndarray[Any, np.dtype[np.int64]]

LARGEST_ROW = 4096
"""Most elements that the hash of a row other than text reads, evenly spaced in longer rows."""
EMPTY = 0
"""The hash of a row of zeros."""

# Odd numbers without structure, from the golden ratio, from square roots and from known hash functions.
_FACTORS = ((0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D), (0xB5297A4D, 0x68E31DA5, 0x1B56C4E9))
_MINUS_ZERO = np.uint32(0x80000000)


def row_words(rows: Any) -> jax.Array:
    """Compute two 32-bit numbers for each row of a batch [B, ...], on the device and without waiting: [B, 2].

    Rows of integers [B, length] are text: zeros before and after a row's tokens are padding and do not change the
    numbers. In other rows, such as images, the position of each element counts. A row of more than 4096 elements
    contributes 4096, evenly spaced. Floating-point numbers count as float32. A row of only zeros gives zeros.

    Args:
        rows: A JAX or NumPy array of integers, booleans or floating-point numbers. The function copies a host array.

    Raises:
        InputError: an array of another type.
    """
    is_whole = bool(jnp.issubdtype(rows.dtype, jnp.integer))
    if not (is_whole or rows.dtype == bool or jnp.issubdtype(rows.dtype, jnp.floating)):
        raise InputError(f"samples: expected rows of numbers, found an array of {rows.dtype}")
    is_text = is_whole and rows.ndim == 2
    if not isinstance(rows, jax.Array):
        rows = jax.device_put(_bits(_seen(rows, is_text=is_text)))  # a copy, because a loader may reuse its buffer
    words: jax.Array = _words(rows, is_text=is_text)
    return words


@partial(jax.jit, static_argnames="is_text")
def _words(rows: Any, *, is_text: bool) -> Any:
    bits = _bits(_seen(rows, is_text=is_text))
    counts = bits != 0
    places = jnp.arange(1, bits.shape[1] + 1, dtype=jnp.uint32)
    if is_text:
        places = places - jnp.argmax(counts, axis=1).astype(jnp.uint32)[:, None]
    sums = []
    for of_value, of_place, stir in _FACTORS:
        mixed = _stirred(bits * np.uint32(of_value) + places * np.uint32(of_place), stir)
        sums.append(_stirred(jnp.where(counts, mixed, np.uint32(0)).sum(1, dtype=jnp.uint32), stir))
    return jnp.stack(sums, axis=1)


def _stirred(numbers: Any, factor: int) -> Any:
    """Scramble each number, one to one, with 0 unchanged."""
    for shift in (15, 13):
        numbers = (numbers ^ (numbers >> np.uint32(shift))) * np.uint32(factor)
    return numbers ^ (numbers >> np.uint32(16))


def _seen(rows: Any, *, is_text: bool) -> Any:
    """The elements that the hash reads, [B, elements]."""
    flat = rows.reshape(rows.shape[0], -1)
    length = flat.shape[1]
    if is_text or length <= LARGEST_ROW:
        return flat
    return flat[:, np.arange(LARGEST_ROW) * length // LARGEST_ROW]


def _bits(flat: Any) -> Any:
    """Numbers as 32 bits (integers: the lowest 32), equal on the host and on the device."""
    if not jnp.issubdtype(flat.dtype, jnp.floating):
        return flat.astype(np.uint32)
    with np.errstate(over="ignore", invalid="ignore"):
        bits = flat.astype(np.float32).view(np.uint32)
    return bits * (bits != _MINUS_ZERO)


def joined(words: np.ndarray[Any, Any]) -> Hashes:
    """Join the result of `row_words()` on the host to hashes from 0 to 2**63 - 1, [B].

    Example:
        >>> rows = np.array([[5, 6, 7, 0], [0, 5, 6, 7], [5, 0, 6, 7], [0, 0, 0, 0]])
        >>> hashes = joined(np.asarray(row_words(rows)))
        >>> bool(hashes[0] == hashes[1]), bool(hashes[0] == hashes[2]), int(hashes[3])
        (True, False, 0)
    """
    wide = words.astype(np.uint64)
    return ((wide[:, 0] << np.uint64(32) | wide[:, 1]) & np.uint64(HIGHEST)).astype(np.int64)


def id_hashes(ids: np.ndarray[Any, Any]) -> Hashes:
    """Hash integers [B] to 0 to 2**63 - 1 by splitmix64: different ids have different 64-bit hashes.

    Example:
        >>> bool((id_hashes(np.arange(3, dtype=np.int32)) == id_hashes(np.arange(3, dtype=np.uint8))).all())
        True
    """
    mixed = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return (mixed & np.uint64(HIGHEST)).astype(np.int64)
