"""A row: what another tool recorded together, before anyone knows what its names mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    """What was recorded together.

    Attributes:
        step: By the tool's own count; a number `logalign/step` among the values comes before it.
        time: Seconds since the epoch, if recorded.
        values: Numbers by name, as they were recorded.
        where: For errors: "line 3", "step 40".
    """

    step: Any
    time: float | None
    values: Mapping[str, Any]
    where: str
