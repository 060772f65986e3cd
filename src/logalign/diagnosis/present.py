"""Present: checks that the last readings say something, for a verdict describes the present.

Method: the last three readings count. Where none has a LAR, or a loss that there was before, the training has
diverged, whatever stood until then. Where no forward ran, nothing is known, and the verdict says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from logalign.diagnosis.judge import Judgment
from logalign.runs.reading import Reading, never_tried

READINGS = 3

Trouble = Literal["none", "silent", "no LAR", "no loss"]


class Present:
    """Follows all readings, also those without a LAR."""

    def __init__(self) -> None:
        self._last: list[tuple[int, Trouble, str]] = []  # step, trouble, its cause in words
        self._since: int | None = None  # the step from which something has been wrong
        self._measured = False  # True once there was a LAR
        self._losses = 0  # readings with a loss in a row, at most `READINGS`

    def take(self, reading: Reading) -> None:
        """Take one reading. A row of a log without a measurement has no effect."""
        if reading.lar is None and reading.reason is None and not reading.nonfinite:
            return
        if never_tried(reading) and reading.loss is None and reading.extra.get("val_loss") is not None:
            return
        trouble, words = self._look(reading)
        if trouble == "none":
            self._since = None
        elif self._since is None:
            self._since = reading.step
        self._last = [*self._last, (reading.step, trouble, words)][-READINGS:]

    def _look(self, reading: Reading) -> tuple[Trouble, str]:
        has_loss = reading.loss is not None or reading.loss_mean is not None
        if reading.lar is None and not never_tried(reading):
            words = reason_of(reading)
            if reading.tokens == 0:
                return "silent", words
            return ("no LAR", words) if self._measured else ("none", words)
        self._measured = self._measured or reading.lar is not None
        if has_loss:
            self._losses = min(self._losses + 1, READINGS)
            return "none", ""
        if self._losses < READINGS:
            self._losses = 0
            return "none", ""
        return "no loss", "it is not a finite number"

    def rewind(self, step: int) -> None:
        """Forget this step and all later ones."""
        self._last = [each for each in self._last if each[0] < step]
        if self._since is not None and self._since >= step:
            self._since = None

    @property
    def judgment(self) -> Judgment | None:
        """The judgment of the last three readings, or None where nothing is wrong."""
        troubles = {trouble for _, trouble, _ in self._last}
        if len(self._last) < READINGS or "none" in troubles or self._since is None:
            return None
        words = self._last[-1][2]
        if troubles == {"silent"}:
            return Judgment(
                outcome="undecidable",
                reason=f"nothing has been measured since step {self._since:,}: {words}.",
                suggestion="Train in model.train() and with gradients, and watch the very object that is trained.",
            )
        what = "the loss has" if troubles == {"no loss"} else "LAR has"
        return Judgment(
            outcome="diverged",
            reason=f"{what} been undefined since step {self._since:,}: {words}.",
            suggestion="Stop, go back to a checkpoint from before it, and train with a lower learning rate or with "
            "clipped gradients.",
        )

    def state(self) -> dict[str, Any]:
        """Return the state as strict JSON."""
        return {
            "last": [list(each) for each in self._last],
            "since": self._since,
            "measured": self._measured,
            "losses": self._losses,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Present:
        """Restore from `state()`."""
        present = cls()
        present._last = [(step, trouble, words) for step, trouble, words in state["last"]]
        present._since, present._measured, present._losses = state["since"], state["measured"], state["losses"]
        return present


def reason_of(reading: Reading) -> str:
    """Say why a reading has no LAR."""
    if reading.reason is not None:
        return reading.reason
    return f"{reading.nonfinite} rows of weight, inputs or outputs hold a NaN or an infinity"
