"""Integrations: one small file per framework, each a translation of its events into calls of the monitor."""
