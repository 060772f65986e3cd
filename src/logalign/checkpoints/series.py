"""A series of checkpoints as a run: a reading for each weight of each checkpoint, for `logalign report` to draw."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from logalign.checkpoints.opening import step_of
from logalign.checkpoints.spectra import CheckpointSpectra
from logalign.checkpoints.spectrum import WeightSpectrum
from logalign.checkpoints.text import OnText
from logalign.errors import InputError
from logalign.runs.reading import UNEMBEDDING, Reading
from logalign.runs.run import main_layer
from logalign.runs.writer import RunWriter

NO_INPUTS = "no inputs: weights alone give only the bound lar_bound"


def steps_of(paths: Sequence[Path]) -> dict[Path, int]:
    """The step of each checkpoint, in step order, from trainer_state.json or names, else counted from 0 as given.

    Raises:
        InputError: two checkpoints are the same or have the same step, or only some have one.
    """
    if len(set(paths)) < len(paths):
        raise InputError("expected checkpoints that differ, found one given twice")
    steps = {path: step_of(path) for path in paths}
    without = [path for path, step in steps.items() if step is None]
    if len(without) == len(paths):
        return {path: place for place, path in enumerate(paths)}
    if without:
        raise InputError(
            f"{without[0]}: expected a step in the name of each checkpoint (checkpoint-100, step_200) or of none, "
            f"found one in {len(paths) - len(without)} of {len(paths)}; rename it"
        )
    known = {path: step for path, step in steps.items() if step is not None}
    by_step: dict[int, Path] = {}
    for path, step in known.items():
        if step in by_step:
            raise InputError(
                f"expected a step of its own for each checkpoint, found {step} in {by_step[step]} and {path}"
            )
        by_step[step] = path
    return {path: step for step, path in sorted(by_step.items())}


class SeriesWriter:
    """Writes the results of checkpoints to a run folder, one after the other.

    Args:
        path: The folder, new or empty.
        settings: The settings that run.json records.

    Raises:
        RunError: the folder holds a run, or is not writable.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self._sites: dict[str, dict[str, Any]] = {}
        self._writer = RunWriter(path, {"sites": {}, "settings": dict(settings), "made_from": "checkpoints"})

    def __enter__(self) -> SeriesWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def add(self, step: int, found: CheckpointSpectra, on_text: Mapping[str, OnText] | None = None) -> None:
        """Write the readings of one checkpoint and p of each weight.

        Args:
            step: Its step.
            found: Its spectra.
            on_text: The results of its layers on a text, by site.

        Raises:
            InputError: a weight's shape differs from the previous checkpoints.
        """
        for weight in found.weights:
            known = self._sites.setdefault(weight.site, _described(weight))
            if (known["m"], known["n"]) != (weight.m, weight.n):
                raise InputError(
                    f"{found.path}: expected {weight.name} of shape {(known['m'], known['n'])} as in the checkpoints "
                    f"before, found {(weight.m, weight.n)}; they are not of one training"
                )
        main = main_layer(self._sites, otherwise=next(iter(self._sites)))
        self._writer.describe(sites=self._sites, main=main, model=found.model)
        for reading in readings_of(step, found.weights, on_text):
            self._writer.append(reading)
        for weight in found.weights:
            if weight.p is not None:
                self._writer.spectra(step, weight.site, p=weight.p)


def readings_of(
    step: int, weights: Iterable[WeightSpectrum], on_text: Mapping[str, OnText] | None = None
) -> list[Reading]:
    """Make a reading for each weight, with LAR None where there are no inputs.

    `extra` has lar_bound, stable_rank and weight_norm. weight_participation is d_p.
    """
    readings = []
    for weight in weights:
        fields: dict[str, Any] = {
            "step": step,
            "site": weight.site,
            "weight_participation": weight.participation,
            "extra": {
                "lar_bound": weight.lar_bound,
                "stable_rank": weight.stable_rank,
                "weight_norm": weight.norm,
            },
        }
        seen = None if on_text is None else on_text.get(weight.site)
        if seen is not None:
            fields |= {"input_participation": seen.input_participation, "coherence": seen.coherence}
            readings.append(Reading.from_energies(seen.energies, softmax=weight.site == UNEMBEDDING, **fields))
            continue
        energy = None if weight.norm is None else weight.norm**2
        readings.append(
            Reading(
                **fields,
                lar=None,
                n=weight.n,
                m=weight.m,
                energies={"weight": energy, "input": None, "output": None},
                nonfinite=weight.nonfinite,
                reason=weight.reason
                or (NO_INPUTS if on_text is None else "no linear layer of the model has this weight"),
            )
        )
    return readings


def _described(weight: WeightSpectrum) -> dict[str, Any]:
    return {
        "module": weight.name.removesuffix(".weight"),
        "how": weight.how,
        "softmax": weight.site == UNEMBEDDING,
        "m": weight.m,
        "n": weight.n,
        "dtype": weight.dtype,
        **({"weight": "stored as [n, m]"} if weight.is_transposed else {}),
    }
