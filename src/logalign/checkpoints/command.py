"""The command `logalign spectra`: open all checkpoints, analyze each in turn, print and write the results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from logalign.checkpoints.choice import choose
from logalign.checkpoints.opening import expanded, open_checkpoint
from logalign.checkpoints.series import SeriesWriter, readings_of, steps_of
from logalign.checkpoints.spectra import CheckpointSpectra, spectra_of
from logalign.checkpoints.table import Found, print_checkpoints
from logalign.checkpoints.text import OnText, Text
from logalign.common.extras import load


def run(
    paths: Sequence[Path],
    *,
    layers: str | Sequence[str],
    text: Path | None = None,
    model: Path | None = None,
    tokens: int,
    out: Path | None = None,
    as_json: bool = False,
) -> None:
    """Compute the spectra of checkpoints and print a table or JSON.

    Args:
        paths: Paths that `spectra_of()` takes, or folders of numbered checkpoints.
        layers: See `spectra_of()`.
        text: A text to measure LAR on.
        model: See `Text`.
        tokens: See `Text`.
        out: A run folder to write.
        as_json: Print one list of objects instead of tables.

    Raises:
        LogAlignError: a problem that the user can fix. The command has then printed nothing.
    """
    paths = expanded(paths)
    steps = steps_of(paths) if out is not None else {}
    # All checkpoints open first, so an error in the last one appears before work on the first one starts.
    opened = {path: open_checkpoint(path) for path in steps or paths}
    for checkpoint in opened.values():
        choose(checkpoint, layers)
    through = None if text is None else Text(file=text, model=model, tokens=tokens)
    if through is not None:
        _quiet()
    results: list[Found] = []
    with ExitStack() as stack:
        settings = {
            "checkpoints": [str(path) for path in opened],
            "layers": layers,
            **({} if text is None else {"text": str(text), "tokens": tokens}),
        }
        writer = None if out is None else stack.enter_context(SeriesWriter(out, settings))
        status = stack.enter_context(Console(stderr=True, highlight=False).status(""))
        for path, checkpoint in opened.items():
            progress = partial(_tell, status, path)
            found = spectra_of(checkpoint, layers=layers, progress=progress)
            on_text = None
            if through is not None:
                progress("the text")
                on_text = through.through(path, found.weights)
            results.append((found, on_text))
            if writer is not None:
                writer.add(steps[path], found, on_text)
    known = steps or {found.path: found.step for found, _ in results if found.step is not None}
    if as_json:
        records = [_record(found, on_text, known.get(found.path)) for found, on_text in results]
        print(json.dumps(records, indent=2, allow_nan=False))
        return
    console = Console(highlight=False)
    print_checkpoints(results, steps=known, console=console)
    if out is not None:
        console.print(f"run: {out} (draw it with: logalign report {out})", soft_wrap=True, markup=False)


def _record(found: CheckpointSpectra, on_text: Mapping[str, OnText] | None, step: int | None) -> dict[str, Any]:
    record = found.record() | {"step": step}
    if on_text is not None:
        for weight, reading in zip(record["weights"], readings_of(0, found.weights, on_text), strict=True):
            for name in ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered", "effective_dim", "tokens"):
                weight[name] = getattr(reading, name)
            weight["reason"] = reading.reason
    return record


def _quiet() -> None:
    """Turn off the progress bars and remarks of Transformers on the terminal."""
    logging = load("transformers.utils.logging", extra="transformers", purpose="LAR on a text", supported="5.0,6.0")
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _tell(status: Status, path: Path, what: str) -> None:
    status.update(escape(f"{path}: {what}"))
