"""Integrations: one small file per framework translates the framework's events into calls of the monitor."""
