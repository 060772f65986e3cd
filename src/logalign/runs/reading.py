"""A reading holds the results of one monitored step for one layer, as plain numbers.

All of the library meets here: producers make readings, and consumers (reports, trackers, diagnosis) use them. An
undefined quantity is None and has a reason. In JSON it is null, never NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from logalign.common import markup
from logalign.errors import InputError
from logalign.mathematics.energies import Energies

UNEMBEDDING = "unembedding"
"""The site name of the layer that computes the logits."""

ENERGY_NAMES = ("weight", "input", "output")
NO_LAR = "the log has no LAR"
EPOCHS_AS_STEPS = f"{NO_LAR} and no step: its epochs stand for steps"
ROWS_AS_STEPS = f"{NO_LAR} and no step: its rows are counted instead"
"""Reasons of readings from logs without LAR, which was not tried and cannot be computed afterwards."""
FORMS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered")
SOFTMAX_FORMS = ("lar_vocab_centered", "lar_centered")
"""Forms that have a meaning only where a softmax follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One layer at one monitored step, with the fields that docs/run-format.md specifies.

    Attributes:
        step: Completed calls of `Monitor.step()` before this forward.
        site: The layer: "unembedding", or the module's name.
        lar: The plain log-alignment ratio. None where undefined.
        lar_vocab_centered: Like `lar_centered`, also None for layers without a softmax behind them.
        lar_token_centered: LAR without the mean input.
        lar_centered: LAR without both means.
        effective_dim: `k = n^(2 (1 - LAR))`, from the plain LAR.
        energies: Squared Frobenius norms {weight, input, output}.
        standard_errors: Errors of the four forms of LAR, by name, where the output energy is estimated from a sample
            of tokens. None where it is exact.
        time: Seconds since the epoch, UTC.
        n: Fan-in.
        m: Fan-out.
        tokens: Tokens in this reading.
        tokens_seen: Tokens that training has used up to and including this step, estimated from the monitored steps.
        kept: Share of this step's tokens that the mask kept. None where no mask was seen.
        loss: The training loss of this step.
        loss_mean: Mean training loss of all steps since the previous reading, with this one. It is less noisy.
        nonfinite: Rows of weight, inputs or outputs that hold a NaN or an infinity.
        reason: Why `lar` is None.
        drift: The change of a sample's loss in one pass over other samples, in nats. Only the main layer's reading has
            this field and the next six.
        drift_error: The standard error of `drift`.
        gain: The decrease of a sample's own loss by one visit, in nats.
        gain_error: The standard error of `gain`.
        revisited: Pairs of visits of one sample from which `drift` and `gain` are computed.
        passes: Passes over the data so far, from the samples that come back or from `epoch`.
        drift_reason: Why `drift` is None.
        extra: All other values passed to `Monitor.step()`, for instance `val_loss`.
    """

    step: int
    site: str = UNEMBEDDING
    lar: float | None
    lar_vocab_centered: float | None = None
    lar_token_centered: float | None = None
    lar_centered: float | None = None
    effective_dim: float | None = None
    energies: Mapping[str, float | None] | None = None
    standard_errors: Mapping[str, float | None] | None = None
    time: float | None = None
    n: int | None = None
    m: int | None = None
    tokens: int | None = None
    tokens_seen: int | None = None
    kept: float | None = None
    epoch: float | None = None
    loss: float | None = None
    loss_mean: float | None = None
    lr: float | None = None
    nonfinite: int | None = None
    reason: str | None = None
    weight_participation: float | None = None
    input_participation: float | None = None
    coherence: float | None = None
    drift: float | None = None
    drift_error: float | None = None
    gain: float | None = None
    gain_error: float | None = None
    revisited: int | None = None
    passes: float | None = None
    drift_reason: str | None = None
    extra: Mapping[str, float | None] = field(default_factory=dict)

    @classmethod
    def from_energies(cls, energies: Energies, *, softmax: bool, **fields: Any) -> Reading:
        """Build a reading from energies, where `softmax` says whether the layer's outputs are logits.

        Other keyword arguments are fields of the reading.
        """
        return cls(
            lar=finite(energies.lar),
            lar_vocab_centered=finite(energies.lar_vocab_centered) if softmax else None,
            lar_token_centered=finite(energies.lar_token_centered),
            lar_centered=finite(energies.lar_centered) if softmax else None,
            effective_dim=finite(energies.effective_dim),
            energies={name: finite(getattr(energies, name)) for name in ENERGY_NAMES},
            standard_errors=_errors(energies, softmax=softmax) if energies.output_error else None,
            n=energies.n,
            m=energies.m,
            tokens=energies.tokens,
            nonfinite=energies.nonfinite,
            reason=energies.reason,
            **fields,
        )

    def record(self) -> dict[str, Any]:
        """Return its object in readings.jsonl, with spectra, revisits and standard errors only if there are any."""
        record = {name: getattr(self, name) for name in FIELDS}
        for name in (*SPECTRAL_FIELDS, *REVISIT_FIELDS):
            if record[name] is None:
                del record[name]
        if self.standard_errors is None:
            del record["standard_errors"]
        return record | dict(self.extra)

    def line(self) -> str:
        """Return the reading as one line of strict JSON with a newline."""
        return json.dumps(self.record(), allow_nan=False, separators=(", ", ": ")) + "\n"


FIELDS = tuple(each.name for each in fields(Reading) if each.name != "extra")
SPECTRAL_FIELDS = ("weight_participation", "input_participation", "coherence")
REVISIT_FIELDS = ("drift", "drift_error", "gain", "gain_error", "revisited", "passes", "drift_reason")
INTEGER_FIELDS = ("n", "m", "tokens", "tokens_seen", "nonfinite", "revisited")
TEXT_FIELDS = ("site", "reason", "drift_reason")


class Readings(Mapping[str, Reading]):
    """The readings of one monitored step, by site."""

    def __init__(self, readings: Mapping[str, Reading], *, main: str) -> None:
        self._readings = dict(readings)
        self._main = main

    @property
    def main(self) -> Reading:
        """The reading of the unembedding, or of the first layer asked for where it is not watched."""
        return self._readings[self._main]

    @property
    def step(self) -> int:
        """The step of all these readings."""
        return self.main.step

    def __getitem__(self, site: str) -> Reading:
        return self._readings[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readings)

    def __len__(self) -> int:
        return len(self._readings)

    def _repr_html_(self) -> str:
        """Return the HTML for a notebook."""
        rows = [
            (
                site,
                markup.number(each.lar),
                markup.number(each.lar_centered),
                markup.number(each.effective_dim),
                each.reason or "",
            )
            for site, each in self._readings.items()
        ]
        return markup.card(f"Readings at step {self.step:,}", markup.table(("layer", "LAR", "centered", "k", ""), rows))

    def __repr__(self) -> str:
        values = ", ".join(f"{site}: lar {reading.lar}" for site, reading in self._readings.items())
        return f"Readings(step {self.step}; {values})"


def finite(value: float) -> float | None:
    """Return the value, or None where it is NaN or infinite."""
    return value if math.isfinite(value) else None


def never_tried(reading: Reading) -> bool:
    """Return whether LAR was not recorded, as opposed to undefined."""
    return reading.lar is None and reading.reason in (None, NO_LAR, EPOCHS_AS_STEPS, ROWS_AS_STEPS)


def reading_of_record(record: Mapping[str, Any]) -> Reading:
    """Build a reading from one object of a log, with numbers of unknown fields in `extra`.

    Raises:
        InputError: `step` or `lar` is missing, or a field has another type than docs/run-format.md gives it.
    """
    for name in ("step", "lar"):
        if name not in record:
            raise InputError(f"expected a field {name!r}, found {', '.join(sorted(record)) or 'nothing'}")
    step = _number("step", record["step"])
    if step is None or step != int(step) or step < 0:
        raise InputError(f"step: expected a whole number from 0 on, found {record['step']!r}")
    values: dict[str, Any] = {"step": int(step)}
    extra: dict[str, float | None] = {}
    for name, value in record.items():
        if name == "step":
            continue
        if name == "energies":
            values[name] = _numbers(name, value, ENERGY_NAMES)
        elif name == "standard_errors":
            values[name] = _numbers(name, value, FORMS)
        elif name in TEXT_FIELDS:
            if value is not None and not isinstance(value, str):
                raise InputError(f"{name}: expected text or null, found {value!r}")
            if value is not None:
                values[name] = value
        elif name in FIELDS:
            number = _number(name, value)
            values[name] = int(number) if number is not None and name in INTEGER_FIELDS else number
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            extra[name] = _number(name, value)
    return Reading(**values, extra=extra)


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name}: expected a number or null, found {value!r}")
    return finite(value)


def _numbers(name: str, value: Any, keys: Sequence[str]) -> dict[str, float | None] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not set(keys) <= set(value):
        raise InputError(f"{name}: expected an object with {', '.join(keys)}, found {value!r}")
    return {key: _number(f"{name}.{key}", value[key]) for key in keys}


def _errors(energies: Energies, *, softmax: bool) -> dict[str, float | None]:
    errors = energies.standard_errors
    return {name: finite(errors[name]) if softmax or name not in SOFTMAX_FORMS else None for name in FORMS}
