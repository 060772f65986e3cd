"""Pickled checkpoints (.bin, .pt, .pth, .ckpt): only those that `torch.load(weights_only=True, mmap=True)` accepts.

A pickle can run any code when it loads. With `weights_only` PyTorch accepts tensors and plain containers and refuses
everything else. A mapped tensor reads its rows from the disk on access.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from logalign.checkpoints.stored import STORED_AS, Checkpoint, Rows, Stored
from logalign.common.extras import load
from logalign.errors import CheckpointError

load("torch", extra="torch", purpose="a checkpoint of PyTorch")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
SAME_SIZE = {2: torch.int16, 1: torch.uint8}
CONVERT = (
    "convert it to safetensors where you trust its source: safetensors.torch.save_file(state_dict, 'x.safetensors')"
)


@dataclass(frozen=True, kw_only=True)
class Pickled(Checkpoint):
    """Tensors that PyTorch maps from their files.

    Attributes:
        values: The tensors, by name.
    """

    values: Mapping[str, Tensor]

    def rows(self, name: str, start: int, stop: int) -> Rows:
        """Read stored rows of a matrix."""
        return raw(self.values[name][start:stop], self.tensors[name].dtype)


def raw(tensor: Tensor, dtype: str) -> Rows:
    """A tensor's bits as a NumPy array."""
    held = STORED_AS[dtype]
    tensor = tensor.detach().contiguous()
    if held.kind == "f":
        return np.asarray(tensor.numpy())
    return np.asarray(tensor.view(SAME_SIZE[held.itemsize]).numpy()).view(held)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name in safetensors, or its own name."""
    return DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def open_pickled(path: Path, files: Sequence[Path], *, config: Mapping[str, Any]) -> Pickled:
    """Map pickled files into memory.

    Args:
        path: The checkpoint's path as the user gave it.
        files: Its files.
        config: Its config.json.

    Raises:
        CheckpointError: a file is damaged, has an old format, or needs more than `weights_only`.
    """
    values = {name: tensor for file in files for name, tensor in _tensors(_loaded(file))}
    tensors = {name: Stored(tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in values.items()}
    kind = "a pickled file" if len(files) == 1 else f"{len(files)} pickled files"
    return Pickled(path=path, kind=f"{kind}, weights_only", tensors=tensors, config=config, values=values)


def _loaded(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"{found[1]}, which could run any code" if found else "a pickle of something else, or damage"
        raise CheckpointError(
            f"{file}: expected a pickle of tensors and plain containers (torch.load with weights_only=True), found "
            f"{what}; {CONVERT}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        old = "_use_new_zipfile_serialization" in str(error)
        what = "one of before PyTorch 1.6, or damage" if old else f"damage, or something else ({first})"
        raise CheckpointError(
            f"{file}: expected a file of torch.save that can be mapped (torch.load with mmap=True), found {what}; "
            f"{CONVERT}"
        ) from error


def _tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the dense tensors in nested mappings with their dotted names."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{prefix}{key}.")
    elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
        yield prefix[:-1] or "tensor", value
