"""Passes: how often training has gone through its data, told by the samples that come back or by the user's epoch.

Method: in a pass over shuffled data no sample comes twice. So a pass ends where samples of the current pass begin to
come again. `PassClock` finds that place from the tracked samples alone, to about one part in their number. Where
samples are drawn with replacement no pass has an end, and the mean number of visits of a sample counts passes.
`GivenEpochs` reads the epoch that the user passes, which may be a fraction, a whole number that stands still during a
pass, or a fraction that starts anew with each pass.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Vector = np.ndarray[Any, np.dtype[np.float64]]

WINDOW, PART = 32, 4
"""Visits that are looked at to tell whether samples have begun to come again: so many, or a part of the samples."""
AGAIN = 0.85
"""Share of them that must be of samples that this pass has had."""
SAME = 0.93
"""A pass with this share of the samples of the one before is a whole one."""
WHOLE = 1.15
"""A pass with at most so many visits for each sample is one over shuffled data, some of whose samples may be alike."""
LOST_PASSES = 2.0
"""Passes without the beginning of a new one after which their length is no longer known."""


class PassClock:
    """Counts passes over the data from the visits of some of its samples, in order of time.

    Args:
        origin: The step at which training began.
        before: Passes that there were before it.

    Attributes:
        steps_per_pass: Length of the last complete pass; None before the end of the first.
        is_whole: Whether the last pass met every sample, and hardly any twice.
    """

    def __init__(self, origin: float = 0.0, before: float = 0.0) -> None:
        self.steps_per_pass: float | None = None
        self.is_whole = False
        self._before: set[int] = set()  # samples of the last pass
        self._told = float(before)
        self._begin = float(origin)  # of the pass under way
        self._completed = float(before)
        self._counts: dict[int, int] = {}  # visits in the pass under way
        self._window: deque[tuple[float, int, bool]] = deque(maxlen=WINDOW)  # step, sample, whether it came again
        self._previous: float | None = None  # the step of the last visit before the window

    def passes(self, step: float) -> float | None:
        """Passes over the data up to a step; None where their length is not known, or not known any more."""
        if self.steps_per_pass is None:
            return None
        under_way = (step - self._begin) / self.steps_per_pass
        if under_way > LOST_PASSES:
            return None
        self._told = max(self._told, self._completed + under_way)  # a guess that is mended does not go back
        return self._told

    def visit(self, step: float, sample: int, *, known: int) -> None:
        """A tracked sample is met, one of `known` that still come."""
        again = self._counts.get(sample, 0) > 0
        self._counts[sample] = self._counts.get(sample, 0) + 1
        size = min(WINDOW, max(2, known // PART))
        while len(self._window) >= size:
            self._previous = self._window.popleft()[0]
        self._window.append((step, sample, again))
        if len(self._window) == size and sum(each[2] for each in self._window) >= AGAIN * size:
            self._begin_pass()

    def forget(self, sample: int) -> None:
        """A sample is tracked no longer."""
        self._counts.pop(sample, None)

    def _begin_pass(self) -> None:
        window = list(self._window)
        first = next(i for i, each in enumerate(window) if each[2])
        tail = window[first:]
        step = tail[0][0]
        previous = window[first - 1][0] if first else self._previous
        # Between two visits the pass may have begun at any step.
        begin = step if previous is None else step - max(0.0, step - previous - 1) / 2
        of_new: dict[int, int] = {}
        for _, sample, _ in tail:
            of_new[sample] = of_new.get(sample, 0) + 1
        of_old = {sample: count - of_new.get(sample, 0) for sample, count in self._counts.items()}
        met = {sample for sample, count in of_old.items() if count > 0}
        visits = sum(of_old.values())
        self.is_whole = visits <= WHOLE * len(met)
        # Samples some of which come several times a pass are the same in every pass; drawn ones are not.
        same = len(met & self._before) >= SAME * len(met | self._before)
        gone = 1.0 if same and met else _passes_of(visits=visits, distinct=len(met))
        self._before = met
        if begin > self._begin and gone > 0:
            length = (begin - self._begin) / gone
            # Counted by visits it is a guess, and two are better than one.
            known = self.steps_per_pass
            self.steps_per_pass = length if gone == 1 or known is None else (known + length) / 2
            self._completed += gone
            self._begin = begin
        self._counts = of_new
        self._window.clear()
        self._previous = tail[-1][0]

    def state(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "steps_per_pass": self.steps_per_pass,
            "begin": self._begin,
            "completed": self._completed,
            "counts": [list(pair) for pair in self._counts.items()],
            "window": [list(each) for each in self._window],
            "previous": self._previous,
            "whole": self.is_whole,
            "before": sorted(self._before),
            "told": self._told,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> PassClock:
        """The clock that `state()` described."""
        clock = cls(state["begin"], state["completed"])
        clock.steps_per_pass, clock._previous = state["steps_per_pass"], state["previous"]
        clock._counts = {int(sample): int(count) for sample, count in state["counts"]}
        clock.is_whole, clock._before, clock._told = state["whole"], set(state["before"]), state["told"]
        clock._window.extend((float(step), int(sample), bool(again)) for step, sample, again in state["window"])
        return clock


def _passes_of(*, visits: int, distinct: int) -> float:
    """How many passes so many visits of so many samples are: one over shuffled data, else by their number.

    Of K samples drawn with replacement, `K (1 - exp(-visits / K))` are expected to be met.
    """
    if distinct <= 1 or visits <= WHOLE * distinct:
        return float(distinct > 0)
    low, high = 0.0, visits / distinct * 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if -math.expm1(-middle) / middle > distinct / visits else (low, middle)
    return low


def passes_of(steps: Any, passes: Any, epochs: Any) -> Vector:
    """Passes over the data at each of a run's readings: as the samples tell, else as the user's epoch says.

    The length of a pass is known once the first is over. Readings before are put on the line from step 0 to there.

    Args:
        steps: [readings].
        passes: As recorded, NaN where not known, [readings].
        epochs: As recorded, [readings].
    """
    steps, passes, epochs = (np.asarray(each, dtype=np.float64) for each in (steps, passes, epochs))
    known = np.flatnonzero(np.isfinite(passes))
    found: Vector = np.where(np.isfinite(passes), passes, epochs)
    if known.size and steps[known[0]] > 0:
        early = (np.arange(steps.size) < known[0]) & ~np.isfinite(epochs)
        found[early] = steps[early] / steps[known[0]] * passes[known[0]]
    return found


JUMP, LEAST_JUMP = 3.0, 0.5
"""An advance of more than so many times the usual one, and of so many passes, is a jump."""
STARTS_ANEW = 0.5
"""A step back by at least so much, from a number of at most 1, is a fraction that starts anew with each pass."""


class GivenEpochs:
    """Reads the epoch that the user passes with a step as passes over the data so far, which never go back.

    Read as it is meant: a fraction such as 3.25, as it is; a whole number that stands still during a pass is filled in
    from the length of the pass before, and one that counts from 1 begins at 0; a fraction from 0 to 1 that starts anew
    counts one pass more each time. After a step back or a jump, as where a resumed training has another batch size,
    counting goes on at the usual pace, and `oddity` says so.

    Attributes:
        oddity: What was found to be wrong with the numbers, in a sentence; None where nothing was.
    """

    def __init__(self) -> None:
        self.oddity: str | None = None
        self._last: tuple[float, float] | None = None  # step, epoch as given
        self._passes = 0.0
        self._pace: float | None = None  # passes a step
        self._stands: tuple[float, float] | None = None  # since which step a whole number stands, which
        self._whole = True  # all numbers so far
        self._restarts = False
        self._offset = 0.0
        self._jumped: float | None = None  # the pace of a jump, until the next number tells whether it stays

    def passes(self, step: float, epoch: float | None) -> float | None:
        """Passes over the data up to a step, at which the user passed `epoch`; None where that says nothing."""
        if epoch is None or not math.isfinite(epoch):
            return None
        epoch = float(epoch)
        self._whole = self._whole and epoch == math.floor(epoch)
        if self._last is None:
            # A count from 1: nothing has been passed through at the first step.
            self._offset = 1.0 if self._whole and epoch == 1.0 and step == 0 else 0.0
            self._passes = math.floor(self._passes) + epoch if self._restarts else epoch - self._offset
            self._stands = (step, epoch)
        elif self._whole:
            self._follow_whole(step, epoch)
        else:
            self._follow(step, epoch)
        self._last = (step, epoch)
        return self._passes

    def _follow_whole(self, step: float, epoch: float) -> None:
        assert self._stands is not None
        since, stood = self._stands
        if epoch > stood:
            if step > since:
                self._pace = (epoch - stood) / (step - since)
            self._stands = (step, epoch)
            self._passes = max(self._passes, epoch - self._offset)
        elif epoch == stood:
            if self._pace is not None:
                part = min((step - since) * self._pace, 1 - 1e-9)
                self._passes = max(self._passes, epoch - self._offset + part)
        else:
            self._odd(step, epoch)
            self._offset += epoch - stood  # counting goes on from here
            self._stands = (step, epoch)

    def _follow(self, step: float, epoch: float) -> None:
        assert self._last is not None
        last_step, last = self._last
        steps, advance = step - last_step, epoch - last
        usual = None if self._pace is None else self._pace * steps
        jumped, self._jumped = self._jumped, None
        if advance < 0 and 0 < last <= 1 and -advance >= STARTS_ANEW * last:
            self._restarts = True
            advance += 1.0
            if usual is not None:
                advance += max(0, round(usual - advance))  # passes that went by between two readings
        elif advance < 0:
            self._odd(step, epoch)
            advance = 0.0 if usual is None else usual
        elif usual is not None and advance > max(JUMP * usual, LEAST_JUMP):
            pace = advance / steps if steps > 0 else math.inf
            if jumped is None or not pace < 2 * jumped < 4 * pace:  # else it stays
                self._odd(step, epoch)
                self._jumped, advance = pace, usual
        if steps > 0 and advance > 0:
            self._pace = advance / steps
        self._passes += advance

    def resume(self, passes: float) -> None:
        """Training goes back to where so many passes were over; what is known of how numbers are meant stays."""
        self._last, self._passes = None, passes

    def _odd(self, step: float, epoch: float) -> None:
        assert self._last is not None
        if self.oddity is None:
            self.oddity = (
                "epoch: expected passes over the data so far, which only grow and at an even pace, found "
                f"{epoch:.4g} at step {step:,.0f} after {self._last[1]:.4g} at step {self._last[0]:,.0f}; passes are "
                "counted on at the pace before"
            )

    @property
    def steps_per_pass(self) -> float | None:
        """The length of a pass by what the user says; None where that is not known."""
        return None if self._pace is None or self._pace <= 0 else 1 / self._pace

    def state(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "oddity": self.oddity,
            "last": _listed(self._last),
            "passes": self._passes,
            "pace": self._pace,
            "stands": _listed(self._stands),
            "whole": self._whole,
            "offset": self._offset,
            "restarts": self._restarts,
            "jumped": self._jumped,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> GivenEpochs:
        """What `state()` described."""
        given = cls()
        given.oddity, given._passes, given._pace = state["oddity"], state["passes"], state["pace"]
        given._last, given._stands = _pair(state["last"]), _pair(state["stands"])
        given._whole, given._offset = state["whole"], state["offset"]
        given._restarts, given._jumped = state["restarts"], state["jumped"]
        return given


def _listed(pair: tuple[float, float] | None) -> list[float] | None:
    return None if pair is None else list(pair)


def _pair(values: Iterable[float] | None) -> tuple[float, float] | None:
    if values is None:
        return None
    first, second = values
    return first, second
