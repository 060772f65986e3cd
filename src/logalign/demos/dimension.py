"""Counts the directions that a modular-arithmetic network uses, without any log-alignment ratio.

The method is removal. A network that answers (a + b) mod p writes its logits as a sum of a few waves over the
p classes. Each wave of frequency f spans two directions of the class axis, cos(2 pi f c / p) and
sin(2 pi f c / p). A frequency counts if removing its plane alone from the logits lowers the mean held-out
margin by at least 2 % of its intact value. The function's dimension is twice the number of these frequencies.

The module also reports two alternatives. The additive count takes the margin over the *mean* of the other
classes. Frequencies then add up, and a frequency that does not touch the nearest competitor still counts, but
faint waves that decide nothing count sooner. The energy count takes the frequencies that carry at least 1 % of
the logits' energy, so energy without effect on the answers counts too. Removal acts on the output side because
the task fixes a basis of the class axis. On the input side the directions would need a fit to the network.

Shapes: p classes, F = (p - 1) / 2 frequencies, T held-out pairs, logits Z [T, p] without bias, labels [T].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logalign.errors import InputError

MARGIN_SHARE = 0.02
ENERGY_SHARE = 0.01

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class FunctionDimension:
    """The effect of removing each frequency on the held-out margin, and the resulting counts.

    Attributes:
        margin: mean held-out margin of the intact logits: correct logit minus the largest other one.
        margin_drop: [F] share of `margin` lost when frequency f = 1..F alone is removed, negative where removal
            helps. All NaN if `margin` is not positive.
        frequencies: the frequencies that count, empty if `margin` is not positive.
        dimension: twice the number of `frequencies`. None if `margin` is not positive: nothing generalizes, so
            there is no function whose dimension could be counted.
        additive_share: [F] contribution of frequency f to the mean lead of the correct logit over the mean of
            the others, as a share that sums to 1. All NaN if that lead is not positive.
        additive_dimension: twice the number of frequencies that contribute at least 2 % of that lead, or None
            if it is not positive.
        energy_share: [F] share of frequency f in the logits' non-constant energy. The shares sum to 1.
        energy_dimension: twice the number of frequencies with at least 1 % of that energy, or None for constant
            logits.
    """

    margin: float
    margin_drop: FloatArray
    frequencies: tuple[int, ...]
    dimension: int | None
    additive_share: FloatArray
    additive_dimension: int | None
    energy_share: FloatArray
    energy_dimension: int | None


def frequency_planes(p: int) -> FloatArray:
    """Return the orthonormal planes of the class axis, [F, 2, p]: cosine and sine of each frequency.

    The frequencies are 1 to F = (p - 1) / 2. With the constant vector the planes are a basis of R^p. For even p
    the last frequency has no sine, so it spans no plane.

    Raises:
        InputError: p is not an odd number of at least 5.
    """
    if p < 5 or p % 2 == 0:
        raise InputError(f"p must be an odd number of at least 5, found {p}; choose for example --p 59")
    classes = np.arange(p)
    frequencies = np.arange(1, (p - 1) // 2 + 1)
    angle = 2.0 * np.pi * ((frequencies[:, None] * classes[None, :]) % p) / p
    planes: FloatArray = np.sqrt(2.0 / p) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return planes


def mean_margin(logits: FloatArray, labels: NDArray[np.int64]) -> float:
    """Return the mean over the rows of the correct logit minus the largest other one."""
    rows = np.arange(len(labels))
    correct = logits[rows, labels]
    others = logits.copy()
    others[rows, labels] = -np.inf
    return float(np.mean(correct - others.max(axis=1)))


def function_dimension(logits: FloatArray, labels: NDArray[np.int64]) -> FunctionDimension:
    """Count the directions of the class axis that decide the held-out answers.

    For each frequency f alone, z' = z - P_f z with P_f the projection on its plane. This equals replacing the
    unembedding W by (I - P_f) W. Frequency f counts if the mean margin of z' is at most 98 % of the margin of z.
    The computation is in float64.

    Args:
        logits: [T, p] held-out logits, p odd.
        labels: [T] the correct class of each row.

    Raises:
        InputError: the shapes do not fit, there are no rows, p is even or under 5, or a logit is not finite.

    Example:
        >>> p, waves = 7, frequency_planes(7)
        >>> labels = np.arange(p)
        >>> logits = np.tensordot(waves[1], waves[1], axes=(0, 0))  # only frequency 2: two directions
        >>> function_dimension(logits, labels).dimension
        2
    """
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise InputError(f"expected logits [T, p] and labels [T] with T > 0, found {logits.shape} and {labels.shape}")
    if not np.isfinite(logits).all():
        raise InputError("the held-out logits are not finite; a diverged network has no dimension")
    planes = frequency_planes(logits.shape[1])
    coefficients = np.einsum("tp,fkp->tfk", logits, planes)

    energy = np.square(coefficients).sum(axis=(0, 2))
    total = energy.sum()
    rounding = np.finfo(np.float64).eps * np.square(logits).sum()
    energy_share = energy / total if total > rounding else np.full(len(planes), np.nan)
    energy_dimension = 2 * int((energy_share >= ENERGY_SHARE).sum()) if total > rounding else None

    # A plane has mean zero over the classes, so its lead over the mean of the others is p / (p - 1) of its
    # value.
    lead = np.einsum("tfk,fkt->f", coefficients, planes[:, :, labels])
    leads = lead.sum() > 0.0
    additive_share = lead / lead.sum() if leads else np.full(len(planes), np.nan)
    additive_dimension = 2 * int((additive_share >= MARGIN_SHARE).sum()) if leads else None

    margin = mean_margin(logits, labels)
    drop = np.full(len(planes), np.nan)
    if margin > 0.0:
        for f, plane in enumerate(planes):
            removed = logits - coefficients[:, f, :] @ plane
            drop[f] = 1.0 - mean_margin(removed, labels) / margin
    counting = tuple(int(f) + 1 for f in np.flatnonzero(drop >= MARGIN_SHARE))
    return FunctionDimension(
        margin=margin,
        margin_drop=drop,
        frequencies=counting,
        dimension=2 * len(counting) if margin > 0.0 else None,
        additive_share=additive_share,
        additive_dimension=additive_dimension,
        energy_share=energy_share,
        energy_dimension=energy_dimension,
    )
