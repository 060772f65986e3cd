"""Modular addition until the network generalizes: k falls to the number of directions that the function uses.

A ReLU network learns (a + b) mod p from half of all pairs. With weight decay it first memorizes them, and much later
suddenly generalizes to the other half. Without weight decay it never does. The training batch alone gives k. The demo
also shows the accuracies and the dimension of `logalign.demos.dimension`, counted on held-out pairs without any LAR.

Shapes: T pairs [T, 2], labels [T], logits [T, p], n = width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from rich.console import Console

from logalign.demos import DemoResult
from logalign.demos.dimension import frequency_planes, function_dimension
from logalign.demos.folder import REPORT, Settings, claim
from logalign.demos.training import Training, check_device, check_steps, threads
from logalign.errors import InputError, MissingExtraError
from logalign.mathematics.energies import effective_dim
from logalign.report import figures
from logalign.report.page import Section, write_page
from logalign.runs.run import open_run

try:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F
except ImportError as error:
    raise MissingExtraError('this demo needs PyTorch: pip install "logalign[demo]"') from error

RUN = "run"
EVERY = 10
HIDDEN = 256
TRAIN_SHARE = 0.5
SOLVED = 0.9
# In runs that generalize, plain and centered LAR differ by a few hundredths at most.
APART = 0.1


@dataclass(frozen=True)
class Pairs:
    """All p * p pairs (a, b) with (a + b) mod p, split at random into two halves."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


class Adder(nn.Module):
    """Embedding of both numbers, an MLP 2 width -> 256 -> width, and the unembedding `head`, without bias."""

    def __init__(self, p: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(p, width)
        self.body = nn.Sequential(nn.Linear(2 * width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, width))
        self.head = nn.Linear(width, p, bias=False)

    def forward(self, pairs: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.body(self.embedding(pairs).flatten(1))))


def all_pairs(p: int, *, seed: int, device: torch.device) -> Pairs:
    """List the pairs and split them by p and the seed alone."""
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    labels = pairs.sum(dim=1) % p
    order = torch.randperm(p * p, generator=torch.Generator().manual_seed(seed))
    train, held_out = order[: int(TRAIN_SHARE * p * p)], order[int(TRAIN_SHARE * p * p) :]
    return Pairs(
        pairs[train].to(device), labels[train].to(device), pairs[held_out].to(device), labels[held_out].to(device)
    )


def train(
    folder: Path,
    *,
    p: int,
    width: int,
    weight_decay: float,
    steps: int,
    seed: int,
    device: torch.device,
    settings: Settings,
    console: Console,
) -> None:
    """Train one network on full batches, with readings of LAR, both accuracies and the independent dimension."""
    pairs = all_pairs(p, seed=seed, device=device)
    torch.manual_seed(seed)
    model = Adder(p, width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=weight_decay, betas=(0.9, 0.98))
    with Training(
        folder,
        model=model,
        optimizer=optimizer,
        steps=steps,
        title=f"(a + b) mod {p}",
        settings=settings,
        every=EVERY,
        checkpoint_every=250,
        console=console,
    ) as training:
        for step in training.remaining():
            logits = model(pairs.train)
            loss = F.cross_entropy(logits, pairs.train_labels)
            check = _check(model, pairs, logits) if training.is_monitored else {}
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            training.record(loss=loss, epoch=float(step), **check)


@torch.no_grad()
def _check(model: nn.Module, pairs: Pairs, train_logits: Tensor) -> dict[str, float]:
    model.eval()
    logits = cast(Tensor, model(pairs.held_out))
    model.train()
    accuracies = {
        "train_acc": _accuracy(train_logits, pairs.train_labels),
        "test_acc": _accuracy(logits, pairs.held_out_labels),
        "val_loss": F.cross_entropy(logits, pairs.held_out_labels).item(),
    }
    if not bool(torch.isfinite(logits).all()):
        return accuracies
    counted = function_dimension(logits.double().cpu().numpy(), pairs.held_out_labels.cpu().numpy())
    counts = {
        "dimension": counted.dimension,
        "dimension_additive": counted.additive_dimension,
        "dimension_energy": counted.energy_dimension,
    }
    return {
        **accuracies,
        "margin": counted.margin,
        **{name: np.nan if count is None else float(count) for name, count in counts.items()},
    }


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(dim=1) == labels).double().mean().item()


def run(
    *,
    out: Path,
    p: int = 59,
    width: int = 64,
    weight_decay: float = 1.0,
    steps: int = 1500,
    seed: int = 0,
    device: str = "cpu",
    fresh: bool = False,
    console: Console | None = None,
) -> DemoResult:
    """Train on modular addition with a monitor, and write a report of k, the accuracies and the dimension.

    Args:
        out: folder for the run and the report.
        p: modulus, an odd number of at least 5.
        width: n, width of the embedding and of the unembedding's input, at least 2.
        weight_decay: with 0 the network memorizes and never generalizes.
        steps: optimizer steps, each on all training pairs.
        seed: seed of the split and of the initial weights.
        device: any PyTorch device.
        fresh: start again instead of continuing the run in `out`.
        console: the console that shows progress, by default the terminal.

    Raises:
        InputError: an option is out of range, the device is unknown, or `out` holds something else.
        RunError: the run or the checkpoint in `out` is damaged.
    """
    console = console or Console()
    check_steps(steps)
    frequency_planes(p)
    if width < 2:
        raise InputError(f"--width: expected at least 2, found {width}")
    if not (weight_decay >= 0.0 and np.isfinite(weight_decay)):
        raise InputError(f"--weight-decay: expected a number from 0 on, found {weight_decay}")
    where = check_device(device)
    settings: dict[str, str | int | float] = {
        "p": p,
        "width": width,
        "weight_decay": weight_decay,
        "steps": steps,
        "seed": seed,
        "device": device,
    }
    claim(out, demo="grokking", settings=settings, runs=[RUN], fresh=fresh)
    with threads(1):
        train(
            out / RUN,
            p=p,
            width=width,
            weight_decay=weight_decay,
            steps=steps,
            seed=seed,
            device=where,
            settings=settings,
            console=console,
        )
    columns = with_effective_dims(open_run(out / RUN).columns())
    summary = _summary(columns)
    report = write_page(
        out / REPORT,
        title=f"Learning (a + b) mod {p}: k, accuracy, and the directions in use",
        lead=summary,
        sections=[_course(columns), _last(columns), _how_to_read()],
        facts={
            "data": f"{p * p // 2} pairs for training, {p * p - p * p // 2} held out",
            "network": f"embedding {width}, ReLU MLP {2 * width}-{HIDDEN}-{width}, unembedding without bias",
            "training": f"{steps} steps, full batch, AdamW, lr 0.005, betas 0.9 and 0.98",
            "weight decay": f"{weight_decay:g}",
            "seed": str(seed),
            "device": device,
            "versions": f"PyTorch {torch.__version__}, NumPy {np.__version__}",
            "runs": RUN,
        },
    )
    console.print(summary, soft_wrap=True)
    console.print(f"report: {report}", soft_wrap=True, highlight=False)
    return DemoResult(report, [out / RUN], summary)


def with_effective_dims(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add k of the centered LAR, which is not in the log, as the column `effective_dim_centered`."""
    n = int(columns["n"][0])
    centered = [effective_dim(float(lar), n) if np.isfinite(lar) else np.nan for lar in columns["lar_centered"]]
    return {**columns, "effective_dim_centered": np.array(centered)}


def _first(columns: figures.Columns, name: str, level: float) -> int | None:
    """Return the first step at which a column reaches a level."""
    reached = np.flatnonzero(columns[name] >= level)
    return int(columns["step"][reached[0]]) if len(reached) else None


def _summary(columns: figures.Columns) -> str:
    """Summarize the run in two sentences with numbers from the run."""
    memorized, solved = _first(columns, "train_acc", 0.99), _first(columns, "test_acc", SOLVED)
    plain, centered = columns["effective_dim"], columns["effective_dim_centered"]
    last = f"At the end k is {plain[-1]:.1f} (centered {centered[-1]:.1f})"
    if memorized is None:
        return (
            f"The network did not learn its training pairs in {int(columns['step'][-1]) + 1} steps (accuracy "
            f"{columns['train_acc'][-1]:.2f}), so there is nothing to compare yet. {last}."
        )
    learned = f"Training accuracy reached 0.99 at step {memorized}"
    if solved is None:
        apart = columns["lar"][-1] - columns["lar_centered"][-1]
        common = (
            f": plain LAR lies {apart:.2f} above centered LAR, for the inputs have a strong common direction, which is "
            "no generalization and which the centered form leaves out"
            if apart > APART
            else ""
        )
        return (
            f"{learned}, and held-out accuracy is {columns['test_acc'][-1]:.2f} at the end: the network memorized and "
            f"did not generalize. {last}{common}."
        )
    at = int(np.flatnonzero(columns["step"] == memorized)[0])
    dimension = columns["dimension"][-1]
    counted = (
        f"removing frequencies from the unembedding shows {dimension:.0f} directions in use"
        if np.isfinite(dimension)
        else "the held-out margin is not positive, so no directions can be counted"
    )
    return (
        f"{learned} with k at {plain[at]:.1f} (centered {centered[at]:.1f}), held-out accuracy {SOLVED} only at step "
        f"{solved}. {last}, and {counted}."
    )


def _course(columns: figures.Columns) -> Section:
    figure, (accuracy, dimension, ratio) = figures.new_axes(3, row_height=2.4)
    step = columns["step"]
    with figures.house_style():
        accuracy.plot(step, columns["train_acc"], color=figures.COLORS["train"], label="training pairs")
        accuracy.plot(step, columns["test_acc"], color=figures.COLORS["held_out"], label="held-out pairs (to check)")
        accuracy.set_ylabel("accuracy")
        dimension.plot(step, columns["effective_dim"], color=figures.COLORS["plain"], label="k, plain")
        dimension.plot(step, columns["effective_dim_centered"], color=figures.COLORS["centered"], label="k, centered")
        if np.isfinite(columns["dimension"]).any():
            dimension.plot(
                step,
                columns["dimension"],
                color=figures.COLORS["accent"],
                linestyle="none",
                marker=".",
                markersize=4,
                label="directions counted by removal (no LAR in it)",
            )
        dimension.set_ylabel("dimension")
        dimension.set_ylim(bottom=0.0)
        ratio.plot(step, columns["lar"], color=figures.COLORS["plain"], label="LAR, plain")
        ratio.plot(step, columns["lar_centered"], color=figures.COLORS["centered"], label="LAR, centered")
        ratio.set_ylabel("LAR")
        for ax in (accuracy, dimension, ratio):
            ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.2)
    figure.set_label(
        "Line charts over training steps: accuracy on training and held-out pairs; k plain and centered beside the "
        "counted directions; LAR plain and centered."
    )
    return Section(
        "Memorizing or generalizing",
        "A network that memorizes uses most of its width; one that has found the general solution uses few directions, "
        "and k falls to about their number. k needs the training batch alone; the held-out accuracy and the counted "
        "directions are there to check it. Where no count is drawn, the mean held-out margin is not positive: nothing "
        "generalizes, and there is no function to count.",
        figure=figure,
    )


def _last(columns: figures.Columns) -> Section:
    rows: list[dict[str, object]] = [
        {"quantity": words, "at the last reading": float(columns[name][-1])}
        for words, name in (
            ("k, plain", "effective_dim"),
            ("k, centered", "effective_dim_centered"),
            ("directions counted by removal", "dimension"),
            ("directions by the additive count", "dimension_additive"),
            ("directions by energy", "dimension_energy"),
            ("held-out accuracy", "test_acc"),
            ("mean held-out margin", "margin"),
        )
    ]
    return Section(
        f"At step {int(columns['step'][-1])}",
        "Three counts of the directions that the function uses stand beside k; none of them uses LAR. By removal: "
        "twice the number of frequencies that lower the mean held-out margin by at least 2 % when taken out alone. "
        "Additive: twice the number that contribute at least 2 % of the lead over the mean of the other classes. By "
        "energy: twice the number that carry at least 1 % of the energy of the logits.",
        table=rows,
    )


def _how_to_read() -> Section:
    return Section(
        "How to read this",
        "k is the number of equally used directions that would give the measured overlap of weights and inputs. It "
        "need not be a whole number: directions of unequal strength count for less than one each.\n\n"
        "- An optimizer jump can throw all inputs in one common direction. Plain LAR then rises as if the network had "
        "generalized; centered LAR leaves that direction out. Run this demo with --weight-decay 0 to see it.\n"
        "- docs/grokking-dimension.md compares k with the counted directions over seeds, moduli and widths.\n\n"
        "What holds for modular addition need not hold elsewhere: the published evidence is grokking on such tasks and "
        "the pre-training of large language models.",
    )
