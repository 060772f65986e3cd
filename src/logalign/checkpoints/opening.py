"""Detection of the kind of a checkpoint and of the checkpoints in a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from logalign.checkpoints.safetensors import indexed, open_safetensors
from logalign.checkpoints.stored import Checkpoint, inside, read_json
from logalign.errors import CheckpointError

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
KINDS = (
    "a safetensors file, a folder of Transformers (model.safetensors, model.safetensors.index.json), a folder of "
    "torch.distributed.checkpoint (.metadata), or a pickled file (.bin, .pt, .pth, .ckpt)"
)
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
PICKLED_INDEX, PICKLED_WHOLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
METADATA = ".metadata"
INSIDE = ("pytorch_model_fsdp_0", "model", "weights")
"""Subfolders of a training checkpoint that hold its weights: Accelerate's, and common ones of other libraries."""
STEP = re.compile(r"(?:^|[^a-z])(?:step|iter|iteration|checkpoint|ckpt|epoch)s?[-_=. ]?(\d+)", re.IGNORECASE)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's description of its tensors and leave their numbers on disk.

    Raises:
        CheckpointError: nothing there, not a checkpoint, damaged, incomplete, or with references that leave it.
        MissingExtraError: the checkpoint needs PyTorch, which is not installed.
    """
    if path.is_dir():
        return _open_folder(path)
    if path.is_file():
        return _open_file(path)
    what = "something that is no regular file" if path.exists() else "nothing there"
    raise CheckpointError(f"{path}: expected {KINDS}, found {what}")


def expanded(paths: Sequence[Path]) -> list[Path]:
    """Replace each folder of numbered checkpoints by its checkpoints, in the order of their steps."""
    found: list[Path] = []
    for path in paths:
        inner = [] if not path.is_dir() or _is_checkpoint(path) else _numbered(path)
        found.extend(inner or [path])
    return found


def step_of(path: Path) -> int | None:
    """The training step of a checkpoint, from trainer_state.json, its name or its folder's name."""
    state = path / "trainer_state.json"
    if path.is_dir() and state.is_file():
        step = read_json(inside(state, path)).get("global_step")
        if isinstance(step, int) and step >= 0:
            return step
    full = path.absolute()
    for name in (full.name, full.parent.name) if path.is_file() else (full.name,):
        named = STEP.findall(name) or re.findall(r"^\d+$", Path(name).stem)
        if named:
            return int(named[-1])
    return None


def _is_checkpoint(folder: Path) -> bool:
    if any((folder / name).exists() for name in (INDEX, WHOLE, PICKLED_INDEX, PICKLED_WHOLE, METADATA)):
        return True
    # Files with a step in each name are separate checkpoints.
    if any(not STEP.search(file.stem) for file in folder.glob("*.safetensors")):
        return True
    return any((folder / name / METADATA).exists() for name in INSIDE)


def _numbered(folder: Path) -> list[Path]:
    steps = {}
    for child in folder.iterdir():
        named = STEP.search(child.name) or (child.is_dir() and re.fullmatch(r"\d+", child.name))
        if named and (child.suffix in (*PICKLED, ".safetensors") or (child.is_dir() and _is_checkpoint(child))):
            steps[child] = step_of(child)
    return sorted(steps, key=lambda child: (steps[child] or 0, child.name))


def _open_file(path: Path) -> Checkpoint:
    config = _config(path.parent)
    if path.name.endswith(".safetensors.index.json"):
        return open_safetensors(path, [], config=config, index=path)
    if path.name.endswith(".bin.index.json"):
        return _open_pickled(path, path, config=config)
    if path.suffix == ".safetensors":
        return open_safetensors(path, [path], config=config)
    if path.suffix in PICKLED:
        return _open_pickled(path, None, config=config)
    if path.suffix == ".distcp" or path.name == METADATA:
        raise CheckpointError(f"{path}: expected the folder that this file is in: give {path.parent}")
    raise CheckpointError(f"{path}: expected {KINDS}, found a file of another kind ({path.suffix or 'no ending'})")


def _open_folder(folder: Path) -> Checkpoint:
    config = _config(folder)
    if (folder / INDEX).exists():
        return open_safetensors(folder, [], config=config, index=folder / INDEX)
    if _is_there(folder / WHOLE):
        return open_safetensors(folder, [inside(folder / WHOLE, folder)], config=config)
    for inner in (folder, *(folder / name for name in INSIDE)):
        if _is_there(inner / METADATA):
            from logalign.checkpoints.dcp import open_distributed

            if inner != folder:
                inside(inner / METADATA, folder)
            return open_distributed(folder, inner, config=config)
    if (folder / PICKLED_INDEX).exists():
        return _open_pickled(folder, folder / PICKLED_INDEX, config=config)
    if _is_there(folder / PICKLED_WHOLE):
        return _open_pickled(folder / PICKLED_WHOLE, None, config=config)
    return _open_others(folder, config)


def _open_others(folder: Path, config: dict[str, Any]) -> Checkpoint:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indexes) == 1:
        return open_safetensors(folder, [], config=config, index=indexes[0])
    if files and not indexes:
        _check_shards(folder, files)
        return open_safetensors(folder, [inside(file, folder) for file in files], config=config)
    names = sorted(child.name for child in folder.iterdir())
    if any(name.endswith(".distcp") for name in names):
        raise CheckpointError(
            f"{folder}: expected {METADATA} beside the .distcp files, found none: the saving of this checkpoint was "
            "not completed"
        )
    shown = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "an empty folder"
    raise CheckpointError(f"{folder}: expected {KINDS}, or a folder of such with steps in their names, found {shown}")


def _check_shards(folder: Path, files: Sequence[Path]) -> None:
    """Check that all files of a set such as model-00001-of-00003 are there."""
    for file in files:
        numbered = re.search(r"-(\d+)-of-(\d+)\.safetensors$", file.name)
        if numbered and int(numbered[2]) != len(files):
            raise CheckpointError(
                f"{folder}: expected {int(numbered[2])} files like {file.name}, found {len(files)}; the checkpoint is "
                "not complete"
            )


def _open_pickled(path: Path, index: Path | None, *, config: dict[str, Any]) -> Checkpoint:
    from logalign.checkpoints.pickled import open_pickled

    if index is None:
        return open_pickled(path, [path], config=config)
    files = [inside(index.parent / name, index.parent) for name in sorted(set(indexed(index).values()))]
    return open_pickled(path, files, config=config)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return read_json(inside(file, folder)) if _is_there(file) else {}


def _is_there(path: Path) -> bool:
    """True if there is a file or a link, even a broken link, which raises an error when it is opened."""
    return path.exists() or path.is_symlink()
