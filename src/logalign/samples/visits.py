"""Visits: the tracked samples of a training as they come, and what they say, in bounded memory.

Method: a bottom-k sketch. A sample has a 63-bit hash, and those with the lowest k hashes of all that were seen are
tracked: a choice at random that every rank makes alike, and every resumed training makes again. Of each the last visit
is kept, and of the last passes the pairs of consecutive visits; `drift.from_pairs` makes drift and gain of them.
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
"""Error and cost of other numbers: docs/revisits.md."""
PAIRS_PER_SAMPLE = 8
"""Pairs that are kept at most, for each tracked sample."""
KEPT_PASSES = 2.1
LOST_PASSES = 2.0
"""A sample that has not been met for so many passes is tracked no longer: its next visit would be in no pair."""
NOTHING_CAME_BACK = "no sample has come back so far"
LOST = "no sample has come back in the last two passes"


class Visits:
    """Takes visits of samples and gives drift and gain at any step.

    Args:
        tracked: How many samples to track.
        origin: The step at which training began.
        before: Passes that there were before it.

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
        self._again = 0  # those of samples that were known
        self._found: tuple[int, Revisits] | None = None  # the last complete pass, and what was found at its end

    @property
    def threshold(self) -> int:
        """Samples with a higher hash are not tracked."""
        if self._highest is None:
            self._highest = HIGHEST if len(self._last) < self._tracked else max(self._last)
        return self._highest

    @property
    def known(self) -> int:
        """How many samples are tracked now."""
        return len(self._last)

    @property
    def returned(self) -> int:
        """How often a tracked sample has come back so far."""
        return self._again

    @property
    def steps_per_pass(self) -> float | None:
        """The length of a pass over the data in steps; None where it is not known."""
        return self._clock.steps_per_pass

    def passes(self, step: float) -> float | None:
        """Passes over the data up to a step; None before the end of the first, and where samples come back no more."""
        return self._clock.passes(step)

    def add(self, step: float, samples: Sequence[int] | np.ndarray[Any, Any], losses: Iterable[float]) -> None:
        """Take the visits of one step, which is not before that of the last call.

        Args:
            step: When.
            samples: Hashes, whole numbers from 0 to 2**63 - 1. One that comes twice in a step is one visit with the
                mean of its losses that are finite.
            losses: Of each, before the update, in nats; a visit without a finite loss is in no pair.
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
        """Whether the last pass met every sample once, so that its length is exact."""
        return self._clock.is_whole

    def at(self, step: float, *, steps_per_pass: float | None = None, passes: float | None = None) -> Revisits:
        """Drift and gain at the last step of the last complete pass, at a step not before that of the last visit.

        Args:
            step: Where; its own visits are among those that were taken.
            steps_per_pass: The length of a pass, where it is known otherwise.
            passes: Passes before that step, where they are known otherwise.
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
        """Forget samples that come no more, so that others take their place."""
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
        """All of it, as strict JSON can hold it."""
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
        """What `state()` described."""
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
    """Hashes of samples' ids, which may be whole numbers, text, or anything else that `repr` tells apart.

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
