"""Passes: counts training's passes over its data, from returning samples or from the user's epoch.

Method: in a pass over shuffled data no sample comes twice. So a pass ends where samples of the current pass begin to
come again. `PassClock` finds that place from the tracked samples alone, to about one part in their number. Where
samples are drawn with replacement, no pass has an end, and the mean number of visits of a sample counts passes.
`GivenEpochs` reads the user's epoch. It may be a fraction, a whole number that is constant during a pass, or a
fraction that restarts with each pass.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Vector = np.ndarray[Any, np.dtype[np.float64]]

WINDOW, PART = 32, 4
"""Visits that show whether samples have begun to come again: so many, or one `PART`-th of the samples."""
AGAIN = 0.85
"""Share of them that must repeat samples of this pass."""
SAME = 0.93
"""A pass that shares this part of samples with the one before is whole."""
WHOLE = 1.15
"""A pass with at most so many visits for each sample covers shuffled data. Some samples may be alike."""
LOST_PASSES = 2.0
"""Passes without the start of a new one after which their length is no longer known."""


class PassClock:
    """Counts passes over the data from the visits of some of its samples, in order of time.

    Args:
        origin: The step at which training began.
        before: Passes before it.

    Attributes:
        steps_per_pass: Length of the last complete pass, None before the end of the first.
        is_whole: True if the last pass met every sample, and hardly any twice.
    """

    def __init__(self, origin: float = 0.0, before: float = 0.0) -> None:
        self.steps_per_pass: float | None = None
        self.is_whole = False
        self._before: set[int] = set()  # samples of the last pass
        self._told = float(before)
        self._begin = float(origin)  # start of the pass under way
        self._completed = float(before)
        self._counts: dict[int, int] = {}  # visits in the pass under way
        self._window: deque[tuple[float, int, bool]] = deque(maxlen=WINDOW)  # step, sample, whether it came again
        self._previous: float | None = None  # the step of the last visit before the window

    def passes(self, step: float) -> float | None:
        """Return passes over the data up to a step, None where their length is not or no longer known."""
        if self.steps_per_pass is None:
            return None
        under_way = (step - self._begin) / self.steps_per_pass
        if under_way > LOST_PASSES:
            return None
        self._told = max(self._told, self._completed + under_way)  # a corrected guess does not go back
        return self._told

    def visit(self, step: float, sample: int, *, known: int) -> None:
        """Take a visit of one of `known` tracked samples."""
        again = self._counts.get(sample, 0) > 0
        self._counts[sample] = self._counts.get(sample, 0) + 1
        size = min(WINDOW, max(2, known // PART))
        while len(self._window) >= size:
            self._previous = self._window.popleft()[0]
        self._window.append((step, sample, again))
        if len(self._window) == size and sum(each[2] for each in self._window) >= AGAIN * size:
            self._begin_pass()

    def forget(self, sample: int) -> None:
        """Stop counting a sample."""
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
        # Data with duplicates have the same samples in every pass. Drawn samples differ.
        same = len(met & self._before) >= SAME * len(met | self._before)
        gone = 1.0 if same and met else _passes_of(visits=visits, distinct=len(met))
        self._before = met
        if begin > self._begin and gone > 0:
            length = (begin - self._begin) / gone
            # A count by visits is a guess, and two guesses are better than one.
            known = self.steps_per_pass
            self.steps_per_pass = length if gone == 1 or known is None else (known + length) / 2
            self._completed += gone
            self._begin = begin
        self._counts = of_new
        self._window.clear()
        self._previous = tail[-1][0]

    def state(self) -> dict[str, Any]:
        """Return the state for JSON."""
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
        """Restore a clock from `state()`."""
        clock = cls(state["begin"], state["completed"])
        clock.steps_per_pass, clock._previous = state["steps_per_pass"], state["previous"]
        clock._counts = {int(sample): int(count) for sample, count in state["counts"]}
        clock.is_whole, clock._before, clock._told = state["whole"], set(state["before"]), state["told"]
        clock._window.extend((float(step), int(sample), bool(again)) for step, sample, again in state["window"])
        return clock


def _passes_of(*, visits: int, distinct: int) -> float:
    """Count the passes in so many visits of so many samples: one over shuffled data, else by number.

    Draws with replacement from K samples meet `K (1 - exp(-visits / K))` on average.
    """
    if distinct <= 1 or visits <= WHOLE * distinct:
        return float(distinct > 0)
    low, high = 0.0, visits / distinct * 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if -math.expm1(-middle) / middle > distinct / visits else (low, middle)
    return low


def passes_of(steps: Any, passes: Any, epochs: Any) -> Vector:
    """Return passes over the data at each reading of a run, from samples, else from the user's epoch.

    The length of a pass is known once the first is over. Earlier readings lie on the line from step 0 to there.

    Args:
        steps: [readings].
        passes: Recorded passes, NaN if unknown, [readings].
        epochs: Recorded epochs, [readings].
    """
    steps, passes, epochs = (np.asarray(each, dtype=np.float64) for each in (steps, passes, epochs))
    known = np.flatnonzero(np.isfinite(passes))
    found: Vector = np.where(np.isfinite(passes), passes, epochs)
    if known.size and steps[known[0]] > 0:
        early = (np.arange(steps.size) < known[0]) & ~np.isfinite(epochs)
        found[early] = steps[early] / steps[known[0]] * passes[known[0]]
    return found


JUMP, LEAST_JUMP = 3.0, 0.5
"""An advance by more than so many times the usual one and so many passes is a jump."""
STARTS_ANEW = 0.5
"""A step back by at least this share, from at most 1, marks a fraction that restarts with each pass."""


class GivenEpochs:
    """Converts the user's epoch at a step into passes over the data so far, which never go back.

    A fraction such as 3.25 counts as it is. A whole number that is constant during a pass gains a fraction by the
    length of the pass before. One that counts from 1 begins at 0. A fraction from 0 to 1 that restarts counts one pass
    more each time. After a step back or a jump, such as a resumed training with another batch size, counting continues
    at the usual pace, and `oddity` says so.

    Attributes:
        oddity: A sentence on what is wrong with the numbers, None where nothing is.
    """

    def __init__(self) -> None:
        self.oddity: str | None = None
        self._last: tuple[float, float] | None = None  # step, epoch as given
        self._passes = 0.0
        self._pace: float | None = None  # passes a step
        self._stands: tuple[float, float] | None = None  # first step of the current whole number, and the number
        self._whole = True  # True while all numbers are whole
        self._restarts = False
        self._offset = 0.0
        self._jumped: float | None = None  # the pace of a jump, until the next number tells whether it stays

    def passes(self, step: float, epoch: float | None) -> float | None:
        """Return passes over the data up to a step with the user's `epoch`, or None without one."""
        if epoch is None or not math.isfinite(epoch):
            return None
        epoch = float(epoch)
        self._whole = self._whole and epoch == math.floor(epoch)
        if self._last is None:
            # A count from 1 means 0 passes at the first step.
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
            self._offset += epoch - stood  # counting continues from here
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
            if jumped is None or not pace < 2 * jumped < 4 * pace:  # otherwise the new pace stays
                self._odd(step, epoch)
                self._jumped, advance = pace, usual
        if steps > 0 and advance > 0:
            self._pace = advance / steps
        self._passes += advance

    def resume(self, passes: float) -> None:
        """Go back to where so many passes were over, and keep the known meaning of the numbers."""
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
        """The length of a pass by the user's epoch, or None where it is unknown."""
        return None if self._pace is None or self._pace <= 0 else 1 / self._pace

    def state(self) -> dict[str, Any]:
        """Return the state for JSON."""
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
        """Restore from `state()`."""
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
