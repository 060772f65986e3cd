"""Recording: the monitor of `watch()`, and the journal of its readings."""
