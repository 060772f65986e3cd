"""The pilot's question: what does each signal know about the gap that training loss and epoch do not?

    python -m benchmarks.generalization.pilot

Prints, from the stored runs, Spearman's rank correlation with the generalization gap over the pilot's runs at equal
shares of training, and the partial one given training loss and epoch. Language and fine-tuning runs are taken together,
for one family alone has too few.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from benchmarks.generalization import configs, score, store, tables
from benchmarks.generalization.score import Context

GROUPS = (("language", "finetuning"), ("vision",))
SHARES = (0.5, 1.0)


def main() -> None:
    """Print one table a group."""
    names = {config.name for config in configs.pilot()}
    found = [context for context in score.contexts(store.load()) if context.run.name in names]
    for families in GROUPS:
        chosen = [context for context in found if context.run.config.family in families]
        table = Table("signal", title=f"{' and '.join(families)}, {len(chosen)} runs")
        for share in SHARES:
            table.add_column(f"at {share:.0%}", justify="right")
            table.add_column("given loss, epoch", justify="right")
        for name, signal in tables.ALL_SIGNALS.items():
            cells = [each for share in SHARES for each in correlations(chosen, signal, share)]
            table.add_row(name, *(tables.number(each) for each in cells))
        Console(width=120).print(table)


def correlations(found: list[Context], signal: score.Signal, share: float) -> tuple[float, float]:
    """Plain and partial rank correlation with the gap at one share of training."""
    at = score.at_share(found, signal, share)
    return score.spearman(at.signal, at.gap), score.partial_spearman(at.signal, at.gap, [at.loss, at.epoch])


if __name__ == "__main__":
    main()
