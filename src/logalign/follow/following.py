"""Follow a run: fold its tail into a verdict, curves and the other facts that a screen shows.

Method: the detector reads the main layer's readings one by one, as in `logalign diagnose`, so that both agree at every
step. A reading costs the detector about 0.6 ms. A long run is therefore read in small pieces, and the screen is drawn
between them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from logalign.diagnosis.baseline import Baseline
from logalign.diagnosis.detector import AskedRegime, Detector
from logalign.diagnosis.drops import LossThresholds
from logalign.diagnosis.grokking import GrokThresholds
from logalign.diagnosis.overfit_rule import OverfitThresholds
from logalign.diagnosis.verdict import Verdict, no_verdict
from logalign.errors import InputError, RunError
from logalign.follow.history import CURVES, DrawnHistory, curves_of
from logalign.follow.tail import Grown, Tail
from logalign.runs.reading import Reading
from logalign.runs.run import main_layer

PIECE = 64 << 10
"""Bytes of a look: about a hundred readings, a tenth of a second."""
PATIENCE = 3
"""Consecutive looks that may find damage in a run that had readings, as a shared disk may show it for a moment."""
STALLED, STALLED_INTERVALS = 60.0, 5.0
"""A run counts as stalled after this many seconds and this many times the usual interval of readings."""
WARNINGS = 3
K_RATIO, SPREAD, MEMORIZED = "k_ratio", "spread", "memorized_share_low"
DECLINE = OverfitThresholds()
GROKKING = GrokThresholds()

State = Literal["waiting", "catching up", "running", "stalled", "closed"]


@dataclass(frozen=True)
class Signal:
    """A number behind verdicts, with its thresholds.

    Attributes:
        name: Name in the evidence of a verdict.
        words: Its meaning, for people.
        thresholds: (value, words for values beyond it).
    """

    name: str
    words: str
    thresholds: tuple[tuple[float, str], ...] = ()


SIGNALS = (
    Signal("revisited_share", "memorized share", ((DECLINE.memorized, "approaching"),)),
    Signal(
        "deviation",
        "LAR below the baseline",
        ((DECLINE.approaching, "approaching"), (DECLINE.overfitting, "overfitting")),
    ),
    Signal(K_RATIO, "k / k on its plateau", ((GROKKING.fall_of_k, "generalizing below"),)),
    Signal(
        SPREAD,
        "k / its lowest",
        ((DECLINE.spread, "approaching"), (DECLINE.spread_alarm, "overfitting")),
    ),
    Signal("strain", "strain of LAR", ((DECLINE.strain, "approaching"),)),
    Signal(MEMORIZED, "memorized share of the loss", ((LossThresholds().memorized, "approaching"),)),
)
"""The screen draws the first known one: the grokking logic's while it judges, k's spread for classifiers only."""
OF_DECLINE = frozenset(signal.name for signal in SIGNALS) - {K_RATIO, MEMORIZED}


class Follower:
    """Looks at a run again and again, and keeps what there is to show.

    One thread may look while another reads the results, under `lock`. The look waits for the disk outside the lock.

    Args:
        path: The run, which need not exist yet.
        baseline: See `Detector`.
        regime: See `Detector`.
        clock: Seconds since the epoch, as in the readings.
        timer: Seconds that never go back.

    Attributes:
        lock: Held while results are stored.
        verdict: The verdict after the last reading.
        history: The curves and signals of the main layer.
        site: The main layer, None before the first reading.
        sites: All layers seen.
        last: The last reading of the main layer.
        warnings: (step, message) of the last warnings in the run.
        waiting: Why nothing can be read, None where there is a run.
        trouble: The disk's last error, None where all is well.
        closed: True once the training has closed the run.
        behind: Bytes yet to be read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        baseline: Baseline | None = None,
        regime: AskedRegime = "auto",
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = Path(path)
        self.lock = Lock()
        self._baseline = baseline
        self._regime: AskedRegime = regime
        self._clock = clock
        self._timer = timer
        self._tail = Tail(path)
        self._faults = 0
        self.waiting: str | None = "looking for it"
        self.trouble: str | None = None
        self.behind = self._done = 0
        self._begin()

    def _begin(self, site: str | None = None) -> None:
        self._detector: Detector | None = Detector(baseline=self._baseline, regime=self._regime)
        self.verdict: Verdict = self._detector.verdict
        self.history = DrawnHistory((*CURVES, *(signal.name for signal in SIGNALS)))
        self.site = site
        self.sites: set[str] = set()
        self.last: Reading | None = None
        self.last_seen: float | None = None
        self.warnings: deque[tuple[int | None, str]] = deque(maxlen=WARNINGS)
        self.warned = 0
        self.closed = False
        self._was_caught_up = False

    @property
    def meta(self) -> Mapping[str, Any]:
        """The contents of run.json."""
        return self._tail.meta

    @property
    def progress(self) -> float:
        """The share of the log that has been read."""
        return 1.0 if not self.behind else self._done / (self._done + self.behind)

    @property
    def age(self) -> float | None:
        """Seconds since the last reading."""
        return None if self.last_seen is None else max(0.0, self._timer() - self.last_seen)

    @property
    def state(self) -> State:
        """The state of the run."""
        if self.waiting is not None:
            return "waiting"
        if self.behind:
            return "catching up"
        if self.last is None:
            return "closed" if self.closed else "waiting"
        if self.closed:
            return "closed"
        interval, age = self.history.pace()[0], self.age
        assert age is not None
        return "stalled" if age > max(STALLED, STALLED_INTERVALS * (interval or 0.0)) else "running"

    @property
    def signal(self) -> Signal | None:
        """The signal to draw."""
        known = [signal for signal in SIGNALS if self.history.last(signal.name) is not None]
        grokking = [signal for signal in known if signal.name == K_RATIO]
        if grokking and self.verdict.regime == "grokking":
            return grokking[0]
        last = self.last
        classifies = last is not None and last.m is not None and last.n is not None and last.m <= last.n
        others = [signal for signal in known if signal.name != K_RATIO and (classifies or signal.name != SPREAD)]
        return others[0] if others else None

    def look(self) -> list[tuple[Reading, Verdict]]:
        """Read a piece of what was added, and set `behind` to what remains.

        Returns:
            The new readings of the main layer, with the verdict after each.

        Raises:
            RunError: it is no run, or it is damaged.
        """
        try:
            found = self._tail.look(PIECE)
        except OSError as error:
            self.trouble = f"cannot be read ({error.strerror or error}), trying again"
            return []
        except RunError as error:
            self._faults += 1
            if self.last is None or self._faults >= PATIENCE:
                raise
            self.trouble = f"{error} (trying again)"
            return []
        self.trouble, self._faults = None, 0
        with self.lock:
            return self._take(found)

    def _take(self, found: Grown) -> list[tuple[Reading, Verdict]]:
        if found.restarted:
            self._begin(self.site)
        self.waiting, self.behind, self._done = found.waiting, found.behind, found.done
        for event in found.events:
            self._event(event)
        self.sites |= {reading.site for reading in found.readings}
        main = self._main()
        if main != self.site and self.last is not None:  # the layer that represents the run came after another
            self._tail = Tail(self.path)
            self._begin(main)
            self.behind = max(1, self.behind)
            return []
        self.site = main
        told = []
        for reading in found.readings:
            if reading.site == self.site:
                self._fold(reading)
                told.append((reading, self.verdict))
        if told:
            when, now = told[-1][0].time, self._timer()
            late = 0.0 if self._was_caught_up or when is None else max(0.0, self._clock() - when)
            self.last_seen = now - late
        self._was_caught_up = not self.behind and self.waiting is None
        return told

    def _main(self) -> str | None:
        """The layer that represents the run, as far as is known by now."""
        main, described = self.meta.get("main"), self.meta.get("sites")
        if isinstance(main, str) and (main in self.sites or (isinstance(described, dict) and main in described)):
            return main
        if not self.sites:
            return self.site
        return main_layer(self.sites, otherwise=self.site or min(self.sites))

    def _event(self, event: Mapping[str, Any]) -> None:
        kind, step, message = event.get("event"), event.get("step"), event.get("message")
        if kind == "warning" and isinstance(message, str):
            self.warnings.append((step if isinstance(step, int) else None, message))
            self.warned += 1
        elif kind == "close":
            self.closed = True
        elif kind in ("start", "resume"):
            self.closed = False

    def _fold(self, reading: Reading) -> None:
        self.last = reading
        values: dict[str, float | None] = curves_of(reading)
        if self._detector is not None:
            try:
                self.verdict = self._detector.update(reading)
                values |= {
                    name: value for name, value in self._detector.decline.verdict.evidence.items() if name in OF_DECLINE
                }
                values[K_RATIO] = self._detector.grokking.verdict.evidence.get(K_RATIO)
                if self._detector.without_lar is not None:
                    values[MEMORIZED] = self._detector.without_lar.verdict.evidence.get(MEMORIZED)
            except InputError as error:
                self._detector = None
                self.verdict = no_verdict(reading.step, error)
        self.history.add(reading.step, reading.time, values)
