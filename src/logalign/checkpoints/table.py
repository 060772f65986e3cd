"""What checkpoints gave, on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text as Words

from logalign.checkpoints.series import readings_of
from logalign.checkpoints.spectra import CheckpointSpectra
from logalign.checkpoints.spectrum import WeightSpectrum
from logalign.checkpoints.text import OnText

LEGEND = (
    ("d_p", "over how many of its n input directions a weight is spread (participation ratio)"),
    ("stable rank", "its squared norm over the largest squared singular value"),
    ("LAR at most", "1 - log_n(stable rank) / 2: no inputs can align better than this"),
)
ON_TEXT = (("LAR", "on the text, plain"), ("k", "n^(2 (1 - LAR)), the effective dimension"))
WITHOUT_TEXT = (
    "LAR itself needs inputs: --text FILE runs a text through a model that Transformers loads, and logalign.watch() "
    "measures while training."
)
Found = tuple[CheckpointSpectra, Mapping[str, OnText] | None]


def print_checkpoints(results: Sequence[Found], *, steps: Mapping[Path, int], console: Console) -> None:
    """Print spectra: a table for each checkpoint, or one for a series of which each gave one weight.

    Args:
        results: Of each checkpoint, what it gave, and what its layers did on a text if there was one.
        steps: Of each checkpoint, as far as they are known.
        console: Where to.
    """
    with_text = any(on_text is not None for _, on_text in results)
    if len(results) > 1 and all(len(found.weights) == 1 for found, _ in results):
        first = results[0][0]
        console.print(_headline(f"{len(results)} checkpoints", first), soft_wrap=True)
        table = _table("checkpoint", with_text, with_step=bool(steps))
        for found, on_text in results:
            step = [f"{steps[found.path]:,}" if found.path in steps else "-"] if steps else []
            table.add_row(*step, Words(str(found.path)), *_cells(found.weights[0], on_text))
        console.print(table)
        console.print()
    else:
        for found, on_text in results:
            console.print(_headline(str(found.path), found), soft_wrap=True)
            table = _table("weight", with_text)
            for weight in found.weights:
                table.add_row(Words(weight.name), *_cells(weight, on_text))
            console.print(table)
            console.print()
    for found, _ in results:
        for weight in found.weights:
            if weight.reason is not None:
                console.print(Words(f"{found.path}: {weight.name}: {weight.reason}", style="yellow"), soft_wrap=True)
    grid = Table.grid(padding=(0, 1, 0, 0))
    for name, meaning in (*LEGEND, *(ON_TEXT if with_text else ())):
        grid.add_row(Words(name, style="bold"), Words(meaning))
    console.print(grid)
    if not with_text:
        console.print(Words(WITHOUT_TEXT))


def _headline(name: str, found: CheckpointSpectra) -> Words:
    heads = [weight for weight in found.weights if weight.site == "unembedding"]
    words = Words(name, style="bold").append(f": {found.kind}", style="not bold")
    if found.model is not None:
        words.append(f", {found.model}", style="not bold")
    if heads:
        words.append(f"\nhead: {heads[0].name} ({heads[0].how})", style="not bold")
    turned = sum(weight.is_transposed for weight in found.weights)
    if turned:
        words.append(f"\n{turned} stored as [n, m] (Conv1D), shown as m x n", style="not bold")
    if found.left_out and len(found.weights) > 1:
        left_out = ", ".join(f"{count} {reason}" for reason, count in found.left_out.items())
        words.append(f"\nleft out: {left_out}", style="not bold")
    return words


def _table(first: str, with_text: bool, *, with_step: bool = False) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    if with_step:
        table.add_column("step", justify="right")
    table.add_column(first, overflow="fold")
    for name in (
        "m x n",
        "stored as",
        "norm",
        "d_p",
        "stable rank",
        "LAR at most",
        *(("LAR", "k") if with_text else ()),
    ):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(weight: WeightSpectrum, on_text: Mapping[str, OnText] | None) -> list[str]:
    cells = [
        f"{weight.m:,} x {weight.n:,}",
        weight.dtype,
        _shown(weight.norm, ".4g"),
        _shown(weight.participation, ",.1f"),
        _shown(weight.stable_rank, ",.1f"),
        _shown(weight.lar_bound, ".3f"),
    ]
    if on_text is not None:
        reading = readings_of(0, [weight], on_text)[0]
        cells += [_shown(reading.lar, ".3f"), _shown(reading.effective_dim, ",.1f")]
    return cells


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
