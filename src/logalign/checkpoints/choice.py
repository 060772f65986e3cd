"""The choice of a checkpoint's matrices and the search for its head.

A checkpoint has names and shapes and no modules, so names decide everything. The head has a name that libraries use, or
it is the embedding to which config.json ties it.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from logalign.checkpoints.stored import STORED_AS, Checkpoint, Stored
from logalign.common.head_names import HEADS_ANYWHERE, HEADS_AT_TOP
from logalign.errors import CheckpointError, InputError
from logalign.runs.reading import UNEMBEDDING

WRAPPERS = ("module", "_orig_mod", "model", "net", "network", "state_dict", "model_state_dict", "_forward_module")
EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "tok_embeddings",
    "tokens_embed",
    "embed_in",
    "token_embedding",
    "embedding",
    "shared",
)
OPTIMIZER = ("optim", "optimizer", "optimizers", "optimizer_states", "exp_avg", "exp_avg_sq", "momentum_buffer", "ema")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """One chosen matrix.

    Attributes:
        name: Name of the tensor.
        site: Its name in readings: "unembedding", or the tensor's name without ".weight".
        how: The reason for the choice, in words.
        is_transposed: True if it is stored as [n, m] (in, out), like the Conv1D of GPT-2.
    """

    name: str
    site: str
    how: str
    is_transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class ChosenTensors:
    """The chosen matrices of a checkpoint.

    Attributes:
        chosen: The matrices, the head first, the others by name and number.
        left_out: Number of skipped tensors, by reason.
    """

    chosen: tuple[Chosen, ...]
    left_out: Mapping[str, int]


def choose(checkpoint: Checkpoint, layers: str | Sequence[str]) -> ChosenTensors:
    """Find the requested matrices.

    Args:
        checkpoint: An open checkpoint.
        layers: "unembedding" for the head, or a list of shell-style patterns of tensor names, with or without
            ".weight", and "unembedding".

    Raises:
        InputError: `layers` is empty, or holds no text.
        CheckpointError: nothing matches, or the checkpoint has no known head.
    """
    asked: list[Any] = [layers] if isinstance(layers, str) else list(layers)
    if not asked or not all(isinstance(pattern, str) and pattern for pattern in asked):
        raise InputError(f"layers: expected 'unembedding' or a list of patterns of tensor names, found {layers!r}")
    reasons = {name: _unfit(name, stored) for name, stored in checkpoint.tensors.items()}
    matrices = [name for name, reason in reasons.items() if reason is None]
    left_out = Counter(reason for reason in reasons.values() if reason is not None)
    if not matrices:
        found = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "no tensor at all"
        raise CheckpointError(f"{checkpoint.path}: expected a floating-point weight of two axes, found {found}")
    conv1d = _conv1d(checkpoint, matrices)
    head = _head(checkpoint, matrices)
    chosen: dict[str, Chosen] = {}
    for pattern in asked:
        if pattern == UNEMBEDDING:
            if head is None:
                raise _no_head(checkpoint, reasons)
            chosen[head[0]] = Chosen(name=head[0], site=UNEMBEDDING, how=head[1])
            continue
        for name in _matching(checkpoint, matrices, pattern):
            if head is not None and name == head[0]:
                chosen[name] = Chosen(name=name, site=UNEMBEDDING, how=head[1])
            else:
                how, site = f"matches {pattern!r}", name.removesuffix(".weight")
                chosen.setdefault(name, Chosen(name=name, site=site, how=how, is_transposed=name in conv1d))
    order = sorted(chosen.values(), key=lambda each: (each.site != UNEMBEDDING, _numbered(each.name)))
    return ChosenTensors(chosen=tuple(order), left_out=dict(left_out))


def _unfit(name: str, stored: Stored) -> str | None:
    """The reason to skip a tensor, or None."""
    if any(part in OPTIMIZER for part in name.split(".")):
        return "of an optimizer"
    if len(stored.shape) != 2:
        return "of other than two axes"
    if 0 in stored.shape:
        return "empty"
    if stored.dtype not in STORED_AS:
        return f"of dtype {stored.dtype}, whose numbers are no weights as they stand (packed, quantized)"
    return None


def _head(checkpoint: Checkpoint, matrices: Sequence[str]) -> tuple[str, str] | None:
    """The head's tensor and the rule that found it."""
    for known in (*HEADS_ANYWHERE, *HEADS_AT_TOP):
        anywhere = known in HEADS_ANYWHERE
        named = [
            name
            for name in matrices
            if _bare(name) == f"{known}.weight" or (anywhere and name.endswith(f".{known}.weight"))
        ]
        if len(named) == 1:
            return named[0], f"the well-known name '{known}'"
    tied = _says_tied(checkpoint)
    if tied is None:
        return None
    for known in EMBEDDINGS:
        named = [name for name in matrices if name == f"{known}.weight" or name.endswith(f".{known}.weight")]
        if len(named) == 1:
            return named[0], f"the embedding '{known}', which the head is tied to: {tied}"
    return None


def _says_tied(checkpoint: Checkpoint) -> str | None:
    """The evidence that the head is tied to the embedding, in words, or None without evidence."""
    config = checkpoint.config
    text = config.get("text_config")
    for each in (config, text if isinstance(text, Mapping) else {}):
        tied = each.get("tie_word_embeddings")
        if tied is not None:
            return "config.json says tie_word_embeddings" if tied is True else None
    architectures = config.get("architectures")
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    for name in names:
        if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
            return f"no head is stored, and config.json says {name}"
    return None


def _no_head(checkpoint: Checkpoint, reasons: Mapping[str, str | None]) -> CheckpointError:
    matrices = [name for name, reason in reasons.items() if reason is None]
    unfit = [name for name, reason in reasons.items() if reason and _bare(name).split(".")[0] in HEADS_ANYWHERE]
    if unfit:
        stored = checkpoint.tensors[unfit[0]]
        return CheckpointError(
            f"{checkpoint.path}: expected a head of floating-point numbers [m, n], found {unfit[0]} {stored.shape} "
            f"{reasons[unfit[0]]}"
        )
    return CheckpointError(
        f"{checkpoint.path}: expected a head (lm_head.weight, output.weight, embed_out.weight, ..., or an embedding "
        f"and a config.json that ties it), found none among {len(matrices)} 2-D weights (such as "
        f"{', '.join(matrices[-3:])}); name it with --layers, or take every one with --all"
    )


def _matching(checkpoint: Checkpoint, matrices: Sequence[str], pattern: str) -> Iterator[str]:
    names = [
        name for name in matrices if fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)
    ]
    if names:
        yield from names
        return
    stored = checkpoint.tensors.get(pattern, checkpoint.tensors.get(f"{pattern}.weight"))
    if stored is not None:
        raise CheckpointError(
            f"{checkpoint.path}: expected {pattern} to be a floating-point matrix [m, n], found {stored.dtype} "
            f"{stored.shape}"
        )
    near = difflib.get_close_matches(pattern, matrices, n=3, cutoff=0.4) or matrices[-3:]
    raise CheckpointError(
        f"{checkpoint.path}: expected a 2-D weight that matches {pattern!r}, found none; near matches: "
        f"{', '.join(near)}"
    )


def _conv1d(checkpoint: Checkpoint, matrices: Sequence[str]) -> set[str]:
    """Find the matrices of GPT-2's Conv1D, stored as [in, out], by the one layer with a telling shape, [n, 3 n]."""
    parts = ("c_attn", "c_proj", "c_fc", "q_attn")
    layers = [name for name in matrices if name.split(".")[-2:-1] and name.split(".")[-2] in parts]
    shapes = [checkpoint.tensors[name].shape for name in layers if name.split(".")[-2] == "c_attn"]
    is_conv1d = bool(shapes) and all(shape[1] in (2 * shape[0], 3 * shape[0]) for shape in shapes)
    return set(layers) if is_conv1d else set()


def _numbered(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _bare(name: str) -> str:
    parts = name.split(".")
    while len(parts) > 2 and parts[0] in WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)
