"""Thin a long run to what a screen can show, and lose no extreme.

Method: the readings are cut into buckets of equal size. Each bucket keeps the rows that hold the lowest and the highest
value of any curve, the first and the last row, and the first undefined row. This is the M4 aggregation (Jugel and
others, VLDB 2014) with one set of rows for all curves of a run, so that hovering reads all curves at one step. The
alternative, one set of rows a curve, needs fewer points for each, but hovering then finds another step on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Vector = np.ndarray[Any, Any]


def kept_rows(curves: Sequence[Vector], *, most: int) -> Vector:
    """Return the rows to keep, in order, or all rows where there are at most `most`.

    Args:
        curves: [rows] each, of equal length, NaN where undefined.
        most: Most rows to keep. Every curve takes two of each bucket, so many curves mean wider buckets.

    Example:
        >>> kept_rows([np.array([1.0, 5.0, 1.0, 1.0, -3.0, 1.0, 1.0, 1.0])], most=5).tolist()
        [0, 1, 4, 7]
    """
    rows = len(curves[0])
    if rows <= most:
        return np.arange(rows)
    # Two extremes of each curve, the first and the last row, and the first undefined row of each curve.
    buckets = max(1, most // (3 * len(curves) + 2))
    edges = np.linspace(0, rows, buckets + 1).astype(np.int64)
    starts = edges[:-1]
    width = int(np.diff(edges).max())
    place = np.minimum(starts[:, None] + np.arange(width), (edges[1:] - 1)[:, None])  # [buckets, width]
    found = [starts, edges[1:] - 1]
    for curve in curves:
        undefined = ~np.isfinite(curve)
        if undefined.all():
            continue
        for filled, best in (
            (np.where(undefined, np.inf, curve), np.argmin),
            (np.where(undefined, -np.inf, curve), np.argmax),
        ):
            found.append(place[np.arange(buckets), best(filled[place], axis=1)])
        if undefined.any():
            gaps = undefined[place]
            found.append(place[np.arange(buckets), gaps.argmax(axis=1)][gaps.any(axis=1)])
    return np.unique(np.concatenate(found))
