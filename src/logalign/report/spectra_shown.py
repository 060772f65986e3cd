"""Thin the spectra p and q of a run's folder to what a page can hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from logalign.runs.run import Run

POINTS, STEPS, SITES, NUMBERS = 200, 24, 12, 60_000
"""Points of a spectrum, steps, layers and total numbers that one page holds."""

Vector = np.ndarray[Any, Any]
NAME = re.compile(r"step-(\d+)\.safetensors")


@dataclass(frozen=True, kw_only=True)
class ShownSpectra:
    """The spectra to show.

    Attributes:
        steps: Chosen steps, in order.
        recorded: Number of steps with spectra.
        sites: By layer and step: (numbers of the directions from 1 on, p, q).
        left_out: Layers with spectra that are not shown.
        damaged: Unreadable files.
    """

    steps: list[int]
    recorded: int
    sites: Mapping[str, Mapping[int, tuple[Vector, Vector, Vector]]] = field(repr=False)
    left_out: int
    damaged: list[str]


def shown_spectra(run: Run, main: str) -> ShownSpectra | None:
    """Read the spectra of evenly chosen steps, the main layer's first, or return None where there are none."""
    folder = run.spectra_folder
    if not folder.is_dir():
        return None
    files = {int(match[1]): path for path in folder.iterdir() if (match := NAME.fullmatch(path.name))}
    damaged: list[str] = []
    names: list[str] = []
    for step in sorted(files, reverse=True):
        names = _sites(files[step])
        if names:
            break
    if not names:
        return None
    sites = sorted(names, key=lambda site: site != main)[:SITES]
    count = max(2, min(STEPS, NUMBERS // (2 * POINTS * len(sites))))
    steps = sorted(files)
    chosen = sorted({steps[i] for i in np.linspace(0, len(steps) - 1, count).round().astype(int)})
    found: dict[str, dict[int, tuple[Vector, Vector, Vector]]] = {site: {} for site in sites}
    for step in chosen:
        try:
            with safe_open(files[step], framework="np") as file:
                keys = set(file.keys())
                for site in sites:
                    if f"{site}.p" in keys:
                        p = file.get_tensor(f"{site}.p")
                        # A checkpoint has weights and no inputs.
                        q = file.get_tensor(f"{site}.q") if f"{site}.q" in keys else np.full(p.shape, np.nan)
                        if p.ndim == 1 and p.shape == q.shape and p.size and np.isfinite(p).any():
                            found[site][step] = _thinned(p, q)
        except (SafetensorError, OSError, ValueError, TypeError):
            damaged.append(files[step].name)
    held = {site: at for site, at in found.items() if at}
    if not held:
        return None
    shown = sorted({step for at in held.values() for step in at})
    return ShownSpectra(steps=shown, recorded=len(steps), sites=held, left_out=len(names) - len(held), damaged=damaged)


def _sites(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="np") as file:
            return [key.removesuffix(".p") for key in file.keys() if key.endswith(".p")]  # noqa: SIM118
    except (SafetensorError, OSError):
        return []


def _thinned(p: Vector, q: Vector) -> tuple[Vector, Vector, Vector]:
    """Select directions evenly in the logarithm of their number, the first and the last included."""
    rows = np.unique(np.geomspace(1, p.size, POINTS).round().astype(int)) - 1
    return rows + 1, p[rows].astype(np.float64), q[rows].astype(np.float64)
