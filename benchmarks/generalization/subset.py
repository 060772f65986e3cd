"""A few runs made anew and held against the stored ones: does the benchmark give the same here?

On one machine the numbers are equal. On another one floating point may differ, and so may the sources of Python's
standard library, which are the text of the language runs. What must not differ is the truth about a run, so these are
runs whose truth is far from every threshold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.generalization.configs import Config, all_configs
from benchmarks.generalization.signals import Series
from benchmarks.generalization.store import Made
from benchmarks.generalization.truth import outcome, phases

# The longest first. None needs a Debian package, and none takes more than about a minute of one core.
NAMES = (
    "language/text=python,width=64,tied=False,lr=0.002,schedule=cosine,unique=50000,decay=0.1,dropout=0,seed=0",
    "algorithmic/model=mlp,operation=mul,p=47,width=64,share=0.6,decay=1,seed=0",
    "vision/model=mlp,decay=0,samples=300,noise=0.3,seed=1",
)


@dataclass(frozen=True)
class Compared:
    """A run made here, and the stored one of its name.

    Attributes:
        run: Name.
        lar: Largest absolute difference of plain LAR, over the readings.
        held_out: The same of the held-out loss, in nats.
        here: The truth of the run made here.
        stored: The truth of the stored run.
    """

    run: str
    lar: float
    held_out: float
    here: str
    stored: str


def chosen() -> list[Config]:
    """The configurations of the subset."""
    by_name = {config.name: config for config in all_configs()}
    return [by_name[name] for name in NAMES]


def compare(here: Iterable[Made], stored: Iterable[Made]) -> list[Compared]:
    """Hold runs against the stored ones of the same names.

    Raises:
        SystemExit: a run is not among the stored ones.
    """
    by_name = {run.name: run for run in stored}
    found = []
    for run in here:
        other = by_name.get(run.name)
        if other is None:
            raise SystemExit(f"{run.name} is not among the {len(by_name)} stored runs: collect them first")
        found.append(
            Compared(
                run.name,
                _largest_difference(run.columns["lar"], other.columns["lar"]),
                _largest_difference(run.columns["val_loss"], other.columns["val_loss"]),
                truth_of(run),
                truth_of(other),
            )
        )
    return found


def truth_of(run: Made) -> str:
    """In words: of an algorithmic run whether it generalizes, of any other whether it overfits."""
    if run.config.family != "algorithmic":
        return outcome(run)
    return "never generalizes" if phases(run).solved is None else "generalizes"


def rows(found: Sequence[Compared]) -> list[dict[str, str]]:
    """A table for people."""
    return [
        {
            "run": each.run,
            "LAR differs by": f"{each.lar:.1e}",
            "held-out loss by": f"{each.held_out:.1e}",
            "truth here": each.here,
            "truth stored": each.stored,
        }
        for each in found
    ]


def _largest_difference(here: Series, stored: Series) -> float:
    """Over the readings that both have; what is undefined in one alone counts as infinite."""
    if here.shape != stored.shape or (np.isfinite(here) != np.isfinite(stored)).any():
        return float("inf")
    known = np.isfinite(here)
    return float(np.abs(here[known] - stored[known]).max()) if known.any() else 0.0
