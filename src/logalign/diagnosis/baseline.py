"""Baseline: the LAR of a run that does not overfit, against which another run is compared.

Healthy training lowers LAR, too, as more directions come into use; what tells overfitting is the deviation from a run
that does not overfit, at the same step.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from logalign.errors import InputError
from logalign.readings import UNEMBEDDING
from logalign.runlog import Run, open_run

FORMS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered")

Vector = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The LAR curves of a baseline run, all forms, by step.

    Attributes:
        run: The run that it is taken from.
        site: The layer.
    """

    run: Run = field(repr=False)
    site: str = UNEMBEDDING

    @classmethod
    def from_run(cls, run: str | os.PathLike[str] | Run, *, site: str = UNEMBEDDING) -> Baseline:
        """Take a recorded run as the baseline.

        Raises:
            RunError: there is no readable run.
            InputError: it has no defined LAR at this site.
        """
        baseline = cls(run=run if isinstance(run, Run) else open_run(run), site=site)
        steps, _ = baseline._curve(baseline.run, "lar")
        if not steps.size:
            raise InputError(f"{baseline.run.path}: expected readings of {site!r} with a defined LAR, found none")
        return baseline

    def deviation(self, run: str | os.PathLike[str] | Run, *, form: str = "lar") -> tuple[Vector, Vector]:
        """How far a run's LAR has fallen below the baseline's.

        Args:
            run: The run to compare.
            form: "lar", "lar_vocab_centered", "lar_token_centered" or "lar_centered".

        Returns:
            (steps, deviation): `baseline LAR - run's LAR` at the run's readings, the baseline interpolated between its
            own; only where both are defined, and nothing beyond the baseline's last step.

        Raises:
            InputError: an unknown form, layers of different shape, or no step in common.
        """
        if form not in FORMS:
            raise InputError(f"form: expected one of {', '.join(FORMS)}, found {form!r}")
        run = run if isinstance(run, Run) else open_run(run)
        mine, theirs = self._shape(self.run), self._shape(run)
        if None not in (*mine, *theirs) and mine != theirs:
            raise InputError(
                f"{run.path}: expected a layer of the baseline's shape (m, n) = {mine}, found {theirs}; "
                "LARs compare only at equal shape"
            )
        known, baseline = self._curve(self.run, form)
        steps, values = self._curve(run, form)
        shared = (steps >= known.min()) & (steps <= known.max()) if known.size else np.zeros(steps.shape, bool)
        if not shared.any():
            raise InputError(f"{run.path}: expected steps that the baseline {self.run.path} has, too, found none")
        steps = steps[shared]
        return steps, np.interp(steps, known, baseline) - values[shared]

    def _curve(self, run: Run, form: str) -> tuple[Vector, Vector]:
        columns = run.columns(self.site)
        steps, values = columns["step"].astype(np.float64), columns[form]
        defined = np.isfinite(values)
        return steps[defined], values[defined]

    def _shape(self, run: Run) -> tuple[int | None, int | None]:
        first = next((reading for reading in run.readings if reading.site == self.site), None)
        return (first.m, first.n) if first is not None else (None, None)
