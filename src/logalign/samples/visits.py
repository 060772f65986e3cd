"""Visits: follows a training's tracked samples to measure drift and gain, in bounded memory.

Method: a bottom-k sketch. A sample has a 63-bit hash, and the sketch tracks the samples with the lowest k hashes seen.
This random choice is the same on every rank and in every resumed training. The sketch keeps each sample's last visit,
and the pairs of consecutive visits of the last passes. `drift.from_pairs` computes drift and gain from them.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from logalign.samples.drift import ROUNDING, Revisits, from_pairs
from logalign.samples.passes import PassClock

HIGHEST = 2**63 - 1
"""The highest hash."""
TRACKED = 512
"""See docs/revisits.md for error and cost of others."""
PAIRS_PER_SAMPLE = 8
"""Most pairs to keep for each tracked sample."""
KEPT_PASSES = 2.1
LOST_PASSES = 2.0
"""A sample without a visit for so many passes is dropped: its next visit would be in no pair."""
NOTHING_CAME_BACK = "no sample has come back so far"
LOST = "no sample has come back in the last two passes"


class Visits:
    """Takes visits of samples and gives drift and gain at any step.

    Args:
        tracked: Number of samples to track.
        origin: The step at which training began.
        before: Passes before it.

    Example:
        >>> visits = Visits(tracked=100)
        >>> generator = np.random.default_rng(0)
        >>> for step in range(80):
        ...     if step % 20 == 0:
        ...         order = hashes_of(generator.permutation(200))
        ...     batch = order[step % 20 * 10 :][:10]
        ...     visits.add(step, batch, 3.0 - 0.005 * step + 0.01 * generator.standard_normal(10))
        >>> round(visits.passes(79), 1), visits.at(79).pairs > 64, round(visits.at(79).drift, 1)
        (4.0, True, -0.1)
    """

    def __init__(self, tracked: int = TRACKED, *, origin: float = 0.0, before: float = 0.0) -> None:
        self._tracked = tracked
        self._clock = PassClock(origin, before)
        self._last: dict[int, tuple[float, float]] = {}  # step and loss of the last visit, NaN where that is unknown
        self._pairs: deque[tuple[float, float, float]] = deque(maxlen=PAIRS_PER_SAMPLE * tracked)  # steps, change
        self._highest: int | None = None  # the threshold, until samples come or go
        self._seen = 0  # visits of tracked samples
        self._again = 0  # visits of known samples
        self._found: tuple[int, Revisits] | None = None  # the last complete pass, and the result at its end

    @property
    def threshold(self) -> int:
        """The highest hash that is tracked."""
        if self._highest is None:
            self._highest = HIGHEST if len(self._last) < self._tracked else max(self._last)
        return self._highest

    @property
    def known(self) -> int:
        """The number of samples tracked."""
        return len(self._last)

    @property
    def returned(self) -> int:
        """The number of returns of tracked samples so far."""
        return self._again

    @property
    def steps_per_pass(self) -> float | None:
        """The length of a pass over the data in steps, or None if unknown."""
        return self._clock.steps_per_pass

    def passes(self, step: float) -> float | None:
        """Return passes over the data up to a step, or None in the first and where samples stop coming back."""
        return self._clock.passes(step)

    def add(self, step: float, samples: Sequence[int] | np.ndarray[Any, Any], losses: Iterable[float]) -> None:
        """Take the visits of one step, not before the last call's.

        Args:
            step: Step of the visits.
            samples: Hashes, whole numbers from 0 to 2**63 - 1. One that comes twice in a step is one visit with the
                mean of its finite losses.
            losses: Loss of each before the update, in nats. A visit without a finite loss is in no pair.
        """
        self._drop_lost(step)
        by_sample: dict[int, list[float]] = {}
        highest = self.threshold  # most samples are above it
        for sample, loss in zip(samples, losses, strict=True):
            if sample <= highest:
                by_sample.setdefault(int(sample), []).append(float(loss))
        for sample in sorted(by_sample):
            each = [loss for loss in by_sample[sample] if math.isfinite(loss)]
            self._visit(float(step), sample, math.fsum(each) / len(each) if each else math.nan)

    @property
    def is_shuffled(self) -> bool:
        """True if the last pass met every sample once, so that its length is exact."""
        return self._clock.is_whole

    def at(self, step: float, *, steps_per_pass: float | None = None, passes: float | None = None) -> Revisits:
        """Return drift and gain at the end of the last complete pass, for a step not before the last visit.

        Args:
            step: Current step. Its own visits are already taken.
            steps_per_pass: Length of a pass, where known from elsewhere.
            passes: Passes before that step, where known from elsewhere.
        """
        length = self._clock.steps_per_pass if steps_per_pass is None else steps_per_pass
        passes = self._clock.passes(step) if passes is None else passes
        if not self._again:
            return Revisits(reason=NOTHING_CAME_BACK)
        if length is None or passes is None:
            lost = length is not None
            return Revisits(reason=LOST if lost else NOTHING_CAME_BACK)
        while self._pairs and self._pairs[0][1] <= step - KEPT_PASSES * length:
            self._pairs.popleft()
        if not self._pairs:
            return Revisits(reason=LOST)
        complete = math.floor(passes + 1 / length + ROUNDING)
        if self._found is None or self._found[0] != complete:
            last = step - (passes - complete) * length - 1  # the last step of that pass
            first, second, change = np.array(self._pairs, dtype=np.float64).T
            found = from_pairs((first - last) / length, (second - last) / length, change, passes=complete)
            self._found = complete, found
        return self._found[1]

    def _visit(self, step: float, sample: int, loss: float) -> None:
        before = self._last.get(sample)
        if before is None:
            if sample > self.threshold:
                return
            if len(self._last) >= self._tracked:
                self._forget(self.threshold)
            self._highest = None
        else:
            self._again += 1
            change = loss - before[1]
            if math.isfinite(change):
                self._pairs.append((before[0], step, change))
        self._seen += 1
        self._last[sample] = (step, loss if math.isfinite(loss) else math.nan)
        self._clock.visit(step, sample, known=len(self._last))

    def _drop_lost(self, step: float) -> None:
        """Forget samples that no longer come, so that others replace them."""
        length = self._clock.steps_per_pass
        if length is None or self._clock.passes(step) is None:
            return
        oldest = step - LOST_PASSES * length
        for sample in [sample for sample, (last, _) in self._last.items() if last < oldest]:
            self._forget(sample)

    def _forget(self, sample: int) -> None:
        del self._last[sample]
        self._highest = None
        self._clock.forget(sample)

    def state(self) -> dict[str, Any]:
        """Return the state as strict JSON."""
        return {
            "tracked": self._tracked,
            "clock": self._clock.state(),
            "last": [[sample, step, _null(loss)] for sample, (step, loss) in self._last.items()],
            "pairs": [list(pair) for pair in self._pairs],
            "seen": self._seen,
            "again": self._again,
            "found": None if self._found is None else [self._found[0], asdict(self._found[1])],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Visits:
        """Restore from `state()`."""
        visits = cls(state["tracked"])
        visits._clock = PassClock.from_state(state["clock"])
        visits._last = {
            int(sample): (float(step), math.nan if loss is None else float(loss))
            for sample, step, loss in state["last"]
        }
        visits._pairs.extend((float(first), float(second), float(change)) for first, second, change in state["pairs"])
        visits._seen, visits._again = int(state["seen"]), int(state["again"])
        found = state.get("found")
        visits._found = None if found is None else (int(found[0]), Revisits(**found[1]))
        return visits


def hashes_of(ids: Iterable[Any]) -> list[int]:
    """Hash samples' ids: whole numbers, text, or anything else that `repr` distinguishes.

    Example:
        >>> hashes_of([7, "a"]) == hashes_of([7, "a"]), len(set(hashes_of(range(1000))))
        (True, 1000)
    """
    return [_hash(each) for each in ids]


def _hash(each: Any) -> int:
    plain = int(each) if isinstance(each, int | np.integer) else each
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & HIGHEST


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value
