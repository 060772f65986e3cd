"""The errors that logalign raises: each says what was expected, what was found and what to do."""


class LogAlignError(Exception):
    """Base of every error that logalign raises on purpose."""


class InputError(LogAlignError, ValueError):
    """An argument has the wrong shape, dtype or value."""


class SiteError(LogAlignError):
    """The layer to be measured was not found, or cannot be measured."""


class RunError(LogAlignError):
    """A run folder or log file is missing, damaged, occupied or not writable."""


class CheckpointError(LogAlignError):
    """A checkpoint is missing, damaged, of a kind that is not read, or holds nothing to measure."""


class MissingExtraError(LogAlignError, ImportError):
    """An optional package is not installed; the message holds the command that installs it."""


class LogAlignWarning(UserWarning):
    """Something was not measured, or not as asked; training goes on."""
