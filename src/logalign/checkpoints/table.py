"""The results of checkpoints, as tables on the terminal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
    """Print spectra: a table for each checkpoint, or one table for a series of checkpoints with the same one weight.

    Args:
        results: The spectra of each checkpoint, and the results of its layers on a text, if any.
        steps: The known steps of the checkpoints.
        console: The console to print to.
    """
    with_text = any(on_text is not None for _, on_text in results)
    dtypes = {weight.dtype for found, _ in results for weight in found.weights}
    weights = {tuple(weight.name for weight in found.weights) for found, _ in results}
    if len(results) > 1 and len(weights) == 1 and len(results[0][0].weights) == 1:
        console.print(_headline(f"{len(results)} checkpoints", results[0][0], dtypes), soft_wrap=True)
        table = _table("checkpoint", dtypes, with_text=with_text, with_step=bool(steps))
        names = [found.path.name for found, _ in results]
        for (found, on_text), name in zip(results, names, strict=True):
            step = [f"{steps[found.path]:,}" if found.path in steps else "-"] if steps else []
            shown = name if len(set(names)) == len(names) else str(found.path)
            table.add_row(*step, Words(shown), *_cells(found.weights[0], dtypes, on_text))
        console.print(table)
        console.print()
    else:
        for found, on_text in results:
            console.print(_headline(str(found.path), found, dtypes), soft_wrap=True)
            table = _table("weight", dtypes, with_text=with_text)
            for weight in found.weights:
                table.add_row(Words(weight.name.removesuffix(".weight")), *_cells(weight, dtypes, on_text))
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


def _headline(name: str, found: CheckpointSpectra, dtypes: Collection[str]) -> Words:
    words = Words(name, style="bold").append(f": {found.kind}", style="not bold")
    if found.model is not None:
        words.append(f", {found.model}", style="not bold")
    if len(dtypes) == 1:
        words.append(f", stored as {next(iter(dtypes))}", style="not bold")
    heads = [weight for weight in found.weights if weight.site == "unembedding"]
    if heads:
        words.append(f"\nhead: {heads[0].name} ({heads[0].how})", style="not bold")
    turned = sum(weight.is_transposed for weight in found.weights)
    if turned:
        words.append(f"\n{turned} stored as [n, m] (Conv1D), shown as m x n", style="not bold")
    if found.left_out and len(found.weights) > 1:
        left_out = ", ".join(f"{count} {reason}" for reason, count in found.left_out.items())
        words.append(f"\nleft out: {left_out}", style="not bold")
    return words


def _table(first: str, dtypes: Collection[str], *, with_text: bool, with_step: bool = False) -> Table:
    table = Table(box=None, padding=(0, 1 if with_text else 2, 0, 0), header_style="bold")
    if with_step:
        table.add_column("step", justify="right")
    table.add_column(first, overflow="fold")
    stored = ("stored\nas",) if len(dtypes) > 1 else ()
    on_text = ("LAR", "k") if with_text else ()
    for name in ("m x n", *stored, "norm", "d_p", "stable\nrank", "LAR\nat most", *on_text):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(weight: WeightSpectrum, dtypes: Collection[str], on_text: Mapping[str, OnText] | None) -> list[str]:
    cells = [
        f"{weight.m:,} x {weight.n:,}",
        *((weight.dtype,) if len(dtypes) > 1 else ()),
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
