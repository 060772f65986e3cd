"""Calls: a layer that runs several times in one forward of the model, for chunks of one prediction or for several.

A head is called again on other tokens where a loss goes over them in chunks: all calls count. It is called again on the
same tokens where further ones are predicted, too (multi-token prediction): only the main call counts, and which that is
only the user knows, for some models have it first, others last. The two are told apart by the labels: chunks have as
many tokens as there are labels, all together.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from logalign.errors import InputError


class Calls:
    """The calls of layers in the forward under way.

    Args:
        main: Which call of a layer counts, from 0 on; None for all of them.

    Attributes:
        repeated: How many calls of a layer in one forward were seen to be on tokens that it had had; 0 for none.

    Raises:
        InputError: `main` is no whole number from 0 on.
    """

    def __init__(self, main: int | None = None) -> None:
        given: Any = main
        if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 0):
            raise InputError(f"main_call: expected None or a whole number from 0 on, found {given!r}")
        self.main = main
        self.repeated = 0
        self._seen: dict[Hashable, tuple[int, int]] | None = None  # calls and tokens so far; None outside of a forward

    def begin(self) -> None:
        """A forward of the model begins."""
        self._seen = {}

    def over(self) -> None:
        """It is over; a head that is called after it is called on chunks, as far as can be told."""
        self._seen = None

    def counts(self, layer: Hashable, tokens: int, *, labels: int | None) -> bool:
        """Whether a call of a layer counts.

        Args:
            layer: Which.
            tokens: On how many it is called.
            labels: How many labels the forward has for them; None where that is not known.
        """
        if self._seen is None:
            return True
        calls, so_far = self._seen.get(layer, (0, 0))
        self._seen[layer] = calls + 1, so_far + tokens
        if labels is not None and calls and so_far + tokens > labels:
            self.repeated = max(self.repeated, calls + 1)
        return self.main is None or calls == self.main
