"""Write the report of recorded runs for `logalign report`: the verdict, its curves, how to read them, the facts.

This module assembles parts and facts, `panels` describes the charts, and `interactive` writes the page.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from logalign.diagnosis.baseline import Baseline
from logalign.diagnosis.loss_only import AFTERWARDS
from logalign.errors import InputError
from logalign.report import panels
from logalign.report.drift_panels import drift_cell, drift_facts, drift_panels, drift_text
from logalign.report.drifts import UNIT
from logalign.report.figures import RUN_COLORS
from logalign.report.interactive import Card, Part, write_figures, write_interactive
from logalign.report.names import short_names
from logalign.report.panels import Tables
from logalign.report.shown import FEWEST_ROWS, ROWS, ShownRun, shown_run
from logalign.report.spectra_shown import ShownSpectra, shown_spectra
from logalign.runs.columns import Columns
from logalign.runs.run import Run, RunLike, open_run

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
- Published evidence is grokking and the pre-training of 3B-parameter language models. For fine-tuning, LoRA, mixtures
of experts and vision no threshold is proven.
- Optimizer slingshots and learning-rate cooldowns move LAR without any change in generalization.
- Within one run everything that grows with time follows the generalization gap. Compare runs at equal steps.
- A held-out loss, where one was recorded, is drawn so that you can check; neither LAR nor the verdict uses it."""

SIGNALS_TEXT = """\
What the verdict rests on, reading by reading, beside the thresholds (dashed). Where a signal is not drawn, the run
gives no such number: a deviation needs a baseline, a memorized share needs passes over the data, and so on.
"""


def write_run_report(
    runs: Sequence[RunLike],
    out: str | os.PathLike[str],
    *,
    baseline: Sequence[RunLike] | None = None,
    figures: str | os.PathLike[str] | None = None,
    before: Sequence[Part] = (),
) -> Path:
    """Write one HTML page for one run or for several overlaid runs, and return its path.

    Args:
        runs: Run folders, JSONL or CSV files, other tools' logs, or opened runs. The limit is eight, which color
            can distinguish.
        out: The HTML file.
        baseline: Runs of the same set-up that do not overfit, as the reference.
        figures: A folder for each figure as PNG (300 dots an inch) and SVG. The default writes none.
        before: Sections that precede the curves.

    Raises:
        InputError: no run, too many runs, a run without readings, a baseline of another shape, or a page that cannot be
            written.
        RunError: a run is missing or damaged.
        MissingExtraError: a package that reports need is not installed.
    """
    most = len(RUN_COLORS)
    if not 1 <= len(runs) <= most:
        raise InputError(f"expected 1 to {most} runs, which can be told apart by color; got {len(runs)}")
    opened = [run if isinstance(run, Run) else open_run(run) for run in runs]
    names = short_names([run.location or run.path for run in opened])
    reference = Baseline.from_run(baseline) if baseline else None
    rows = max(FEWEST_ROWS, ROWS // len(opened))
    shown = [shown_run(run, name, baseline=reference, rows=rows) for run, name in zip(opened, names, strict=True)]
    tables = Tables()
    panels.add_tables(shown, tables)
    parts = [*before, *_parts(shown, tables)]
    several = len(shown) > 1
    page = write_interactive(
        out,
        title=f"Log-alignment ratio: {f'{len(shown)} runs' if several else names[0]}",
        cards=[_card(run, name=run.name if several else "", baseline=reference) for run in shown],
        parts=parts,
        facts=[(f"Facts of {run.name}" if several else "Facts", _facts(run)) for run in shown],
        tables=tables,
    )
    if figures is not None:
        write_figures(figures, parts)
    return page


def _card(run: ShownRun, *, name: str, baseline: Baseline | None) -> Card:
    notes = [_in_words(run)]
    folded = run.folded
    if baseline is not None:
        notes.append(f"Compared with {baseline.describe()}.")
    if folded.thinned:
        notes.append(
            f"The verdict was folded over {folded.folded:,} of {folded.of:,} readings, evenly chosen, with losses "
            "averaged in between. The command logalign diagnose takes all of them, and may differ."
        )
    if run.thinned:
        notes.append(
            f"Drawn are {len(run.rows):,} of {folded.of:,} readings: of every stretch the lowest and the highest of "
            "each curve. Zooming in shows these, not the ones between."
        )
    return Card(verdict=folded.verdict, name=name, notes=notes)


def _in_words(run: ShownRun) -> str:
    """Describe LAR in two sentences of numbers."""
    columns = run.columns
    lar = np.asarray(columns["lar"], dtype=np.float64)
    known = np.isfinite(lar)
    if not known.any() and run.folded.verdict.regime == "loss":
        return f"{AFTERWARDS}."
    if not known.any():
        return f"None of the {lar.size} readings is defined; the facts below say why."
    lars, steps = lar[known], columns["step"][known]
    text = f"LAR was {lars[0]:.3f} at step {steps[0]:,} and {lars[-1]:.3f} at step {steps[-1]:,}"
    inside = [
        f"{words} {lars[i]:.3f} at step {steps[i]:,}"
        for words, i in (("highest", int(lars.argmax())), ("lowest", int(lars.argmin())))
        if i not in (0, len(lars) - 1)
    ]
    text += f" ({', '.join(inside)})." if inside else "."
    k, n = _at(columns, "effective_dim", np.flatnonzero(known)[-1]), _at(columns, "n", np.flatnonzero(known)[-1])
    if k is not None and n is not None:
        text += f" At its last reading the effective dimension k is {k:.1f}, of n = {int(n):,} inputs."
    return text


def _parts(runs: Sequence[ShownRun], tables: Tables) -> list[Part]:
    several = len(runs) > 1
    noise = (
        "The shaded bands say where a reading is expected by chance: a running median, and two standard deviations of "
        "its scatter on either side."
    )
    if not several and not panels.known(runs[0].drawn, "lar") and panels.known(runs[0].drawn, "lar_bound"):
        noise = "There is no LAR without inputs. Dashed: what the weight alone allows at most."
    parts = [
        Part(heading="Drift", text=drift_text(runs), panels=drift_panels(runs)),
        Part(heading="Log-alignment ratio", text="" if several else noise, panels=panels.lar_panels(runs)),
        Part(
            heading="Outcome over time",
            text="What the detector said at each step.",
            panels=panels.outcome_panels(runs, tables),
        ),
        Part(
            heading="Effective dimension",
            text="k = n^(2 (1 - LAR)), on a logarithmic axis; a falling LAR is a rising k.",
            panels=panels.effective_dim_panels(runs),
        ),
        Part(heading="Signals and thresholds", text=SIGNALS_TEXT, panels=panels.signal_panels(runs)),
        Part(
            heading="Loss",
            text="As it was recorded. A held-out loss is drawn to check by; the verdict does not use it.",
            panels=panels.loss_panels(runs),
        ),
        Part(
            heading="What moves k",
            text="k = sqrt(weight spread × activation spread) / coherence, from the spectral readings.",
            panels=panels.driver_panels(runs),
        ),
        Part(
            heading="Weights",
            text="Of the checkpoints' weights alone. Stable rank is the squared norm over the largest squared singular "
            "value; no inputs can give a LAR above 1 - log_n(stable rank) / 2.",
            panels=panels.weight_panels(runs),
        ),
    ]
    if not several:
        parts += _layers(runs[0])
        spectra = shown_spectra(runs[0].run, runs[0].site)
        parts.append(
            Part(heading="Spectra", text=_spectra_text(spectra), panels=panels.spectra_panels(runs[0], spectra))
        )
    else:
        rows = [_row(run) for run in runs]
        drifts = [drift_cell(run.columns) for run in runs]
        if any(drifts):
            rows = [{**row, f"drift ({UNIT})": drift} for row, drift in zip(rows, drifts, strict=True)]
        text = "What was measured in each run. Layers and spectra are in the report of one run alone."
        parts.append(Part(heading="Runs", text=text, table=rows))
    parts = [part for part in parts if part.panels or part.table]
    return [*parts, Part(heading="How to read this", text=HOW_TO_READ), Part(heading="Limits", text=LIMITS)]


def _spectra_text(spectra: ShownSpectra | None) -> str:
    if spectra is None:
        return ""
    text = (
        "p is how the weight is spread over its singular directions, q how the inputs are spread over the same; both "
        "sum to 1. Where q lies in the directions of large p, LAR is high."
    )
    if len(spectra.steps) < spectra.recorded:
        text += f" {len(spectra.steps)} of {spectra.recorded} steps are embedded, evenly chosen."
    if spectra.left_out:
        text += f" {spectra.left_out} layers are left out."
    if spectra.damaged:
        text += f" Could not be read: {', '.join(spectra.damaged)}."
    return text


def _layers(run: ShownRun) -> list[Part]:
    """The other layers of a run that watched several."""
    if len(run.sites) == 1:
        return []
    table: list[dict[str, object]] = []
    wanted = ("lar", "effective_dim", "weight_participation", "lar_bound")
    measured = {name for name in wanted if any(panels.known(columns, name) for columns in run.sites.values())}
    for site, columns in run.sites.items():
        table.append(
            {
                "site": site,
                "module": _meta_of(run.run, site).get("module") or None,
                "m × n": _shape(columns),
                "last step": int(columns["step"][-1]),
                **{
                    words: _at(columns, name, -1)
                    for name, words in (
                        ("lar", "LAR"),
                        ("effective_dim", "k"),
                        ("weight_participation", "d_p"),
                        ("lar_bound", "LAR at most"),
                    )
                    if name in measured
                },
            }
        )
    if panels.layers_show(run)[0] != "lar":
        text = "No LAR without inputs: the map shows the spread of weights d_p."
        return [Part(heading="Layers", text=text, panels=panels.layer_panels(run), table=table)]
    text = "Plain LAR. Layers without a softmax behind them have a plain and a token-centered LAR only."
    if len(run.sites) > panels.MOST_LAYERS:
        text += f" The map shows the first {panels.MOST_LAYERS} of {len(run.sites)} layers."
    return [Part(heading="Layers", text=text, panels=panels.layer_panels(run), table=table)]


def _meta_of(run: Run, site: str) -> dict[str, Any]:
    sites = run.meta.get("sites")
    found = sites.get(site) if isinstance(sites, dict) else None
    return found if isinstance(found, dict) else {}


def _at(columns: Columns, name: str, row: int) -> float | None:
    """One number, or None where it is undefined or was not recorded."""
    if name not in columns or not np.isfinite(columns[name][row]):
        return None
    return float(columns[name][row])


def _shape(columns: Columns) -> str | None:
    m, n = _at(columns, "m", -1), _at(columns, "n", -1)
    # No-break spaces keep a shape on one line.
    return None if m is None or n is None else f"{int(m):,}\u00a0×\u00a0{int(n):,}"


def _row(run: ShownRun) -> dict[str, object]:
    columns = run.columns
    return {
        "run": run.name,
        "outcome": run.folded.verdict.outcome,
        "layer": _meta_of(run.run, run.site).get("module") or run.site,
        "m × n": _shape(columns),
        "readings": len(columns["step"]),
        "undefined": int((~np.isfinite(columns["lar"])).sum()),
        "last step": int(columns["step"][-1]),
        "LAR": _at(columns, "lar", -1),
        "centered": _at(columns, "lar_centered", -1),
        "k": _at(columns, "effective_dim", -1),
    }


def _facts(shown: ShownRun) -> dict[str, str]:
    """List the facts a reader needs to trust the curves, with "not recorded" where the run has none."""
    run, columns = shown.run, shown.columns
    steps, shape = columns["step"], _shape(columns)
    found = _meta_of(run, shown.site)
    facts = {"Run": run.name, "Site": shown.site}
    if found.get("module") is not None:
        kind = f"{found['kind']}, " if found.get("kind") else ""
        facts["Layer"] = (
            f"{found['module'] or 'the model itself'} ({kind}{shape or 'shape not recorded:'} outputs × inputs)"
        )
    elif shape:
        facts["Shape"] = f"{shape} outputs × inputs"
    if found.get("how"):
        facts["How it was found"] = str(found["how"])
    tied = found.get("tied_to")
    if isinstance(tied, list):
        facts["Weight tied to"] = ", ".join(map(str, tied)) or "nothing"
    if found.get("bias"):
        facts["Bias"] = "there is one; it is taken out before measuring"
    if found.get("mask") is not None:
        facts["Loss mask"] = str(found["mask"])
    every = run.meta.get("every")
    facts["Readings"] = f"{len(steps):,}, steps {steps[0]:,} to {steps[-1]:,}"
    facts["Readings"] += f", one every {every:,} steps" if isinstance(every, int) else ""
    undefined = Counter(columns["reason"][~np.isfinite(columns["lar"])].tolist())
    facts["Undefined readings"] = (
        "; ".join(f"{count:,}: {reason or 'no reason recorded'}" for reason, count in undefined.items()) or "none"
    )
    nonfinite = _known(columns, "nonfinite")
    facts["Non-finite rows"] = f"{int(nonfinite.sum()):,}" if nonfinite.size else "not recorded"
    kept = _known(columns, "kept")
    facts["Share of tokens kept by the mask"] = (
        f"{np.median(kept):.1%} in the median, {kept.min():.1%} at the lowest" if kept.size else "no mask recorded"
    )
    tokens = _at(columns, "tokens_seen", -1)
    if tokens is not None:
        facts["Tokens seen"] = f"{int(tokens):,}"
    facts |= drift_facts(columns)
    resumes = [event.get("step") for event in run.events if event.get("event") == "resume"]
    facts["Resumed"] = f"at step {', '.join(map(str, resumes))}" if resumes else "never"
    warned = [str(event.get("message")) for event in run.events if event.get("event") == "warning"]
    facts["Warnings"] = "; ".join(warned) or "none"
    settings = run.meta.get("settings")
    if isinstance(settings, dict) and settings:
        facts["Settings"] = ", ".join(f"{name} = {value}" for name, value in settings.items())
    started = _started(run.meta.get("created"))
    if started:
        facts["Started"] = started
    if run.meta.get("logalign_version"):
        facts["Recorded by"] = f"logalign {run.meta['logalign_version']}"
    return facts


def _known(columns: Columns, name: str) -> np.ndarray[Any, Any]:
    values = np.asarray(columns.get(name, np.array([])), dtype=np.float64)
    return values[np.isfinite(values)]


def _started(created: object) -> str | None:
    if not isinstance(created, int | float):
        return None
    try:
        return datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return None
