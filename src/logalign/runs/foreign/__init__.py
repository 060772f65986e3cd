"""Readers of what other tools recorded: each file parses one format, `rows` makes readings of what it gives."""
