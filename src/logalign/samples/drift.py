"""Drift: what happens to a sample's loss while the network trains on other samples.

Method: a sample is met twice, after a random time in which only other samples were trained on. Its loss changes by what
carries over from them, by what is forgotten, and by what its own visit bought. The change between two visits at times
t1 < t2, in passes over the data, is modeled as

    l2 - l1 = F(t2) - F(t1) - gain

with F piecewise linear, one knot every half pass. `drift = F(now) - F(now - 1)`, in nats a pass, is the movement that
training on other samples gives: negative while it generalizes, positive once samples are forgotten faster than anything
carries over. `gain`, in nats, is what one visit buys of the sample itself. The two are told apart because the times
between visits differ. The fit is least squares with Huber weights over the pairs of the last pass.

A training is asked at the last visit of each complete pass (`visits.py`), where samples have been met at all times
between visits, from none to two passes. A window that ends inside a pass lacks the long ones, and what is forgotten
soon after a visit then passes for drift: on five recorded runs it alarmed in one of seven places where the held-out
loss was falling, and at the ends of passes in none (docs/log.md).

The alternative, the slope of the batch loss inside a pass, has errors ten times as large, because batches differ in how
hard their samples are. Here each sample is compared with itself.
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
"""Of F, in passes before now. F is 0 at the first of them."""
LAST_PASS = np.array([0.0, -1.0, 0.0, 1.0, 0.0])
"""Drift as a combination of the coefficients: F at the later knots, and the gain."""
MIN_PAIRS = 64
MIN_PASSES = 2.0
MIN_SPREAD = 0.1
"""Standard deviation of the times between visits, in passes, below which drift and gain cannot be told apart.

It is 0.41 where every pass is shuffled anew, and 0 where the order never changes."""
ROUNDING = 1e-9
"""Passes; times that are closer to the edge of the window are on it."""
REWEIGHTINGS = 4
HUBER = 2 * 1.4826
"""Residuals beyond two robust standard deviations weigh less."""
SMALLEST_RESIDUAL = 1e-9
"""Nats; residuals below it have full weight."""

TOO_FEW_PASSES = "fewer than two passes over the data"
CONDITION = 1e-9
"""Ratio of the smallest to the largest eigenvalue of the normal equations from which on they can be solved."""
UNEVEN = "the changes of loss are too uneven to fit"
SAME_ORDER = "samples come back in the same order in every pass"


@dataclass(frozen=True, kw_only=True)
class Revisits:
    """What the visits of the last two passes say; numbers are None where they cannot be told.

    Attributes:
        drift: Change of a sample's loss in one pass over other samples, in nats.
        drift_error: Its standard error.
        gain: By how much one visit lowers the sample's own loss, in nats.
        gain_error: Its standard error.
        pairs: How many pairs of visits were used.
        reason: Why there is no drift; None where there is one.
    """

    drift: float | None = None
    drift_error: float | None = None
    gain: float | None = None
    gain_error: float | None = None
    pairs: int = 0
    reason: str | None = None

    @property
    def rises(self) -> bool:
        """Whether the drift is above zero by more than two of its standard errors."""
        return self.drift is not None and self.drift_error is not None and self.drift > 2 * self.drift_error


def revisits(samples: ArrayLike, times: ArrayLike, losses: ArrayLike, *, now: float | None = None) -> Revisits:
    """Drift and gain of recorded visits.

    `l2 - l1 = F(t2) - F(t1) - gain` by robust least squares over consecutive visits of one sample at times t1 < t2 with
    `now - 1 < t2 <= now` and `t1 > now - 2`. F is piecewise linear with a knot every half pass, and
    `drift = F(now) - F(now - 1)`. A visit whose loss is not finite is in no pair.

    Args:
        samples: Which sample was visited, [v], numbers or text.
        times: When, in passes over the data, [v], in any order.
        losses: The sample's loss before the update, in nats, [v].
        now: The time that the result is for; the last visit by default. Later visits are not looked at. The last visit
            of a pass is the best choice: there samples have been met at all times between visits.

    Returns:
        Drift and gain with their standard errors, or the reason why there are none: fewer than two passes, fewer than
        64 pairs, or an order that never changes.

    Raises:
        InputError: arrays of different lengths or more than one axis, or times that are not finite.

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
    """Drift and gain from pairs of consecutive visits.

    Args:
        t1: Time of the earlier visit of each pair, in passes relative to now, [p].
        t2: Of the later one, [p].
        change: By how much the loss has changed, [p].
        passes: How many passes there have been, the last visit included.
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
    with np.errstate(over="ignore", invalid="ignore"):  # losses without bound
        return _fit(t1, t2, change)


def _time_of_one(times: Vector) -> float:
    """The time that one step takes, in passes: a pass is complete one step after its last visit began."""
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
    """The piecewise linear basis on the knots: [times, knots]."""
    place = np.clip((times - KNOTS[0]) / (KNOTS[1] - KNOTS[0]), 0, len(KNOTS) - 1)
    basis: Vector = np.maximum(0.0, 1 - np.abs(place[:, None] - np.arange(len(KNOTS))))
    return basis
