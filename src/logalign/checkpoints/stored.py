"""Tensors on disk: the interface of every kind of checkpoint, a few rows of one matrix at a time.

Rows keep their stored format, so a matrix takes no more memory than disk space. `decoded` widens a block of rows. NumPy
has neither bfloat16 nor 8-bit floats. A bfloat16 is the upper half of a float32, and a table of 256 values decodes the
8-bit floats.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from logalign.errors import CheckpointError

Rows = np.ndarray[Any, Any]

STORED_AS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E4M3FNUZ": np.dtype("u1"),
    "F8_E5M2FNUZ": np.dtype("u1"),
}
"""Floating-point dtypes, by their names in safetensors files, and the NumPy dtype that holds their bits."""
EIGHT_BIT = {"F8_E4M3": (4, 7), "F8_E5M2": (5, 15), "F8_E4M3FNUZ": (4, 8), "F8_E5M2FNUZ": (5, 16)}
"""Exponent bits and exponent bias of each 8-bit format."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint's description of one tensor: its shape and the name of its dtype in safetensors."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint(ABC):
    """A file or folder of tensors.

    Attributes:
        path: Its path as the user gave it.
        kind: The kind of checkpoint, in words.
        tensors: The descriptions of its tensors, by name, without their numbers.
        config: Its config.json, empty where there is none.
    """

    path: Path
    kind: str
    tensors: Mapping[str, Stored]
    config: Mapping[str, Any] = field(default_factory=dict)

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Rows:
        """Read stored rows of a matrix [rows, columns], in a dtype of `STORED_AS`.

        Raises:
            CheckpointError: the rows are not readable.
        """


def decoded(rows: Rows, dtype: str) -> Rows:
    """Decode stored rows: float64 stays float64, all other formats become float32, which holds them exactly."""
    if dtype == "BF16":
        return (rows.astype(np.uint32) << 16).view(np.float32)
    if dtype in EIGHT_BIT:
        return eight_bit_values(dtype)[rows]
    return rows.astype(np.float64 if dtype == "F64" else np.float32, copy=False)


@cache
def eight_bit_values(dtype: str) -> Rows:
    """The values of the 256 codes of an 8-bit format, [256] in float32."""
    exponent_bits, bias = EIGHT_BIT[dtype]
    mantissa_bits = 7 - exponent_bits
    codes = np.arange(256)
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    exponent = (codes & 0x7F) >> mantissa_bits
    size = np.where(exponent > 0, (1 + mantissa) * 2.0 ** (exponent - bias), mantissa * 2.0 ** (1 - bias))
    if dtype == "F8_E5M2":
        size[exponent == 31] = np.nan
        size[0x7C], size[0xFC] = np.inf, np.inf
    elif dtype == "F8_E4M3":
        size[[0x7F, 0xFF]] = np.nan
    else:
        size[0x80] = np.nan  # the code of -0 in other formats
    values: Rows = np.where(codes < 0x80, size, -size).astype(np.float32)
    return values


def inside(path: Path, folder: Path) -> Path:
    """Follow the links of a path in a checkpoint and check that it stays in the checkpoint's folder.

    In a cache of the Hugging Face hub (`REPOSITORY/snapshots/REVISION/`) the files are links into `REPOSITORY/blobs/`.
    The function also follows these links.

    Raises:
        CheckpointError: the path leads out of the folder, does not exist, or is not a regular file.
    """
    root, found = folder.resolve(), path.resolve()
    allowed = [root]
    allowed += [above.parent / "blobs" for above in root.parents if above.name == "snapshots"]
    if not any(found.is_relative_to(each) for each in allowed):
        raise CheckpointError(
            f"{path}: expected a file in {folder}, found one that leads out of it, to {found}; copy the file there, or "
            "name it itself"
        )
    if not found.exists():
        raise CheckpointError(f"{path}: expected a file, found nothing there; is the checkpoint complete?")
    if not found.is_file():
        raise CheckpointError(f"{path}: expected a file, found something else")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: the file holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a JSON object, found damage: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def size_on_disk(stored: Stored) -> int:
    """Size of a floating-point tensor in bytes."""
    return int(np.prod(stored.shape, dtype=np.int64)) * STORED_AS[stored.dtype].itemsize
