"""Read remote runs: copy the files that are needed into a temporary folder, and read them there.

Method: fsspec reads each file once, from any location that it knows (s3://, gs://, az://, https://, ssh://,
memory://, ...). The alternative, universal-pathlib's paths, sends each small read of each format over the network.
SQLite, safetensors and TensorBoard also read only local files. A copy is a snapshot of a run that grows.

fsspec takes credentials and endpoints from the environment or its configuration files. Remote files are never written.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from logalign.common.extras import load
from logalign.errors import LogAlignError, MissingExtraError, RunError

NOTHING_THERE = "expected a run folder, a JSONL or a CSV file, found nothing there"
DEPTH = 6
"""The depth of the search below a location, which is the depth of an MLflow store."""
LONGEST = 300
"""The number of characters shown of another package's error."""
GLOB = re.compile(r"[*?\[]")
SECRET = re.compile(r"([?&][^=&#]*(?:signature|credential|token|secret|password|key|sig)[^=&#]*=)[^&#]*", re.IGNORECASE)
USER = re.compile(r"(?<=://)[^/@]*@")
COLLAPSED = re.compile(r"[a-z][a-z0-9+.-]+:/[^/]")


class Fetched(NamedTuple):
    """A copied run.

    Attributes:
        path: The local run folder, file or log.
        folder: The temporary folder that holds it. None where the location is local.
    """

    path: Path
    folder: Path | None


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a URL of fsspec or a path of universal-pathlib."""
    return "://" in str(path)


def shown(url: str) -> str:
    """Return a URL without user, password and the values of signatures and tokens.

    Example:
        >>> shown("https://me:word@host/run.jsonl?X-Amz-Signature=12ab&part=2")
        'https://host/run.jsonl?X-Amz-Signature=...&part=2'
    """
    return SECRET.sub(r"\1...", USER.sub("", url))


def hint_of(path: Path) -> str:
    """Return a hint for a missing path that was a URL, because a `Path` makes one slash of two."""
    return (
        "; a URL has two slashes, of which a Path drops one: give it as text"
        if COLLAPSED.match(path.as_posix())
        else ""
    )


def fetch(url: str, *, run_files: Sequence[str], is_log_file: Callable[[str], bool]) -> Fetched:
    """Copy a run folder's files, one file, or the files of another tool's log into a temporary folder.

    Args:
        url: The location.
        run_files: The files of a run folder, copied in this order. The first one identifies a run folder.
        is_log_file: Selects the files to copy from another folder, by their path in it.

    Raises:
        MissingExtraError: fsspec, or the package for this kind of location, is not installed.
        RunError: the location is empty, denies access or cannot be reached.
    """
    with _told(url):
        files, root = _open(url)
        if "file" in _protocols(files):
            return Fetched(Path(root), None)
        wanted = _wanted(files, root, run_files, is_log_file)
        folder = Path(tempfile.mkdtemp(prefix="logalign-"))
        try:
            path = folder.joinpath(*(_name(part) for part in _last_parts(root)))
            path.mkdir(parents=True)
            if wanted is None:
                path.rmdir()
                file, run_id = _split(files, root)
                files.get_file(file, str(path))
                return Fetched(path.with_name(f"{path.name}#{run_id}") if run_id else path, folder)
            for name in wanted:
                target = path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                files.get_file(f"{root}/{name}", str(target))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return Fetched(path, folder)


def fetch_folder(url: str, target: Path) -> None:
    """Create a folder, and copy the files directly below a location into it, if any.

    Raises:
        MissingExtraError, RunError: as in `fetch`.
    """
    with _told(url):
        files, root = _open(url)
        target.mkdir(exist_ok=True)
        for name in _below(files, root, depth=1):
            files.get_file(f"{root}/{name}", str(target / name))


def find_runs(url: str, known_by: str) -> list[str]:
    """Return the URLs that match a pattern, or those of the run folders at or below a location.

    Args:
        url: The location, or a pattern if it has `*`, `?` or `[...]`.
        known_by: The file that identifies a run folder.

    Raises:
        MissingExtraError, RunError: as in `fetch`.
    """
    with _told(url):
        files, root = _open(url)
        if GLOB.search(root) and not files.exists(root):
            return sorted(files.unstrip_protocol(path) for path in files.glob(root))
        names = [name for name in _below(files, root, depth=DEPTH) if PurePosixPath(name).name == known_by]
        return sorted(f"{url.rstrip('/')}/{name.removesuffix(known_by)}".rstrip("/") for name in names)


def _open(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it."""
    core = load("fsspec.core", extra="remote", purpose=f"{shown(url)}: reading runs from elsewhere")
    files, root = core.url_to_fs(url)
    files.invalidate_cache()  # a run grows
    return files, root.rstrip("/")


def _wanted(files: Any, root: str, run_files: Sequence[str], is_log_file: Callable[[str], bool]) -> list[str] | None:
    """Return the files to copy from a folder, by their path in it, or None for a file."""
    # Text after a question mark is no part of a folder's name, and a web server may ignore it.
    if "?" not in root and files.exists(f"{root}/{run_files[0]}"):
        return [name for name in run_files if files.exists(f"{root}/{name}")]
    file, _ = _split(files, root)
    if files.info(file)["type"] == "file":
        return None
    return [name for name in _below(files, root, depth=DEPTH) if is_log_file(name)]


def _split(files: Any, root: str) -> tuple[str, str]:
    """Return the file and the id of `mlflow.db#RUN_ID`."""
    file, mark, run_id = root.rpartition("#")
    return (file, _name(run_id)) if mark and "/" not in run_id and not files.exists(root) else (root, "")


def _below(files: Any, root: str, *, depth: int) -> list[str]:
    """Return the paths of the files below a folder, relative to it.

    Raises:
        RunError: a name leads out of the target folder.
    """
    if not files.isdir(root):
        return []
    top = f"{files._strip_protocol(root).rstrip('/')}/"
    found = [path.removeprefix(top) for path in files.find(root, maxdepth=depth)]
    for name in found:
        if name.startswith("/") or "\\" in name or {"", ".", ".."} & set(name.split("/")):
            raise RunError(f"{shown(root)}: expected names of files below it, found {name!r}")
    return sorted(found)


def _last_parts(root: str) -> list[str]:
    """Return the last two names of a location, so that short names distinguish runs."""
    return [part for part in PurePosixPath(re.sub(r"[?#].*", "", root)).parts if _name(part)][-2:] or ["run"]


def _name(part: str) -> str:
    """Return a name that any file system accepts and that stays in its folder."""
    return re.sub(r"[^\w.=+,@ -]", "_", part.strip("/")).strip(". ")


def _protocols(files: Any) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Turn any error into one line, because each kind of location raises its own errors."""
    try:
        yield
    except LogAlignError:
        raise
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or getattr(error, "name", None)
        install = f'pip install "logalign[remote]" {package}' if package else 'pip install "logalign[remote]"'
        raise MissingExtraError(f"{shown(url)}: {error}: {install}") from error
    except Exception as error:
        why = _reason(error)
        if why is None:
            raise RunError(f"{shown(url)}: {NOTHING_THERE}") from error
        raise RunError(
            f"{shown(url)}: expected what can be read, found: {shown(why)} (credentials and endpoints come from the "
            "environment or fsspec's configuration)"
        ) from error


def _reason(error: BaseException) -> str | None:
    """Return the innermost cause in one line, or None where the location is just empty."""
    causes = [error]
    while (inner := causes[-1].__cause__ or causes[-1].__context__) is not None and inner not in causes:
        causes.append(inner)
    told = [cause for cause in causes if not isinstance(cause, FileNotFoundError)]
    if not told:
        return None
    text = "".join(letter for letter in " ".join(str(told[-1]).split()) if letter.isprintable())
    return f"{type(told[-1]).__name__}: {text[:LONGEST] + '...' if len(text) > LONGEST else text}".rstrip(": ")
