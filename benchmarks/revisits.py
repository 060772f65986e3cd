"""What the first alarm of drift costs on recorded runs, and what its error depends on.

    python -m benchmarks.revisits                 the table of docs/revisits.md, from tests/data/revisits (seconds)
    python -m benchmarks.revisits --write         and put it into the page, with the picture
    python -m benchmarks.revisits --size          error by samples followed and tokens of each: trains a GPT (3 minutes)

The alarm is a drift above two of its standard errors. Nothing is fitted. Regret is the held-out loss at the alarm less
the lowest of the smoothed held-out curve, which nothing else uses.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.pages import markdown, put, show
from logalign.samples.drift import Revisits, revisits
from logalign.samples.visits import TRACKED, Visits, hashes_of

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "tests" / "data" / "revisits"
PAGE = ROOT / "docs" / "revisits.md"
PICTURE = ROOT / "docs" / "images" / "revisits.svg"
EVERY = 5
EVERYONE = 10**6
NAMES = {
    "ft_prose-to-python_full_0.001_40000_s7": "fine-tuning, prose to python, 40,000 tokens",
    "ft_prose-to-python_lora_0.003_40000_s7": "the same, LoRA",
    "ft_python-to-prose_full_0.0003_80000_s7": "fine-tuning, python to prose, 80,000 tokens, low rate",
    "lm_prose_96_False_0.001_constant_200000_0.1_0.0_s7": "from scratch, prose, 200,000 tokens",
    "lm_python_96_False_0.001_constant_100000_0.1_0.0_s7": "from scratch, python, 100,000 tokens",
}
DRAWN = "ft_prose-to-python_full_0.001_40000_s7"


class Recorded(NamedTuple):
    """A run with the loss of every sample at every visit."""

    samples: np.ndarray[Any, Any]  # [steps, batch]
    losses: np.ndarray[Any, Any]  # [steps, batch]
    steps_per_pass: int
    held_out: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]  # steps, losses

    @property
    def smoothed(self) -> np.ndarray[Any, Any]:
        """Moving mean of five held-out losses."""
        return np.convolve(np.pad(self.held_out[1], 2, "edge"), np.ones(5) / 5, "valid")

    def regret(self, step: float | None) -> float:
        """Held-out loss at a step, or at the end, less the lowest."""
        steps, smoothed = self.held_out[0], self.smoothed
        return float(np.interp(steps[-1] if step is None else step, steps, smoothed) - smoothed.min())


def load(path: Path) -> Recorded:
    """A run of tests/data/revisits."""
    with np.load(path) as run:
        held_out = run["val_step"], run["val_loss"]
        return Recorded(run["samples"], run["losses"], int(run["steps_per_pass"]), held_out)


def follow(run: Recorded, tracked: int) -> Iterator[tuple[int, Revisits]]:
    """Drift and gain at every fifth step, with so many samples followed."""
    visits = Visits(tracked)
    hashes = np.array(hashes_of(range(int(run.samples.max()) + 1)))
    for step, (samples, losses) in enumerate(zip(run.samples, run.losses, strict=True)):
        visits.add(step, hashes[samples], losses)
        if step % EVERY == 0:
            yield step, visits.at(step)


def alarm(run: Recorded, tracked: int) -> int | None:
    """The first step at which drift is above two of its standard errors."""
    return next((step for step, found in follow(run, tracked) if found.rises), None)


def anywhere(run: Recorded) -> int | None:
    """The first such step where windows end at every fifth step, and not at the ends of passes."""
    times = np.repeat(np.arange(len(run.samples)) / run.steps_per_pass, run.samples.shape[1])
    for step in range(0, len(run.samples), EVERY):
        if revisits(run.samples.ravel(), times, run.losses.ravel(), now=step / run.steps_per_pass).rises:
            return step
    return None


def table() -> list[dict[str, str]]:
    """One row a run."""
    rows = []
    for name, words in NAMES.items():
        run = load(RUNS / f"{name}.npz")
        lowest = run.held_out[0][run.smoothed.argmin()]
        row = {"run": words, "lowest at pass": f"{lowest / run.steps_per_pass:.1f}"}
        steps = {size: alarm(run, size) for size in (EVERYONE, TRACKED, 128)}
        row[f"alarm at pass: all / {TRACKED} / 128 samples"] = " / ".join(passes(run, each) for each in steps.values())
        row[f"regret in nats: all / {TRACKED} / 128"] = " / ".join(f"{run.regret(each):.3f}" for each in steps.values())
        sliding = anywhere(run)
        row["windows that end anywhere, all samples: alarm, regret"] = (
            f"{passes(run, sliding)}, {run.regret(sliding):.3f}"
        )
        row["regret at the end"] = f"{run.regret(None):.3f}"
        rows.append(row)
    return rows


def passes(run: Recorded, step: int | None) -> str:
    """A step in passes, for the table."""
    return "none" if step is None else f"{step / run.steps_per_pass:.1f}"


def draw() -> None:
    """Drift with its band above the held-out loss, of one run."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "logalign"  # the same file on every run
    from matplotlib import pyplot

    run = load(RUNS / f"{DRAWN}.npz")
    found = [(step / run.steps_per_pass, each) for step, each in follow(run, TRACKED) if each.drift is not None]
    times = np.array([time for time, _ in found])
    drift = np.array([[each.drift, each.drift_error] for _, each in found])
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 4.6), sharex=True, height_ratios=(1.2, 1))
    above.axhline(0, color="0.4", linewidth=0.8)
    above.fill_between(
        times, drift[:, 0] - 2 * drift[:, 1], drift[:, 0] + 2 * drift[:, 1], color="C0", alpha=0.25, lw=0
    )
    above.plot(times, drift[:, 0], color="C0")
    above.set_ylabel("drift\n(nats a pass)")
    above.set_ylim(-0.5, 0.5)
    above.text(5.6, 0.48, "above 0: training on other samples raises a sample's loss", va="top", fontsize="small")
    below.plot(run.held_out[0] / run.steps_per_pass, run.smoothed, color="C1")
    lowest = int(run.smoothed.argmin())
    below.plot(run.held_out[0][lowest] / run.steps_per_pass, run.smoothed[lowest], "o", color="C1")
    below.annotate(
        "lowest",
        (run.held_out[0][lowest] / run.steps_per_pass, run.smoothed[lowest]),
        (0, 8),
        textcoords="offset points",
        ha="center",
    )
    below.set_ylim(run.smoothed[lowest] - 0.06, run.smoothed[lowest] + 0.6)
    below.set_ylabel("held-out loss\n(nats, not used)")
    below.set_xlabel("passes over the data")
    step = alarm(run, TRACKED)
    if step is not None:
        for axes in (above, below):
            axes.axvline(step / run.steps_per_pass, color="C3", linestyle="--", linewidth=1)
        below.text(step / run.steps_per_pass + 0.1, below.get_ylim()[1], "alarm", color="C3", va="top")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def sizes() -> list[dict[str, str]]:
    """The error of drift by how many samples are followed and how many tokens of each are looked at."""
    import torch
    from torch.nn import functional as F

    from logalign.demos.corpus import read_documents, tokenize
    from logalign.demos.gpt import GPT

    torch.manual_seed(0)
    corpus, batch, length, unique, passes = tokenize(read_documents()), 16, 64, 100_000, 8
    data = torch.from_numpy(corpus.train[: unique + 1]).long()
    count = unique // length
    windows = data[torch.arange(count)[:, None] * length + torch.arange(length + 1)]
    model = GPT(vocabulary=corpus.vocabulary, width=96, layers=2, heads=4, context=length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    samples, losses = [], []
    for _ in range(passes):
        for rows in torch.randperm(count)[: count // batch * batch].reshape(-1, batch):
            logits = model(windows[rows, :-1])
            each = F.cross_entropy(logits.transpose(1, 2), windows[rows, 1:], reduction="none")
            each.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            samples.append(rows.numpy())
            losses.append(each.detach().numpy())
    per_pass, hashes = count // batch, np.array(hashes_of(range(count)))
    order = np.array([np.random.default_rng(i).permutation(length) for i in range(count)])
    found = []
    for tokens in (64, 16, 8, 4, 2):
        row = {"tokens of each sample": str(tokens)}
        for tracked in (EVERYONE, 1024, 512, 256, 128):
            visits, errors = Visits(tracked), []
            for step, (rows, each) in enumerate(zip(samples, losses, strict=True)):
                visits.add(step, hashes[rows], np.take_along_axis(each, order[rows, :tokens], 1).mean(1))
                if step % per_pass == 0 and step > 4 * per_pass:
                    errors.append(visits.at(step).drift_error or np.nan)
            name = "all samples" if tracked == EVERYONE else f"{tracked:,}"
            row[name] = f"{np.median(errors):.3f}"
        found.append(row)
    return found


def main() -> None:
    """Print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="store_true", help="error by samples followed and tokens of each")
    parser.add_argument("--write", action="store_true", help="put it into docs/revisits.md")
    arguments = parser.parse_args()
    part, rows = ("size", sizes()) if arguments.size else ("runs", table())
    show(rows, title=part, width=160)
    if arguments.write:
        put(PAGE, part, markdown(rows))
        if not arguments.size:
            draw()


if __name__ == "__main__":
    main()
