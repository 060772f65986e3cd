"""A row holds values that another tool recorded together, before their names are interpreted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    """Values that were recorded together.

    Attributes:
        step: The tool's own count. A number `logalign/step` among the values takes precedence.
        time: Seconds since the epoch, if recorded.
        values: Numbers by recorded name.
        where: The place for errors: "line 3", "step 40".
    """

    step: Any
    time: float | None
    values: Mapping[str, Any]
    where: str
