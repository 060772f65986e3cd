"""The errors that logalign raises: each one states the expected, the found and what to do."""


class LogAlignError(Exception):
    """Base of every error that logalign raises on purpose."""


class InputError(LogAlignError, ValueError):
    """An argument has the wrong shape, dtype or value."""


class SiteError(LogAlignError):
    """The layer to measure is missing, or cannot be measured."""


class RunError(LogAlignError):
    """A run folder or log file is missing, damaged, occupied or not writable."""


class CheckpointError(LogAlignError):
    """A checkpoint is missing, damaged, of an unsupported kind, or holds nothing to measure."""


class MissingExtraError(LogAlignError, ImportError):
    """An optional package is not installed, and the message gives the command to install it."""


class LogAlignWarning(UserWarning):
    """A value was not measured, or not as asked, but training continues."""
