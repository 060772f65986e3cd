"""Runs: define readings, write, read, copy and export runs, and turn other tools' logs into runs."""
