"""Sample record: computes the sample fields of readings (drift, gain and passes) and the user's warnings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from logalign.samples.drift import Revisits
from logalign.samples.passes import GivenEpochs
from logalign.samples.visits import TRACKED, Visits

RETURN_WITHIN = 2.0
"""Passes, by the user's epoch, after which tracking stops if no sample came back."""
DISAGREE, COMPARED_PASSES = 2.0, 3.0
"""Factor by which the user's epoch may advance faster or slower than samples come back, over so many passes."""
NOT_TRACKED = "samples are not tracked"
GIVEN_UP = "no sample has come back in 2 passes"
ADVICE = "pass their ids, step(samples=ids), where they are packed or augmented anew each time"


class SampleRecord:
    """Turns visits of tracked samples and the user's epochs into fields of a reading.

    Args:
        tracked: Number of samples to track, 0 for none.
        origin: The step at which training began.
        before: Passes before it.

    Attributes:
        is_off: True if no samples are tracked: none was requested, or none has come back in two passes.
        told: Message to show once, which needs no fix by the user, or None.
    """

    def __init__(self, tracked: int = TRACKED, *, origin: float = 0.0, before: float = 0.0) -> None:
        self.is_off = tracked == 0
        self.told: str | None = None
        self.visits = Visits(max(tracked, 1), origin=origin, before=before)
        self._given = GivenEpochs()
        self._first: float | None = None  # passes by epoch, where samples began to be tracked
        self._compared: tuple[float, float] | None = None  # passes by epoch and by samples, where both began
        self._why_off = NOT_TRACKED if tracked == 0 else ""
        self._disagrees = False
        self._tracked = tracked
        self._notes: list[tuple[str, str]] = []

    def add(self, step: float, samples: Sequence[int] | np.ndarray[Any, Any], losses: Iterable[float]) -> None:
        """Take the visits of one step, as `Visits.add` does."""
        if not self.is_off:
            self.visits.add(step, samples, losses)

    def fields(self, step: int, epoch: float | None, *, lacking: str | None = None) -> dict[str, Any]:
        """Return the fields of the main layer's reading at a step with the user's `epoch`.

        Args:
            step: Step of the reading.
            epoch: The user's epoch.
            lacking: Missing condition for visits, in words, None where nothing is missing.
        """
        said = self._given.passes(step, epoch)
        if self._given.oddity is not None:
            self._notes.append(("epoch", self._given.oddity))
        seen = None if self.is_off else self.visits.passes(step)
        # The user's epoch is exact, unless it is odd or samples come back at another pace.
        if seen is not None and said is not None and self.visits.is_shuffled:
            self._compare(said, seen)
        trusted = said is not None and not self._disagrees and self._given.oddity is None
        passes = said if trusted or seen is None else seen
        if self._first is None:
            self._first = said
        if lacking is None and said is not None and self._first is not None:
            waited = said - self._first >= RETURN_WITHIN
            if waited and not self.is_off and not self.visits.returned:
                self._turn_off()
        why_not = self._why_off if self.is_off else lacking
        length = self._given.steps_per_pass if trusted and not self.visits.is_shuffled else None
        if why_not is not None:
            found = Revisits(reason=why_not)
        elif trusted and length is not None:
            found = self.visits.at(step, steps_per_pass=length, passes=passes)
        else:
            found = self.visits.at(step)
        return {
            "drift": found.drift,
            "drift_error": found.drift_error,
            "gain": found.gain,
            "gain_error": found.gain_error,
            "revisited": found.pairs,
            "passes": passes,
            "drift_reason": found.reason,
        }

    def notes(self) -> list[tuple[str, str]]:
        """Return the warnings since the last call, as keys and sentences. Each key warns once."""
        notes, self._notes = self._notes, []
        return notes

    def _turn_off(self) -> None:
        self.is_off = True
        self._why_off = GIVEN_UP
        if self.visits.known:
            self.told = f"{GIVEN_UP}, so no drift is measured; {ADVICE}"

    def _compare(self, said: float, seen: float) -> None:
        """Warn where the epoch advances at another pace than samples come back."""
        if self._compared is None:
            self._compared = (said, seen)
            return
        by_epoch, by_samples = said - self._compared[0], seen - self._compared[1]
        if by_samples >= COMPARED_PASSES and not 1 / DISAGREE < by_epoch / by_samples < DISAGREE:
            self._disagrees = True
            self._notes.append(
                (
                    "epoch pace",
                    f"epoch: expected passes over the data so far, found {by_epoch:.3g} of them while samples came "
                    f"back {by_samples:.3g} times; verdicts go by the samples",
                )
            )

    def state_dict(self) -> str:
        """Return the state as JSON."""
        state = {
            "is_off": self.is_off,
            "why_off": self._why_off,
            "visits": self.visits.state(),
            "given": self._given.state(),
            "first": self._first,
            "disagrees": self._disagrees,
            "compared": None if self._compared is None else list(self._compared),
        }
        return json.dumps(state, allow_nan=False)

    def load_state_dict(self, text: str) -> None:
        """Restore the `state_dict()`."""
        state: Mapping[str, Any] = json.loads(text)
        self._disagrees = state["disagrees"]
        if self._tracked and state["why_off"] != NOT_TRACKED:
            self.is_off, self._why_off = state["is_off"], state["why_off"]
            self.visits = Visits.from_state(state["visits"])
        self._given = GivenEpochs.from_state(state["given"])
        self._first = state["first"]
        compared = state["compared"]
        self._compared = None if compared is None else (compared[0], compared[1])
