"""Runs that lie elsewhere: what is needed of them is copied into a temporary folder and read there.

Method: fsspec, for any location that it knows (s3://, gs://, az://, https://, ssh://, memory://, ...), and one read a
file. The alternative, paths that read over the network as universal-pathlib has them, would send each small read of
each format there, and SQLite, safetensors and TensorBoard read files alone; a copy is a snapshot of a run that grows.

Credentials and endpoints are fsspec's: the environment, or its configuration files. Nothing is ever written there.
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
"""How many folders below a location are searched: an MLflow store is this deep."""
LONGEST = 300
"""Letters of another package's error that are told."""
GLOB = re.compile(r"[*?\[]")
SECRET = re.compile(r"([?&][^=&#]*(?:signature|credential|token|secret|password|key|sig)[^=&#]*=)[^&#]*", re.IGNORECASE)
USER = re.compile(r"(?<=://)[^/@]*@")
COLLAPSED = re.compile(r"[a-z][a-z0-9+.-]+:/[^/]")


class Fetched(NamedTuple):
    """What was copied.

    Attributes:
        path: The run folder, file or log on this machine.
        folder: The temporary folder that it lies in; None where the location is on this machine.
    """

    path: Path
    folder: Path | None


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL of fsspec; paths of universal-pathlib are, too."""
    return "://" in str(path)


def shown(url: str) -> str:
    """A URL as it may be shown: without user, password and the values of signatures and tokens.

    Example:
        >>> shown("https://me:word@host/run.jsonl?X-Amz-Signature=12ab&part=2")
        'https://host/run.jsonl?X-Amz-Signature=...&part=2'
    """
    return SECRET.sub(r"\1...", USER.sub("", url))


def hint_of(path: Path) -> str:
    """What to say of a path that is missing and was a URL once: a `Path` makes one slash of two."""
    return (
        "; a URL has two slashes, of which a Path drops one: give it as text"
        if COLLAPSED.match(path.as_posix())
        else ""
    )


def fetch(url: str, *, run_files: Sequence[str], is_log_file: Callable[[str], bool]) -> Fetched:
    """Copy a run folder's files, one file, or the files of another tool's log into a temporary folder.

    Args:
        url: Where it lies.
        run_files: What a run folder consists of, the file by which it is known first; copied in this order.
        is_log_file: Which files of another folder are copied, by their path in it.

    Raises:
        MissingExtraError: fsspec, or the package for this kind of location, is not installed.
        RunError: nothing there, no access, no connection.
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
    """Copy the files right below a location into a folder, which is made; none where there is nothing.

    Raises:
        MissingExtraError, RunError: as of `fetch`.
    """
    with _told(url):
        files, root = _open(url)
        target.mkdir(exist_ok=True)
        for name in _below(files, root, depth=1):
            files.get_file(f"{root}/{name}", str(target / name))


def find_runs(url: str, known_by: str) -> list[str]:
    """The URLs that a pattern stands for, or those of the run folders at or below a location.

    Args:
        url: Where to look; with `*`, `?` or `[...]` it is a pattern.
        known_by: The file by which a run folder is known.

    Raises:
        MissingExtraError, RunError: as of `fetch`.
    """
    with _told(url):
        files, root = _open(url)
        if GLOB.search(root) and not files.exists(root):
            return sorted(files.unstrip_protocol(path) for path in files.glob(root))
        names = [name for name in _below(files, root, depth=DEPTH) if PurePosixPath(name).name == known_by]
        return sorted(f"{url.rstrip('/')}/{name.removesuffix(known_by)}".rstrip("/") for name in names)


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    core = load("fsspec.core", extra="remote", purpose=f"{shown(url)}: reading runs from elsewhere")
    files, root = core.url_to_fs(url)
    files.invalidate_cache()  # a run grows
    return files, root.rstrip("/")


def _wanted(files: Any, root: str, run_files: Sequence[str], is_log_file: Callable[[str], bool]) -> list[str] | None:
    """The files to copy of a folder, by their path in it; None where the location is a file."""
    # What follows a question mark is no part of a folder's name, and a web server may pass over it.
    if "?" not in root and files.exists(f"{root}/{run_files[0]}"):
        return [name for name in run_files if files.exists(f"{root}/{name}")]
    file, _ = _split(files, root)
    if files.info(file)["type"] == "file":
        return None
    return [name for name in _below(files, root, depth=DEPTH) if is_log_file(name)]


def _split(files: Any, root: str) -> tuple[str, str]:
    """The file of `mlflow.db#RUN_ID`, and the id."""
    file, mark, run_id = root.rpartition("#")
    return (file, _name(run_id)) if mark and "/" not in run_id and not files.exists(root) else (root, "")


def _below(files: Any, root: str, *, depth: int) -> list[str]:
    """Paths of the files below a folder, relative to it.

    Raises:
        RunError: a name would leave the folder into which it is copied.
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
    """The last two names of a location, by which short names tell runs apart."""
    return [part for part in PurePosixPath(re.sub(r"[?#].*", "", root)).parts if _name(part)][-2:] or ["run"]


def _name(part: str) -> str:
    """A name that any file system takes, and that stays in its folder."""
    return re.sub(r"[^\w.=+,@ -]", "_", part.strip("/")).strip(". ")


def _protocols(files: Any) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Turn what goes wrong on the way into one line; each kind of location raises errors of its own."""
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
    """The innermost cause in one line; None where there just is nothing at that place."""
    causes = [error]
    while (inner := causes[-1].__cause__ or causes[-1].__context__) is not None and inner not in causes:
        causes.append(inner)
    told = [cause for cause in causes if not isinstance(cause, FileNotFoundError)]
    if not told:
        return None
    text = "".join(letter for letter in " ".join(str(told[-1]).split()) if letter.isprintable())
    return f"{type(told[-1]).__name__}: {text[:LONGEST] + '...' if len(text) > LONGEST else text}".rstrip(": ")
