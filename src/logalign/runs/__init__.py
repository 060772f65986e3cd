"""Runs: what a reading is, how a run is written, read, copied, exported, and how logs of other tools become runs."""
