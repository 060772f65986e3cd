"""safetensors files, one or several: the reader takes the position of rows from the header.

The library checks a file (header, dtypes, offsets, length) and lists its tensors. It gives no bfloat16 to NumPy and
maps whole files into memory, so this module reads the rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from logalign.checkpoints.stored import STORED_AS, Checkpoint, Rows, Stored, inside, read_json
from logalign.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Safetensors(Checkpoint):
    """Tensors in safetensors files.

    Attributes:
        places: The file and the start of the tensor in it, by name.
    """

    places: Mapping[str, tuple[Path, int]]

    def rows(self, name: str, start: int, stop: int) -> Rows:
        """Read stored rows of a matrix."""
        file, begin = self.places[name]
        columns = self.tensors[name].shape[1]
        dtype = STORED_AS[self.tensors[name].dtype]
        count = (stop - start) * columns
        try:
            with file.open("rb", buffering=0) as opened:
                opened.seek(begin + start * columns * dtype.itemsize)
                found: Rows = np.fromfile(opened, dtype=dtype, count=count)
        except OSError as error:
            raise CheckpointError(f"{file}: {name} cannot be read: {error}") from error
        if found.size != count:
            raise CheckpointError(f"{file}: expected {count} numbers of {name}, found {found.size}; it was cut off")
        return found.reshape(-1, columns)


def open_safetensors(
    path: Path, files: Sequence[Path], *, config: Mapping[str, Any], index: Path | None = None
) -> Safetensors:
    """Read the headers of the files of one checkpoint.

    Args:
        path: The checkpoint's path as the user gave it.
        files: Its files, none where there is an index.
        config: Its config.json.
        index: The file that maps each tensor to its file.

    Raises:
        CheckpointError: a file is damaged, missing, or leads out of the folder. Two files hold one tensor, or a tensor
            of the index is not in its file.
    """
    expected: dict[str, str] = {} if index is None else indexed(index)
    if index is not None:
        files = [inside(index.parent / file, index.parent) for file in sorted(set(expected.values()))]
        names = dict(zip(sorted(set(expected.values())), files, strict=True))
    tensors: dict[str, Stored] = {}
    places: dict[str, tuple[Path, int]] = {}
    for file in files:
        for name, (stored, begin) in _header(file).items():
            if name in places:
                raise CheckpointError(
                    f"{path}: expected each tensor in one file, found {name} in {places[name][0].name} and {file.name}"
                )
            tensors[name], places[name] = stored, (file, begin)
    for name, file_name in expected.items():
        if name not in places or places[name][0] != names[file_name]:
            raise CheckpointError(f"{index}: expected {name} in {file_name}, found it not there")
    count = "a safetensors file" if len(files) == 1 else f"{len(files)} safetensors files"
    return Safetensors(path=path, kind=count, tensors=tensors, config=config, places=places)


def indexed(index: Path) -> dict[str, str]:
    """Read the file name of each tensor from an index file of Transformers.

    Raises:
        CheckpointError: the index is damaged, or names a file elsewhere.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index}: expected an object weight_map from tensors to files, found none")
    for name in names.values():
        if not name or Path(name).is_absolute() or ".." in Path(name).parts or re.search(r"[\x00-\x1f\\]", name):
            raise CheckpointError(f"{index}: expected names of files in its own folder, found {name!r}")
    return dict(names)


def _header(file: Path) -> dict[str, tuple[Stored, int]]:
    """Read each tensor's description and its start in the file, by name."""
    try:
        with safe_open(file, framework="numpy") as checked:
            names = list(checked.keys())
    except SafetensorError as error:
        raise CheckpointError(
            f"{file}: expected a safetensors file, found damage ({error}); copy or save it again"
        ) from error
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    found = {}
    for name in names:
        entry = header[name]
        found[name] = (Stored(tuple(entry["shape"]), entry["dtype"]), 8 + length + entry["data_offsets"][0])
    return found
