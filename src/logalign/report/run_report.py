"""The report of recorded runs, as `logalign report` writes it: what was measured, its curves, how to read them."""

import os
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from logalign.errors import InputError
from logalign.readings import UNEMBEDDING, Reading
from logalign.report import figures
from logalign.report.names import short_names
from logalign.report.page import Section, write_page
from logalign.runlog import Run, open_run

HOW_TO_READ = """\
LAR compares the size of a layer's outputs with the largest size that its weights and its inputs would allow. With n the
layer's number of inputs, k = n^(2 (1 - LAR)) is the effective dimension: about how many directions weights and inputs
use together. Independent random weights and inputs give a LAR near 1/2 and a k near n; one shared direction gives
LAR = 1 and k = 1.

- While a network memorizes a small task LAR stays near its initial value; as it turns to a general solution LAR climbs
and k falls to the number of directions that the solution uses (grokking).
- In a language model LAR peaks early and then falls, in healthy training too. The signal is a faster fall than that of
a run on fresh data, not the fall itself.
- With wrong labels LAR falls as the network fits them, while the training loss goes to zero just as it does with right
ones.

The centered forms leave out what the softmax cannot see (a vector common to all rows of the weight) and what all inputs
have in common. Where plain and centered LAR part, a common direction has grown: often an optimizer slingshot, which
throws all inputs one way and says nothing about generalization."""

LIMITS = """\
- This page shows measurements and gives no verdict.
- Published evidence is grokking and the pre-training of 3B-parameter language models. For fine-tuning, LoRA, mixtures
of experts and vision no threshold is proven.
- Optimizer slingshots and learning-rate cooldowns move LAR without any change in generalization.
- Within one run everything that grows with time follows the generalization gap. Compare runs at equal steps.
- A held-out loss, where one was recorded, is drawn so that you can check; LAR does not use it."""


def write_run_report(runs: Sequence[str | os.PathLike[str] | Run], out: str | os.PathLike[str]) -> Path:
    """Write one HTML page for one run, or for several laid over each other, and return its path.

    Args:
        runs: run folders, JSONL or CSV files, or opened runs. At most as many as can be told apart by color.
        out: the HTML file.

    Raises:
        InputError: no run, too many runs, or a page that cannot be written.
        RunError: a run is missing or damaged, or holds no reading.
    """
    most = len(figures.RUN_COLORS)
    if not 1 <= len(runs) <= most:
        raise InputError(f"expected 1 to {most} runs, which can be told apart by color; got {len(runs)}")
    opened = [run if isinstance(run, Run) else open_run(run) for run in runs]
    for run in opened:
        if not run.readings:
            raise InputError(f"{run.path}: expected at least one reading to draw, found none yet")
    names = short_names([run.path for run in opened])
    title = names[0] if len(opened) == 1 else f"{len(opened)} runs"
    lead = "\n\n".join(_in_words(run, name if len(opened) > 1 else "") for run, name in zip(opened, names, strict=True))
    sections = [*_curves(opened, names), *_sites(opened)]
    if len(opened) > 1:
        table = [_row(run, name) for run, name in zip(opened, names, strict=True)]
        sections.append(Section("Runs", "What was measured in each run.", table=table))
    sections += [Section("How to read this", HOW_TO_READ), Section("Limits", LIMITS)]
    facts = _facts(opened[0]) if len(opened) == 1 else {}
    return write_page(out, title=f"Log-alignment ratio: {title}", lead=lead, sections=sections, facts=facts)


def _site_names(run: Run) -> list[str]:
    """The sites of a run, the one that the report is about first."""
    sites = list(dict.fromkeys(reading.site for reading in run.readings))
    main = run.meta.get("main", UNEMBEDDING)
    return sorted(sites, key=lambda site: site != main)


def _main(run: Run) -> list[Reading]:
    site = _site_names(run)[0]
    return [reading for reading in run.readings if reading.site == site]


def _in_words(run: Run, name: str) -> str:
    """What LAR did, in two sentences of numbers."""
    about = f"{name}: " if name else ""
    defined = [reading for reading in _main(run) if reading.lar is not None]
    if not defined:
        return f"{about}none of the {len(_main(run))} readings is defined; the facts below say why."
    lars = np.array([reading.lar for reading in defined], dtype=float)
    first, last = defined[0], defined[-1]
    text = f"{about}LAR was {lars[0]:.3f} at step {first.step:,} and {lars[-1]:.3f} at step {last.step:,}"
    high, low = int(lars.argmax()), int(lars.argmin())
    inside = [
        f"{words} {lars[i]:.3f} at step {defined[i].step:,}"
        for words, i in (("highest", high), ("lowest", low))
        if i not in (0, len(lars) - 1)
    ]
    text += f" ({', '.join(inside)})." if inside else "."
    if last.effective_dim is not None and last.n is not None:
        text += f" At its last reading the effective dimension k is {last.effective_dim:.1f}, of n = {last.n:,} inputs."
    return text


def _curves(runs: Sequence[Run], names: Sequence[str]) -> list[Section]:
    columns = [run.columns(_site_names(run)[0]) for run in runs]
    several = len(runs) > 1
    sections = [
        Section(
            "Log-alignment ratio",
            "Plain above, centered below." if several else "Plain and centered.",
            figures.lar_figure(*columns, labels=names),
        ),
        Section(
            "Effective dimension",
            "k = n^(2 (1 - LAR)), on a logarithmic axis; a falling LAR is a rising k.",
            figures.effective_dim_figure(*columns, labels=names),
        ),
    ]
    loss = figures.loss_figure(*columns, labels=names)
    if loss is not None:
        sections.append(Section("Loss", "As it was passed to the monitor.", loss))
    drivers = figures.drivers_figure(*columns, labels=names)
    if drivers is not None:
        text = "k = sqrt(weight participation × input participation) / coherence, from the spectral readings."
        sections.append(Section("What moves k", text, drivers))
    return sections


def _sites(runs: Sequence[Run]) -> list[Section]:
    """The other layers, for one run that watched several."""
    if len(runs) > 1 or len(_site_names(runs[0])) == 1:
        return []
    run = runs[0]
    columns = {site: run.columns(site) for site in _site_names(run)}
    table: list[dict[str, object]] = []
    for site in columns:
        last = [reading for reading in run.readings if reading.site == site][-1]
        found = _meta_of(run, site)
        shape = _shape(last)
        table.append(
            {
                "site": site,
                "module": found.get("module") or None,
                "m × n": shape,
                "last step": last.step,
                "LAR": last.lar,
                "k": last.effective_dim,
            }
        )
    text = "Layers without a softmax behind them have a plain and a token-centered LAR only."
    return [Section("Layers", text, figures.sites_figure(columns), table)]


def _meta_of(run: Run, site: str) -> dict[str, Any]:
    sites = run.meta.get("sites")
    found = sites.get(site) if isinstance(sites, dict) else None
    return found if isinstance(found, dict) else {}


def _shape(reading: Reading) -> str | None:
    # No-break spaces: a shape stays on one line.
    return None if reading.m is None or reading.n is None else f"{reading.m:,}\u00a0×\u00a0{reading.n:,}"


def _row(run: Run, name: str) -> dict[str, object]:
    readings = _main(run)
    last = readings[-1]
    return {
        "run": name,
        "layer": _meta_of(run, last.site).get("module") or last.site,
        "m × n": _shape(last),
        "readings": len(readings),
        "undefined": sum(reading.lar is None for reading in readings),
        "last step": last.step,
        "LAR": last.lar,
        "centered": last.lar_centered,
        "k": last.effective_dim,
    }


def _facts(run: Run) -> dict[str, str]:
    """What a reader needs in order to trust the curves, with "not recorded" where the run does not say."""
    readings = _main(run)
    last = readings[-1]
    found = _meta_of(run, last.site)
    facts = {"Run": str(run.path), "Site": last.site}
    if found.get("module") is not None:
        kind = f"{found['kind']}, " if found.get("kind") else ""
        facts["Layer"] = f"{found['module'] or 'the model itself'} ({kind}{_shape(last)} outputs × inputs)"
    elif _shape(last):
        facts["Shape"] = f"{_shape(last)} outputs × inputs"
    if found.get("how"):
        facts["How it was found"] = str(found["how"])
    if "tied_to" in found:
        facts["Weight tied to"] = ", ".join(map(str, found["tied_to"])) or "nothing"
    if found.get("bias"):
        facts["Bias"] = "there is one; it is taken out before measuring"
    if found.get("mask") is not None:
        facts["Loss mask"] = str(found["mask"])
    every = run.meta.get("every")
    facts["Readings"] = f"{len(readings):,}, steps {readings[0].step:,} to {last.step:,}"
    facts["Readings"] += f", one every {every:,} steps" if isinstance(every, int) else ""
    undefined = Counter(reading.reason or "no reason recorded" for reading in readings if reading.lar is None)
    facts["Undefined readings"] = "; ".join(f"{count:,}: {reason}" for reason, count in undefined.items()) or "none"
    nonfinite = [reading.nonfinite for reading in readings if reading.nonfinite is not None]
    facts["Non-finite rows"] = f"{sum(nonfinite):,}" if nonfinite else "not recorded"
    kept = [reading.kept for reading in readings if reading.kept is not None]
    facts["Share of tokens kept by the mask"] = (
        f"{np.median(kept):.1%} in the median, {min(kept):.1%} at the lowest" if kept else "no mask recorded"
    )
    if last.tokens_seen is not None:
        facts["Tokens seen"] = f"{last.tokens_seen:,}"
    resumes = [event.get("step") for event in run.events if event.get("event") == "resume"]
    facts["Resumed"] = f"at step {', '.join(map(str, resumes))}" if resumes else "never"
    warned = [str(event.get("message")) for event in run.events if event.get("event") == "warning"]
    facts["Warnings"] = "; ".join(warned) or "none"
    settings = run.meta.get("settings")
    if isinstance(settings, dict) and settings:
        facts["Settings"] = ", ".join(f"{name} = {value}" for name, value in settings.items())
    created = run.meta.get("created")
    if isinstance(created, int | float):
        facts["Started"] = datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%d %H:%M UTC")
    if run.meta.get("logalign_version"):
        facts["Recorded by"] = f"logalign {run.meta['logalign_version']}"
    return facts
