"""Shared by all other packages: optional imports, and HTML for notebooks."""
