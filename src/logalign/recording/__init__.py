"""Recording: what `watch()` returns, and what becomes of its readings."""
