"""The version, which every room may name without importing the package."""

__version__ = "0.1.0"
