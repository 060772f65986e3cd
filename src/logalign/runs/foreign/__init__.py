"""Readers of other tools' logs: each file parses one format, and `rows` turns its output into readings."""
