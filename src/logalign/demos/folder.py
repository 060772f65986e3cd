"""The folder of a demo: `demo.json` holds the demo's name and settings, so runs never mix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from logalign.errors import InputError, RunError

NAME = "demo.json"
REPORT = "report.html"

Settings = Mapping[str, str | int | float]


def check(out: Path, *, demo: str, settings: Settings, fresh: bool = False) -> None:
    """Check that `out` can be the folder of this demo with these settings, without writing.

    Args:
        out: a folder that is new, empty, or holds the same demo with the same settings.
        demo: name of the demo.
        settings: the settings that decide the numbers of its runs.
        fresh: True if its runs will be removed, so that their settings do not matter.

    Raises:
        InputError: `out` holds something else, or the same demo with other settings.
        RunError: demo.json is damaged.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: expected a folder for the demo, found a file; choose another --out")
    if not (out / NAME).exists():
        if out.exists() and any(out.iterdir()):
            raise InputError(f"{out}: expected a new or empty folder, found other files in it; choose another --out")
        return
    found_demo, found = _read(out / NAME)
    if found_demo != demo:
        raise InputError(f"{out}: expected the demo {demo}, found the demo {found_demo}; choose another --out")
    if found != dict(settings) and not fresh:
        raise InputError(
            f"{out}: holds a run of this demo with other settings: {_difference(found, settings)}; "
            "begin anew with --fresh, or choose another --out"
        )


def claim(out: Path, *, demo: str, settings: Settings, runs: Sequence[str], fresh: bool = False) -> None:
    """Make `out` the folder of this demo with these settings, if `check` passes.

    Args:
        out, demo, settings: as for `check`.
        runs: names of the run folders in `out`.
        fresh: remove only what an earlier call of this demo wrote into `out`.

    Raises:
        InputError, RunError: as in `check`. RunError also if `out` cannot be written.
    """
    check(out, demo=demo, settings=settings, fresh=fresh)
    record = out / NAME
    try:
        if fresh and record.exists():
            for name in runs:
                if (out / name).exists():
                    shutil.rmtree(out / name)
            (out / REPORT).unlink(missing_ok=True)
            record.unlink()
        if not record.exists():
            out.mkdir(parents=True, exist_ok=True)
            draft = out / f".{NAME}"
            draft.write_text(json.dumps({"demo": demo, "settings": dict(settings)}, indent=2) + "\n")
            draft.replace(record)
    except OSError as error:
        raise RunError(f"{out}: expected a folder that can be written, found: {error}") from error


def _read(record: Path) -> tuple[str, dict[str, object]]:
    try:
        content = json.loads(record.read_text())
        return str(content["demo"]), dict(content["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{record}: expected the name and the settings of a demo, found damage ({error}); choose another --out"
        ) from error


def _difference(found: Mapping[str, object], asked: Settings) -> str:
    names = [name for name in {**found, **asked} if found.get(name) != asked.get(name)]
    return ", ".join(f"{name.replace('_', '-')} {found.get(name)} there and {asked.get(name)} here" for name in names)
