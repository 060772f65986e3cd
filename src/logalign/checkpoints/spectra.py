"""`spectra_of`: the spectra of a checkpoint's weights, one matrix after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logalign.checkpoints.choice import choose
from logalign.checkpoints.opening import open_checkpoint, step_of
from logalign.checkpoints.spectrum import WeightSpectrum, spectrum_of
from logalign.checkpoints.stored import Checkpoint
from logalign.runs.reading import UNEMBEDDING


@dataclass(frozen=True, kw_only=True)
class CheckpointSpectra:
    """The spectra of a checkpoint's weights, without any input.

    Attributes:
        path: The checkpoint's path as the user gave it.
        kind: The kind of checkpoint, in words.
        step: The training step, from trainer_state.json or a name, or None where neither has one.
        model: The model that config.json names, or None without config.json.
        weights: The spectra, the head first.
        left_out: Number of skipped tensors, by reason.
    """

    path: Path
    kind: str
    step: int | None
    model: str | None
    weights: tuple[WeightSpectrum, ...]
    left_out: Mapping[str, int]

    def record(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "checkpoint": str(self.path),
            "kind": self.kind,
            "step": self.step,
            "model": self.model,
            "weights": [weight.record() for weight in self.weights],
            "left_out": dict(self.left_out),
        }


def spectra_of(
    path: str | os.PathLike[str] | Checkpoint,
    *,
    layers: str | Sequence[str] = UNEMBEDDING,
    progress: Callable[[str], None] | None = None,
) -> CheckpointSpectra:
    """Compute the spectra of a checkpoint's weights, streamed from disk without building a model.

    Args:
        path: A safetensors file, a folder of Transformers, a folder of `torch.distributed.checkpoint`, a pickled file
            that `torch.load(weights_only=True, mmap=True)` accepts, or the result of `open_checkpoint()`.
        layers: "unembedding" for the head, or a list of shell-style patterns of tensor names, `["*"]` for every 2-D
            weight.
        progress: A function that receives the name of each tensor before its read.

    Returns:
        CheckpointSpectra, with a `WeightSpectrum` for each weight: None and a reason where it is zero or has a NaN.

    Raises:
        CheckpointError: no such checkpoint, damaged or incomplete, links that leave it, no 2-D weight, no head.
        InputError: `layers` is neither.
        MissingExtraError: this kind needs PyTorch, which is not installed.

    Source: the bound follows from `<p, q> <= p_1` (docs/checkpoints.md).

    Example:
        >>> import numpy as np, tempfile, pathlib
        >>> from safetensors.numpy import save_file
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_file({"lm_head.weight": np.diag([2.0, 1.0, 1.0, 0.0])}, file)
        >>> head = spectra_of(file).weights[0]
        >>> head.p.round(3).tolist(), round(head.participation, 6), round(head.stable_rank, 6)
        ([0.667, 0.167, 0.167, 0.0], 2.0, 1.5)
        >>> round(head.lar_bound, 3)
        0.854
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(Path(path))
    choice = choose(checkpoint, layers)
    weights = []
    for chosen in choice.chosen:
        if progress is not None:
            progress(chosen.name)
        weights.append(spectrum_of(checkpoint, chosen))
    return CheckpointSpectra(
        path=checkpoint.path,
        kind=checkpoint.kind,
        step=step_of(checkpoint.path),
        model=_model(checkpoint.config),
        weights=tuple(weights),
        left_out=choice.left_out,
    )


def _model(config: Mapping[str, Any]) -> str | None:
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return architectures[0]
    model_type = config.get("model_type")
    return model_type if isinstance(model_type, str) else None
