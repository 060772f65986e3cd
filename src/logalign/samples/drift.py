"""Drift: measures how a sample's loss moves while the network trains on other samples.

Method: training meets a sample twice, and only other samples in the random time between. The loss changes by what
carries over from them, by forgetting, and by the gain of its own visit. The change between two visits at times
t1 < t2, in passes over the data, is modeled as

    l2 - l1 = F(t2) - F(t1) - gain

with F piecewise linear, one knot every half pass. `drift = F(now) - F(now - 1)`, in nats a pass, is the effect of
training on other samples. It is negative while training generalizes, and positive once forgetting is faster than what
carries over. `gain`, in nats, is the effect of one visit on the sample itself. The times between visits differ, which
separates the two. The fit is least squares with Huber weights over the pairs of the last pass.

`visits.py` measures at the last visit of each complete pass, where the times between visits take all values from none
to two passes. A window that ends inside a pass lacks the long ones. Forgetting soon after a visit then looks like
drift. On five recorded runs such a window alarmed in one of seven places where the held-out loss was falling. At the
ends of passes there was no such alarm (docs/log.md).

The alternative, the slope of the batch loss inside a pass, has errors ten times as large, because batches differ in how
hard their samples are. This method compares each sample with itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from logalign.errors import InputError

Vector = np.ndarray[Any, np.dtype[np.float64]]

KNOTS = np.array([-2.0, -1.5, -1.0, -0.5, 0.0])
"""Knots of F, in passes before now. F is 0 at the first."""
LAST_PASS = np.array([0.0, -1.0, 0.0, 1.0, 0.0])
"""Drift as a combination of the coefficients: F at the later knots, and the gain."""
MIN_PAIRS = 64
MIN_PASSES = 2.0
MIN_SPREAD = 0.1
"""Standard deviation of the times between visits, in passes, below which drift and gain cannot be separated.

It is 0.41 where every pass is shuffled anew, and 0 where the order never changes."""
ROUNDING = 1e-9
"""Times within so many passes of the window's edge are on it."""
REWEIGHTINGS = 4
HUBER = 2 * 1.4826
"""Residuals beyond two robust standard deviations weigh less."""
SMALLEST_RESIDUAL = 1e-9
"""Residuals below so many nats weigh fully."""

TOO_FEW_PASSES = "fewer than two passes over the data"
CONDITION = 1e-9
"""Ratio of smallest to largest eigenvalue above which the normal equations can be solved."""
UNEVEN = "the changes of loss are too uneven to fit"
SAME_ORDER = "samples come back in the same order in every pass"


@dataclass(frozen=True, kw_only=True)
class Revisits:
    """Results from the visits of the last two passes, None where unknown.

    Attributes:
        drift: Change of a sample's loss in one pass over other samples, in nats.
        drift_error: Its standard error.
        gain: Fall of the sample's own loss through one visit, in nats.
        gain_error: Its standard error.
        pairs: Number of visit pairs in the fit.
        reason: Cause of a missing drift, else None.
    """

    drift: float | None = None
    drift_error: float | None = None
    gain: float | None = None
    gain_error: float | None = None
    pairs: int = 0
    reason: str | None = None

    @property
    def rises(self) -> bool:
        """True if the drift exceeds zero by more than two of its standard errors."""
        return self.drift is not None and self.drift_error is not None and self.drift > 2 * self.drift_error


def revisits(samples: ArrayLike, times: ArrayLike, losses: ArrayLike, *, now: float | None = None) -> Revisits:
    """Fit drift and gain to recorded visits.

    Robust least squares fits `l2 - l1 = F(t2) - F(t1) - gain` to consecutive visits of one sample at times t1 < t2 with
    `now - 1 < t2 <= now` and `t1 > now - 2`. F is piecewise linear with a knot every half pass, and
    `drift = F(now) - F(now - 1)`. A visit whose loss is not finite is in no pair.

    Args:
        samples: Sample of each visit, [v], numbers or text.
        times: Time in passes over the data, [v], in any order.
        losses: The sample's loss before the update, in nats, [v].
        now: Time of the result, the last visit by default. Later visits are ignored. The last visit of a pass is the
            best choice: there the times between visits take all values.

    Returns:
        Drift and gain with their standard errors, or the reason why there are none: fewer than two passes, fewer than
        64 pairs, or an order that never changes.

    Raises:
        InputError: if arrays differ in length or have more than one axis, or times are not finite.

    Example:
        >>> import numpy as np
        >>> generator = np.random.default_rng(0)
        >>> order = np.concatenate([generator.permutation(200) for _ in range(4)])
        >>> times = np.arange(800) / 200
        >>> found = revisits(order, times, 3.0 - 0.1 * times)  # every loss falls by 0.1 a pass, and no visit adds to it
        >>> print(f"{found.drift:.3f} {abs(found.gain):.3f} {found.pairs}")
        -0.100 0.000 200
    """
    who = np.asarray(samples)
    when, loss = (np.asarray(values, dtype=np.float64) for values in (times, losses))
    if who.ndim != 1 or when.shape != who.shape or loss.shape != who.shape:
        raise InputError(
            f"visits: expected samples, times and losses of one axis and one length, found shapes {who.shape}, "
            f"{when.shape} and {loss.shape}"
        )
    if not np.isfinite(when).all():
        raise InputError("times: expected finite numbers of passes, found NaN or infinity")
    if not who.size:
        return Revisits(reason=TOO_FEW_PASSES)
    at = float(when.max()) if now is None else float(now)
    known = when <= at + ROUNDING
    who, when, loss = who[known], when[known], loss[known]
    _, number = np.unique(who, return_inverse=True)
    order = np.lexsort((when, number))
    number, when, loss = number[order], when[order], loss[order]
    with np.errstate(over="ignore", invalid="ignore"):
        changes = loss[1:] - loss[:-1]
    again = (number[1:] == number[:-1]) & np.isfinite(changes)
    t1, t2, change = when[:-1][again], when[1:][again], changes[again]
    return from_pairs(t1 - at, t2 - at, change, passes=at + _time_of_one(when))


def from_pairs(t1: Vector, t2: Vector, change: Vector, *, passes: float) -> Revisits:
    """Fit drift and gain to pairs of consecutive visits.

    Args:
        t1: Time of the earlier visit of each pair, in passes relative to now, [p].
        t2: Time of the later one, [p].
        change: Change of the loss, [p].
        passes: Number of passes so far, the last visit included.
    """
    in_window = (t2 > -1 + ROUNDING) & (t2 <= ROUNDING) & (t1 > -2 + ROUNDING) & (t1 < t2)
    t1, t2, change = t1[in_window], t2[in_window], change[in_window]
    pairs = int(change.size)
    if passes < MIN_PASSES - ROUNDING:
        return Revisits(pairs=pairs, reason=TOO_FEW_PASSES)
    if pairs < MIN_PAIRS:
        return Revisits(pairs=pairs, reason=f"{pairs} pairs of visits in the last pass, fewer than {MIN_PAIRS}")
    if float(np.std(t2 - t1)) < MIN_SPREAD:
        return Revisits(pairs=pairs, reason=SAME_ORDER)
    with np.errstate(over="ignore", invalid="ignore"):  # losses are unbounded
        return _fit(t1, t2, change)


def _time_of_one(times: Vector) -> float:
    """Return the time of one step, in passes: a pass ends one step after its last visit began."""
    apart = np.diff(np.unique(times))
    return float(np.median(apart)) if apart.size else 0.0


def _fit(t1: Vector, t2: Vector, change: Vector) -> Revisits:
    design = np.concatenate([(_hat(t2) - _hat(t1))[:, 1:], -np.ones((change.size, 1))], axis=1)
    scales = np.linalg.eigvalsh(design.T @ design)
    if not scales[0] > CONDITION * scales[-1]:
        return Revisits(pairs=int(change.size), reason=SAME_ORDER)
    weights = np.ones(change.size)
    for _ in range(REWEIGHTINGS):
        weighted = (design * weights[:, None]).T
        coefficients = np.linalg.solve(weighted @ design, weighted @ change)
        residuals = np.abs(change - design @ coefficients)
        scale = max(float(np.median(residuals)), SMALLEST_RESIDUAL)
        weights = np.minimum(1.0, HUBER * scale / np.maximum(residuals, SMALLEST_RESIDUAL))
    freedom = float(weights.sum()) - design.shape[1]
    spread = float(weights @ residuals**2)
    if freedom <= 0 or not math.isfinite(spread):
        return Revisits(pairs=int(change.size), reason=UNEVEN)
    covariance = np.linalg.inv((design * weights[:, None]).T @ design) * (spread / freedom)
    return Revisits(
        drift=float(LAST_PASS @ coefficients),
        drift_error=math.sqrt(float(LAST_PASS @ covariance @ LAST_PASS)),
        gain=float(coefficients[-1]),
        gain_error=math.sqrt(float(covariance[-1, -1])),
        pairs=int(change.size),
    )


def _hat(times: Vector) -> Vector:
    """Build a piecewise linear basis on knots: [times, knots]."""
    place = np.clip((times - KNOTS[0]) / (KNOTS[1] - KNOTS[0]), 0, len(KNOTS) - 1)
    basis: Vector = np.maximum(0.0, 1 - np.abs(place[:, None] - np.arange(len(KNOTS))))
    return basis
