"""Calls: a layer that runs several times in one forward of the model, for chunks of one prediction or for several.

A loss in chunks calls the head again on other tokens, so all calls count. Multi-token prediction calls it again on the
same tokens, so only the main call counts. Only the user knows which call that is: it is first in some models and last
in others. The labels distinguish the two cases: all chunks together have as many tokens as there are labels.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from logalign.errors import InputError


class Calls:
    """The calls of layers in the current forward.

    Args:
        main: The call of a layer that counts, from 0, or None for all.

    Attributes:
        repeated: Number of calls of a layer in one forward that repeated tokens, or 0 if none did.

    Raises:
        InputError: If `main` is not an integer from 0.
    """

    def __init__(self, main: int | None = None) -> None:
        given: Any = main
        if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 0):
            raise InputError(f"main_call: expected None or a whole number from 0 on, found {given!r}")
        self.main = main
        self.repeated = 0
        self._seen: dict[Hashable, tuple[int, int]] | None = None  # calls and tokens so far, None outside a forward

    def begin(self) -> None:
        """Begin a forward of the model."""
        self._seen = {}

    def over(self) -> None:
        """End the forward. Later calls of a head are assumed to be on chunks."""
        self._seen = None

    def counts(self, layer: Hashable, tokens: int, *, labels: int | None) -> bool:
        """Whether a call of a layer counts.

        Args:
            layer: The layer.
            tokens: Number of tokens.
            labels: Number of labels in the forward, or None if unknown.
        """
        if self._seen is None:
            return True
        calls, so_far = self._seen.get(layer, (0, 0))
        self._seen[layer] = calls + 1, so_far + tokens
        if labels is not None and calls and so_far + tokens > labels:
            self.repeated = max(self.repeated, calls + 1)
        return self.main is None or calls == self.main
