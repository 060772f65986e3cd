"""Baseline: the LAR of training that does not overfit, for comparison with a run.

Healthy training also lowers LAR as more directions come into use. Overfitting shows as a deviation from a run that does
not overfit, at the same step or after the same tokens. The best baseline is one or several runs of another seed on data
that does not repeat. The alternative, a line through the run's own first epoch, needs no second training. It adds
nothing to what repeated samples show (docs/log.md).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from logalign.diagnosis.curves import Band, BaselineCurve
from logalign.diagnosis.robust import Vector
from logalign.diagnosis.series import known
from logalign.errors import InputError
from logalign.runs.reading import FORMS, UNEMBEDDING, Reading
from logalign.runs.run import Run, RunLike, open_run

Axis = Literal["step", "tokens"]

CURVES = (*FORMS, "loss")
"""The curves of a baseline: four forms of LAR, and the training loss, whose deviation is a rival signal."""
SCHEDULE_TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True, eq=False)
class Baseline:
    """The curves of training that does not overfit: LAR in four forms, and the training loss.

    Attributes:
        runs: The source runs, empty where readings were given.
        site: The layer.
        shape: (m, n), None where not recorded.
        axis: The axis of comparison, "step" or "tokens"; "auto" takes tokens where both sides recorded them.
        epoch: The highest epoch, None where not recorded.
        tokens_per_step: None where not recorded.
    """

    runs: tuple[Run, ...] = field(default=(), repr=False)
    site: str = UNEMBEDDING
    shape: tuple[int | None, int | None] = (None, None)
    axis: Literal["step", "tokens", "auto"] = "auto"
    epoch: float | None = None
    tokens_per_step: float | None = None
    curves: Mapping[Axis, Mapping[str, BaselineCurve]] = field(default_factory=dict, repr=False)

    @classmethod
    def from_run(
        cls,
        run: RunLike | Sequence[RunLike],
        *more: RunLike,
        site: str | None = None,
        axis: Literal["step", "tokens", "auto"] = "auto",
    ) -> Baseline:
        """Take one or several recorded runs as the baseline, best with other seeds than the run to judge.

        A baseline that shares its seed with the run lies closer to it than an independent training does. The readings
        do not show this.

        Args:
            run: A path or a Run, or several of them. `more` adds further ones. With several, the band knows how far
                runs lie apart. Runs without a common step give no baseline.
            site: The layer, by default the first run's main one.
            axis: "step", "tokens", or "auto" for tokens where both baseline and judged run recorded them.

        Raises:
            RunError: there is no readable run.
            InputError: a run has no defined LAR at this site, the shapes differ, `axis="tokens"` lacks tokens_seen,
                or the runs have no step in common.

        Example:
            >>> baseline = Baseline.from_run("runs/seed-1", "runs/seed-2")  # doctest: +SKIP
        """
        given = [run, *more] if isinstance(run, str | os.PathLike | Run) else [*run, *more]
        runs = tuple(each if isinstance(each, Run) else open_run(each) for each in given)
        if not runs:
            raise InputError("baseline: expected at least one run, found none")
        site = runs[0].main if site is None else site
        for each in runs:
            if not any(reading.lar is not None for reading in each.readings if reading.site == site):
                raise InputError(f"{each.name}: expected readings of {site!r} with a defined LAR, found none")
        return cls._of([each.readings for each in runs], [each.name for each in runs], runs, site, axis)

    @classmethod
    def from_readings(
        cls,
        readings: Sequence[Reading],
        *more: Sequence[Reading],
        axis: Literal["step", "tokens", "auto"] = "auto",
    ) -> Baseline:
        """Take readings of one layer, from one or several runs, as the baseline.

        Raises:
            InputError: none has a defined LAR, or `from_run` would raise it.

        Example:
            >>> readings = [Reading(step=step, lar=0.8 - step / 1000) for step in range(0, 100, 10)]
            >>> Baseline.from_readings(readings).band([25, 200]).center
            array([0.775,   nan])
        """
        parts = [list(readings), *(list(each) for each in more)]
        sites = {reading.site for part in parts for reading in part if reading.lar is not None}
        if len(sites) != 1:
            raise InputError(f"baseline: expected readings of one layer with a defined LAR, found {len(sites)} layers")
        names = ["the baseline's readings"] if not more else [f"baseline {i + 1}" for i in range(len(parts))]
        return cls._of(parts, names, (), sites.pop(), axis)

    @property
    def run(self) -> Run:
        """The first source run."""
        return self.runs[0]

    def band(self, x: ArrayLike, *, form: str = "lar", axis: Axis = "step") -> Band:
        """The baseline's value and uncertainty at these steps or tokens, NaN where undefined.

        Raises:
            InputError: there is no curve of this form and axis.
        """
        if form not in CURVES:
            raise InputError(f"form: expected one of {', '.join(CURVES)}, found {form!r}")
        curve = self.curve(form, axis)
        if curve is None:
            raise InputError(f"baseline: expected a curve of {form!r} by {axis}, found none recorded")
        return curve.at(np.asarray(x, dtype=np.float64))

    def curve(self, form: str, axis: Axis) -> BaselineCurve | None:
        """The curve of one form, None where it was not recorded."""
        return self.curves.get(axis, {}).get(form)

    def has(self, form: str) -> bool:
        """True where there is a curve of this form along any axis."""
        return any(form in curves for curves in self.curves.values())

    def axis_for(self, *, tokens: bool) -> Axis:
        """The axis of comparison with a run that recorded tokens, or did not.

        Raises:
            InputError: `axis="tokens"`, and the run did not.
        """
        if self.axis == "tokens" and not tokens:
            raise InputError(
                "baseline: expected readings with tokens_seen, for it compares along tokens, found none; "
                'record them or take axis="step"'
            )
        if self.axis == "auto":
            return "tokens" if tokens and self.curve("lar", "tokens") is not None else "step"
        return self.axis

    def check_shape(self, m: int | None, n: int | None, *, name: str = "the run") -> None:
        """Reject a layer of another shape, because LARs compare only at equal (m, n).

        Raises:
            InputError: the shapes are known and differ.
        """
        mine, theirs = self.shape, (m, n)
        if None not in (*mine, *theirs) and mine != theirs:
            raise InputError(
                f"{name}: expected a layer of the baseline's shape (m, n) = {mine}, found {theirs}; "
                "LARs compare only at equal shape"
            )

    def schedule_difference(self, x: Vector, lr: Vector, *, axis: Axis, tokens_per_step: float | None) -> str | None:
        """Say how the schedule at these x differs from the baseline's by more than 5 %, or return None.

        It compares only what both sides recorded.
        """
        curve = self.curve("lr", axis)
        if curve is not None:
            center = curve.at(x).center
            known = np.isfinite(center) & np.isfinite(lr) & (center > 0)
            if known.any():
                ratio = float(np.median(lr[known] / center[known]))
                if abs(ratio - 1) > SCHEDULE_TOLERANCE:
                    return f"the learning rate is {ratio:.3g} times the baseline's"
        if tokens_per_step is not None and self.tokens_per_step is not None and self.tokens_per_step > 0:
            ratio = tokens_per_step / self.tokens_per_step
            if abs(ratio - 1) > SCHEDULE_TOLERANCE:
                return f"a step has {ratio:.3g} times the baseline's tokens"
        return None

    def deviation(self, run: RunLike, *, form: str = "lar") -> tuple[Vector, Vector]:
        """Compute how far a run's LAR lies below the baseline's.

        Args:
            run: The run to compare.
            form: "lar", "lar_vocab_centered", "lar_token_centered", "lar_centered", or "loss".

        Returns:
            (steps, deviation): `baseline - run` at the run's readings, where both are defined. The baseline is
            interpolated between its readings, and ends at its last step.

        Raises:
            InputError: the form is unknown, the layers' shapes differ, or no step is common.
        """
        if form not in CURVES:
            raise InputError(f"form: expected one of {', '.join(CURVES)}, found {form!r}")
        run = run if isinstance(run, Run) else open_run(run)
        readings = [reading for reading in run.readings if reading.site == self.site]
        if readings:
            self.check_shape(readings[0].m, readings[0].n, name=run.name)
        steps, values = _points(readings, form, "step")
        curve = self.curve(form, "step")
        center = curve.at(steps).center if curve is not None else np.full(steps.shape, np.nan)
        shared = np.isfinite(center)
        if not shared.any():
            mine = self.runs[0].name if self.runs else "of given readings"
            raise InputError(f"{run.name}: expected steps that the baseline {mine} has, too, found none")
        return steps[shared], center[shared] - values[shared]

    def describe(self) -> str:
        """Describe the baseline for a verdict's basis."""
        if not self.runs:
            return "the baseline's readings"
        names = ", ".join(run.name for run in self.runs)
        return f"the baseline run {names}" if len(self.runs) == 1 else f"{len(self.runs)} baseline runs ({names})"

    @classmethod
    def _of(
        cls,
        readings: Sequence[Sequence[Reading]],
        names: Sequence[str],
        runs: tuple[Run, ...],
        site: str,
        axis: Literal["step", "tokens", "auto"],
    ) -> Baseline:
        if axis not in ("step", "tokens", "auto"):
            raise InputError(f'axis: expected "step", "tokens" or "auto", found {axis!r}')
        parts = [[reading for reading in each if reading.site == site] for each in readings]
        for name, part in zip(names, parts, strict=True):
            if not part:
                raise InputError(f"{name}: expected readings of {site!r}, found none")
        shapes = [(part[0].m, part[0].n) for part in parts]
        for name, shape in zip(names, shapes, strict=True):
            if None not in (*shape, *shapes[0]) and shape != shapes[0]:
                raise InputError(
                    f"{name}: expected a layer of the first run's shape (m, n) = {shapes[0]}, found {shape}; "
                    "LARs compare only at equal shape"
                )
        curves: dict[Axis, dict[str, BaselineCurve]] = {}
        for along in ("step", "tokens"):
            found = {form: BaselineCurve.of([_points(part, form, along) for part in parts]) for form in (*CURVES, "lr")}
            curves[along] = {form: curve for form, curve in found.items() if curve is not None}
        if axis == "tokens" and "lar" not in curves["tokens"]:
            raise InputError(
                f"{', '.join(names)}: expected readings with tokens_seen to compare along tokens, found none in "
                'common; take axis="step"'
            )
        if "lar" not in curves["step"]:
            raise InputError(f"{', '.join(names)}: expected runs with steps in common, found none")
        epochs = [epoch for part in parts for reading in part if (epoch := known(reading, "epoch")) is not None]
        rates = [rate for part in parts if (rate := _tokens_per_step(part)) is not None]
        return cls(
            runs=runs,
            site=site,
            shape=shapes[0],
            axis=axis,
            epoch=max(epochs) if epochs else None,
            tokens_per_step=float(np.median(rates)) if rates else None,
            curves=curves,
        )


def _points(readings: Sequence[Reading], form: str, axis: Axis) -> tuple[Vector, Vector]:
    """The (x, value) of the readings where both are known, x strictly increasing, where a later one wins."""
    points: dict[float, float] = {}
    last = -math.inf
    for reading in readings:
        x = float(reading.step) if axis == "step" else known(reading, "tokens_seen")
        value = known(reading, form)
        if x is None or value is None:
            continue
        if x <= last:
            points = {earlier: points[earlier] for earlier in points if earlier < x}
        points[x] = value
        last = x
    return np.array(list(points), dtype=np.float64), np.array(list(points.values()), dtype=np.float64)


def _tokens_per_step(readings: Sequence[Reading]) -> float | None:
    points = [(reading.step, tokens) for reading in readings if (tokens := known(reading, "tokens_seen")) is not None]
    if len(points) < 2 or points[-1][0] <= points[0][0]:
        return None
    return (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
