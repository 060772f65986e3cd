"""`torch.distributed.checkpoint` folders: a `.metadata` file and the chunks of all ranks in `*.distcp` files.

Method: the reader loads the chunks of one matrix on request and frees each after its last row. It holds at most one
chunk of whole rows in memory. `torch.distributed.checkpoint.load` would need a second matrix to copy into.

The metadata is a pickle, and PyTorch's own reader would run any code in it. This reader admits only the classes that
such metadata consists of. It loads the chunks with `weights_only=True`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from logalign.checkpoints.pickled import dtype_name, raw
from logalign.checkpoints.stored import STORED_AS, Checkpoint, Rows, Stored, inside
from logalign.common.extras import load
from logalign.errors import CheckpointError

load("torch", extra="torch", purpose="a checkpoint of torch.distributed")

import torch  # noqa: E402

METADATA = ".metadata"
CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
}
PLAIN_TORCH = (torch.dtype, torch.layout, torch.memory_format)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A rectangle of a matrix, with its file and its place in the file."""

    top: int
    left: int
    height: int
    width: int
    file: Path
    offset: int
    length: int

    @property
    def bottom(self) -> int:
        """The row after its last row."""
        return self.top + self.height


@dataclass(frozen=True, kw_only=True)
class Distributed(Checkpoint):
    """Tensors in the chunks of several ranks.

    Attributes:
        chunks: The chunks of each matrix, by name.
    """

    chunks: Mapping[str, list[Chunk]]
    _loaded: dict[tuple[str, int], Rows] = field(default_factory=dict, repr=False)

    def rows(self, name: str, start: int, stop: int) -> Rows:
        """Read stored rows of a matrix, requested in order because each chunk is freed after its last row."""
        stored = self.tensors[name]
        touched = {
            (name, i): chunk for i, chunk in enumerate(self.chunks[name]) if chunk.top < stop and chunk.bottom > start
        }
        for past in [key for key in self._loaded if key not in touched]:
            del self._loaded[past]
        found = None
        for key, chunk in touched.items():
            loaded = self._loaded[key] if key in self._loaded else _load(chunk, name, stored)
            first, last = max(start, chunk.top), min(stop, chunk.bottom)
            part = loaded[first - chunk.top : last - chunk.top]
            if chunk.bottom > stop:
                self._loaded[key] = loaded
            else:
                self._loaded.pop(key, None)
            if part.shape == (stop - start, stored.shape[1]):
                return part
            if found is None:
                found = np.empty((stop - start, stored.shape[1]), dtype=STORED_AS[stored.dtype])
            found[first - start : last - start, chunk.left : chunk.left + chunk.width] = part
        assert found is not None, "the chunks make up the matrix"
        return found


def open_distributed(path: Path, folder: Path, *, config: Mapping[str, Any]) -> Distributed:
    """Read the metadata of a folder of `torch.distributed.checkpoint`.

    Args:
        path: The checkpoint's path as the user gave it.
        folder: The folder of its `.metadata`.
        config: Its config.json.

    Raises:
        CheckpointError: the metadata are damaged or hold other objects, or chunks are missing, compressed or elsewhere.
    """
    metadata = _metadata(folder)
    tensors: dict[str, Stored] = {}
    chunks: dict[str, list[Chunk]] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not hasattr(entry, "chunks"):
            continue  # bytes: a step number, the state of a random generator
        tensors[name] = Stored(tuple(entry.size), dtype_name(entry.properties.dtype))
        if len(entry.size) == 2 and tensors[name].dtype in STORED_AS:
            chunks[name] = [_chunk(metadata, folder, name, chunk) for chunk in entry.chunks]
            _check_whole(folder, name, tensors[name], chunks[name])
    files = {chunk.file for each in chunks.values() for chunk in each}
    kind = f"torch.distributed.checkpoint, {len(files)} file{'' if len(files) == 1 else 's'}"
    return Distributed(path=path, kind=kind, tensors=tensors, config=config, chunks=chunks)


class _Restricted(pickle.Unpickler):
    """Admits only the classes that the metadata of a checkpoint consist of."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib") and name.endswith("Path"):
            return PurePosixPath
        if name in CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), PLAIN_TORCH):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _metadata(folder: Path) -> Any:
    file = inside(folder / METADATA, folder)
    try:
        with file.open("rb") as opened:
            found = _Restricted(opened).load()
        if not isinstance(found.state_dict_metadata, Mapping) or not isinstance(found.storage_data, Mapping):
            raise TypeError("no Metadata of torch.distributed.checkpoint")
    except Exception as error:  # an unexpected pickle can raise any exception
        raise CheckpointError(
            f"{folder / METADATA}: expected the metadata of torch.distributed.checkpoint and nothing else, found "
            f"{type(error).__name__}: {error}; it is damaged, or of another version, or not to be trusted"
        ) from error
    return found


def _chunk(metadata: Any, folder: Path, name: str, chunk: Any) -> Chunk:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    info = metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
    if info is None:
        raise CheckpointError(f"{folder}: expected a place for {name} at {tuple(chunk.offsets)}, found none")
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError(
            f"{folder}: expected chunks as torch.save writes them, found {name} transformed by "
            f"{', '.join(map(str, info.transform_descriptors))}; save it without extensions"
        )
    file = inside(folder / info.relative_path, folder)
    (top, left), (height, width) = chunk.offsets, chunk.sizes
    if info.offset < 0 or info.length < 0 or info.offset + info.length > file.stat().st_size:
        raise CheckpointError(
            f"{file}: expected {name} up to byte {info.offset + info.length}, found {file.stat().st_size} bytes; it "
            "was cut off"
        )
    return Chunk(top=top, left=left, height=height, width=width, file=file, offset=info.offset, length=info.length)


def _check_whole(folder: Path, name: str, stored: Stored, chunks: list[Chunk]) -> None:
    """Check that the chunks lie in the matrix and hold as many numbers as it has."""
    m, n = stored.shape
    fits = all(
        min(chunk.top, chunk.left) >= 0 and chunk.bottom <= m and chunk.left + chunk.width <= n for chunk in chunks
    )
    found = sum(chunk.height * chunk.width for chunk in chunks)
    if not fits or found != m * n:
        raise CheckpointError(
            f"{folder}: expected chunks that make up {name} {stored.shape}, found {len(chunks)} with {found} numbers"
        )


def _load(chunk: Chunk, name: str, stored: Stored) -> Rows:
    try:
        with chunk.file.open("rb") as opened:
            view = io.BufferedReader(_Part(opened, chunk.offset, chunk.length))
            tensor = torch.load(view, map_location="cpu", weights_only=True)
        if tuple(tensor.shape) != (chunk.height, chunk.width) or dtype_name(tensor.dtype) != stored.dtype:
            raise ValueError(f"{tensor.dtype} {tuple(tensor.shape)}")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{chunk.file}: expected {name}, {stored.dtype} {(chunk.height, chunk.width)}, found damage ({first})"
        ) from error
    return raw(tensor, stored.dtype)


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        wanted = memoryview(buffer)[: max(0, self._length - self._at)]
        count = self._file.readinto(wanted)
        self._at += count
        return count
