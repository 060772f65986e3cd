"""Short names of runs that are shown side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from logalign.errors import InputError


def short_names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Find the shortest endings that distinguish the runs' paths.

    Raises:
        InputError: two paths are the same.

    Example:
        >>> short_names(["runs/a/seed-0", "runs/b/seed-0", "runs/b/seed-1"])
        ['a/seed-0', 'b/seed-0', 'b/seed-1']
    """
    parts = [Path(path).resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"expected different runs; {paths[0]} and others are the same one given twice")
