"""Import optional packages where they are used, or name the command that installs them."""

from __future__ import annotations

import re
from importlib import import_module, metadata
from types import ModuleType

from logalign.errors import MissingExtraError


def load(module: str, *, extra: str, purpose: str, supported: str = "", package: str = "") -> ModuleType:
    """Import an optional package's module.

    Args:
        module: The module's dotted name.
        extra: The extra of logalign that installs it.
        purpose: The user of the module, as a sentence's subject: "LogAlignCallback".
        supported: Releases that work, from one on and below another: "5.0,6.0". Empty allows any.
        package: The package's name on the index, if it is not the module's first name.

    Returns:
        The module.

    Raises:
        MissingExtraError: the package is missing, cannot be imported, or has an unsupported release.

    Example:
        >>> load("json", extra="report", purpose="a report").__name__
        'json'
        >>> load("no_such_package", extra="report", purpose="a report")
        Traceback (most recent call last):
        ...
        logalign.errors.MissingExtraError: a report needs no_such_package: pip install "logalign[report]"
    """
    package = package or module.split(".")[0]
    install = f'pip install "logalign[{extra}]"'
    try:
        loaded = import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name if error.name is not None and module.startswith(error.name) else None
        found = "" if missing else f", which cannot be imported here ({error})"
        raise MissingExtraError(f"{purpose} needs {package}{found}: {install}") from error
    if supported:
        at_least, below = supported.split(",")
        found = metadata.version(package)
        if not _release(at_least) <= _release(found) < _release(below):
            raise MissingExtraError(
                f"{purpose} needs {package} from {at_least} on and below {below}, found {found}: {install}"
            )
    return loaded


def _release(version: str) -> tuple[int, ...]:
    """Return a version's leading numbers without trailing zeros: (5, 1) for "5.1.0rc1"."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    assert numbers is not None, version
    release = [int(number) for number in numbers.group().split(".")]
    while release and release[-1] == 0:
        release.pop()
    return tuple(release)
