"""Present: whether the last readings still say anything, for a verdict has to speak of now.

Method: the last three readings. Where none of them has a LAR, or a loss that there was before, the training has
diverged, whatever stood until then; where no forward was seen, nothing is known, and that is the verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from logalign.diagnosis.judge import Judgment
from logalign.runs.reading import Reading, never_tried

READINGS = 3

Trouble = Literal["none", "silent", "no LAR", "no loss"]


class Present:
    """Looks at readings as they come, also at those without a LAR."""

    def __init__(self) -> None:
        self._last: list[tuple[int, Trouble, str]] = []  # step, what is wrong, in words
        self._since: int | None = None  # the step from which something has been wrong
        self._measured = False  # whether there has been a LAR
        self._losses = 0  # readings with a loss in a row, as many as that takes

    def take(self, reading: Reading) -> None:
        """Take one reading in; a row of a log that holds no measurement says nothing."""
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
        """Forget what was at this step and beyond."""
        self._last = [each for each in self._last if each[0] < step]
        if self._since is not None and self._since >= step:
            self._since = None

    @property
    def judgment(self) -> Judgment | None:
        """What there is to say of the last three readings; None where they are as they should be."""
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
        """All of it, as strict JSON can hold it."""
        return {
            "last": [list(each) for each in self._last],
            "since": self._since,
            "measured": self._measured,
            "losses": self._losses,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Present:
        """What `state()` described."""
        present = cls()
        present._last = [(step, trouble, words) for step, trouble, words in state["last"]]
        present._since, present._measured, present._losses = state["since"], state["measured"], state["losses"]
        return present


def reason_of(reading: Reading) -> str:
    """Why a reading has no LAR, in words."""
    if reading.reason is not None:
        return reading.reason
    return f"{reading.nonfinite} rows of weight, inputs or outputs hold a NaN or an infinity"
