"""A small GPT on fresh text and on a little repeated text: LAR falls below the baseline as the gap opens.

The baseline sees text that never repeats, with its own initial weights and order. The other run repeats a small slice
of the same text for many epochs and overfits. The deviation of its LAR from the baseline needs no held-out text. The
held-out loss only checks it.

Shapes: B = 16 sequences of S = 128 tokens, m = 2,048 token types, n = 128.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import numpy as np
from rich.console import Console

from logalign.demos import DemoResult
from logalign.demos.corpus import Corpus, Tokens, read_documents, tokenize
from logalign.demos.curves import rank_correlation
from logalign.demos.folder import REPORT, Settings, check, claim
from logalign.demos.gpt import GPT
from logalign.demos.training import Training, check_device, check_steps, epoch_order, is_finished
from logalign.diagnosis.baseline import Baseline
from logalign.errors import InputError, MissingExtraError
from logalign.report import figures
from logalign.report.chart_lines import FORM_LINES
from logalign.report.page import Section, write_page
from logalign.runs.run import open_run

try:
    import torch
    from torch import Tensor
    from torch.nn import functional as F
except ImportError as error:
    raise MissingExtraError('this demo needs PyTorch: pip install "logalign[demo]"') from error

BATCH = 16
CONTEXT = 128
HELD_OUT_SEQUENCES = 32
EVERY = 10
LEARNING_RATE = 1e-3
WARM_UP = 100
RUNS = ("baseline", "repeated")


def run(
    *,
    out: Path,
    text: list[Path] | None = None,
    steps: int = 700,
    unique_tokens: int = 100_000,
    seed: int = 0,
    device: str = "cpu",
    fresh: bool = False,
    console: Console | None = None,
) -> DemoResult:
    """Train the baseline and the repeating run, both monitored, and report the deviation and the true gap.

    Args:
        out: folder for the two runs and the report.
        text: UTF-8 text files, by default the sources of Python's standard library.
        steps: optimizer steps of each run, of 2,048 tokens each.
        unique_tokens: size of the slice that the second run repeats.
        seed: seed of the repeating run. The baseline takes the next one.
        device: any PyTorch device.
        fresh: start again instead of continuing the runs in `out`.
        console: the console that shows progress, by default the terminal.

    Raises:
        InputError: an option is out of range, the device is unknown, the text cannot be read or is too short, or `out`
            holds something else.
        RunError: a run or a checkpoint in `out` is damaged.
    """
    console = console or Console()
    check_steps(steps)
    where = check_device(device)
    if unique_tokens <= BATCH * CONTEXT:
        raise InputError(
            f"--unique-tokens: expected more than the {BATCH * CONTEXT:,} tokens of one step, found {unique_tokens:,}"
        )
    documents = read_documents(text)
    settings: dict[str, str | int | float] = {
        "steps": steps,
        "unique_tokens": unique_tokens,
        "seed": seed,
        "device": device,
        "text": documents.fingerprint,
    }
    check(out, demo="language-model", settings=settings, fresh=fresh)
    corpus = None
    if fresh or not all(is_finished(out / name, steps) for name in RUNS):
        with console.status(f"training a tokenizer on {documents.source}"):
            corpus = tokenize(documents)
        check_length(corpus, steps=steps, unique_tokens=unique_tokens)
    claim(out, demo="language-model", settings=settings, runs=RUNS, fresh=fresh)
    if corpus is not None:
        sizes: dict[str, str | int | float] = {
            "train_tokens": len(corpus.train),
            "held_out_tokens": len(corpus.held_out),
            "source": documents.source,
        }
        console.print(f"{sizes['source']}: {len(corpus.train):,} tokens, {len(corpus.held_out):,} more held out")
        slices = {"baseline": (corpus.train, seed + 1), "repeated": (corpus.train[:unique_tokens], seed)}
        titles = {"baseline": "fresh text", "repeated": f"{unique_tokens:,} tokens repeated"}
        for name, (tokens, own_seed) in slices.items():
            _train(
                out / name,
                corpus,
                tokens,
                steps=steps,
                seed=own_seed,
                device=where,
                title=titles[name],
                settings={**settings, **sizes},
                console=console,
            )
    summary, sections, facts = _findings(out, unique_tokens=unique_tokens)
    report = write_page(
        out / REPORT,
        title="A language model that repeats its text: LAR beside the true generalization gap",
        lead=summary,
        sections=sections,
        facts={
            **facts,
            "network": "GPT, 4 layers, width 128, 4 heads, context 128, unembedding of its own",
            "training": f"{steps} steps of {BATCH} x {CONTEXT} tokens, AdamW, lr {LEARNING_RATE:g} after {WARM_UP} "
            "steps of warm-up, weight decay 0.1, betas 0.9 and 0.95",
            "seed": f"{seed} (repeated), {seed + 1} (baseline)",
            "device": device,
            "versions": f"PyTorch {torch.__version__}, NumPy {np.__version__}",
            "runs": ", ".join(RUNS),
        },
    )
    console.print(summary, soft_wrap=True)
    console.print(f"report: {report}", soft_wrap=True, highlight=False)
    return DemoResult(report, [out / name for name in RUNS], summary)


def check_length(corpus: Corpus, *, steps: int, unique_tokens: int) -> None:
    """Refuse a text that is too short for the baseline without repeats, for the slice or for the held-out part.

    Raises:
        InputError: the text is too short. The message gives the tokens needed and found.
    """
    most = max(0, len(corpus.train) - 1) // (BATCH * CONTEXT)
    if most < steps:
        instead = f"or ask for at most {most} steps" if most else "since it is too short for any training"
        raise InputError(
            f"text too short: {steps} steps on fresh text need {steps * BATCH * CONTEXT + 1:,} training tokens, found "
            f"{len(corpus.train):,} (a tenth of the text is held out); name more text with --text, {instead}"
        )
    if unique_tokens > len(corpus.train):
        raise InputError(
            f"--unique-tokens: expected at most the {len(corpus.train):,} training tokens of the text, "
            f"found {unique_tokens:,}"
        )
    needed = HELD_OUT_SEQUENCES * (CONTEXT + 1)
    if len(corpus.held_out) < needed:
        raise InputError(
            f"text too short: {needed:,} tokens have to be held out, a tenth of the text, found "
            f"{len(corpus.held_out):,}; name more text with --text"
        )


def batches(tokens: Tokens, *, seed: int, start: int) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield inputs [B, S], targets [B, S] and the epoch of every step from `start` on.

    The text is cut into blocks of S tokens, which come in a new order every epoch. The last few blocks of an epoch are
    left out if they do not fill a batch.
    """
    data = torch.from_numpy(tokens)
    per_epoch = (len(tokens) - 1) // CONTEXT // BATCH
    step = start
    while True:
        epoch, part = divmod(step, per_epoch)
        order = epoch_order(seed, epoch, (len(tokens) - 1) // CONTEXT)
        for first in torch.split(order[part * BATCH : per_epoch * BATCH], BATCH):
            window = data[first[:, None] * CONTEXT + torch.arange(CONTEXT + 1)]
            yield window[:, :-1], window[:, 1:], step / per_epoch
            step += 1


def _train(
    folder: Path,
    corpus: Corpus,
    tokens: Tokens,
    *,
    steps: int,
    seed: int,
    device: torch.device,
    title: str,
    settings: Settings,
    console: Console,
) -> None:
    torch.manual_seed(seed)
    model = GPT(vocabulary=corpus.vocabulary, context=CONTEXT).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.95))
    held_out = held_out_windows(corpus.held_out).to(device)
    with Training(
        folder,
        model=model,
        optimizer=optimizer,
        steps=steps,
        title=title,
        settings=settings,
        every=EVERY,
        checkpoint_every=50,
        console=console,
    ) as training:
        source = batches(tokens, seed=seed, start=training.done)
        for step in training.remaining():
            inputs, targets, epoch = next(source)
            rate = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = _loss(model(inputs.to(device)), targets.to(device))
            held_out_loss = {"val_loss": _held_out_loss(model, held_out)} if training.is_monitored else {}
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            training.record(loss=loss, lr=rate, epoch=epoch, **held_out_loss)


def held_out_windows(tokens: Tokens) -> Tensor:
    """Return the fixed held-out sequences, [32, S + 1], spread evenly over the held-out text."""
    starts = np.linspace(0, len(tokens) - CONTEXT - 1, HELD_OUT_SEQUENCES).astype(np.int64)
    return torch.from_numpy(tokens[starts[:, None] + np.arange(CONTEXT + 1)])


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def _held_out_loss(model: GPT, windows: Tensor) -> float:
    model.eval()
    loss = _loss(cast(Tensor, model(windows[:, :-1])), windows[:, 1:])
    model.train()
    return loss.item()


def _findings(out: Path, *, unique_tokens: int) -> tuple[str, list[Section], dict[str, str]]:
    """Read both runs and compare them in words, with numbers from the runs."""
    baseline, repeated = (open_run(out / name) for name in RUNS)
    fresh, again = baseline.columns(), repeated.columns()
    reference = Baseline.from_run(baseline)
    step, gap = again["step"], again["val_loss"] - again["train_loss"]
    deviations = {form: _aligned(step, *reference.deviation(repeated, form=form)) for form, *_ in FORM_LINES}

    rivals = {
        **{f"deviation of LAR, {words}": deviations[form] for form, _, words, *_ in FORM_LINES},
        "step number": step,
        "deviation of the training loss": fresh["train_loss"] - again["train_loss"],
        "norm of the unembedding": np.sqrt(again["energy_weight"]),
    }
    settled = step >= WARM_UP if (step >= WARM_UP).sum() >= 3 else step >= 0
    scores = {name: rank_correlation(values[settled], gap[settled]) for name, values in rivals.items()}
    plain = deviations["lar"]
    epochs = float(again["epoch"][-1])
    shown = {name: "undefined" if score is None else f"{score:.2f}" for name, score in scores.items()}
    summary = (
        f"After {epochs:.1f} passes over {unique_tokens:,} tokens the repeating run's generalization gap is "
        f"{gap[-1]:.2f} nats (baseline {fresh['val_loss'][-1] - fresh['train_loss'][-1]:.2f}), and its plain LAR lies "
        f"{abs(plain[-1]):.3f} {'below' if plain[-1] >= 0 else 'above'} the baseline's. "
        f"Spearman's correlation with the gap is {shown['deviation of LAR, plain']} for that deviation (centered "
        f"{shown['deviation of LAR, centered (both)']}), {shown['step number']} for the step number and "
        f"{shown['deviation of the training loss']} for the training loss's own deviation: within one run whatever "
        "grows with time does well, so this proves nothing by itself."
    )
    sections = [
        _comparison(fresh, again, deviations, gap),
        _scores(scores, int(step[settled][0])),
        _curves(fresh, again),
        _how_to_read(),
    ]
    meta = cast(Mapping[str, object], repeated.meta["settings"])
    facts = {
        "text": str(meta["source"]),
        "tokens": f"{meta['train_tokens']:,} for training, {meta['held_out_tokens']:,} of other documents held out",
        "repeated": f"{unique_tokens:,} of the training tokens",
    }
    return summary, sections, facts


def _aligned(steps: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Expand values known at some of the steps to all steps, with NaN elsewhere."""
    aligned = np.full(len(steps), np.nan)
    aligned[np.searchsorted(steps, known)] = values
    return aligned


def _comparison(
    fresh: figures.Columns, again: figures.Columns, deviations: Mapping[str, np.ndarray], gap: np.ndarray
) -> Section:
    figure, (deviation_axis, gap_axis) = figures.new_axes(2, row_height=2.6)
    with figures.house_style():
        for form, color, words, *_ in FORM_LINES:
            deviation_axis.plot(again["step"], deviations[form], color=figures.COLORS[color], label=words)
        deviation_axis.axhline(0.0, color=figures.COLORS["baseline"], linewidth=0.8)
        deviation_axis.set_ylabel("LAR: baseline - run")
        gap_axis.plot(again["step"], gap, color=figures.COLORS["accent"], label="repeated text")
        gap_axis.plot(
            fresh["step"],
            fresh["val_loss"] - fresh["train_loss"],
            color=figures.COLORS["baseline"],
            label="fresh text (baseline)",
        )
        gap_axis.set_ylabel("held-out - training\nloss (nats)")
        for ax in (deviation_axis, gap_axis):
            ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, borderaxespad=0.2)
    figure.set_label(
        "Line charts over training steps: deviation of four forms of LAR from the baseline, and the generalization gap "
        "of both runs."
    )
    return Section(
        "The deviation, and the gap that it stands for",
        "Above: how far the run that repeats its text has fallen below the baseline, from training batches alone. "
        "Below: the true generalization gap, for which text was held out that neither run has seen. The baseline has "
        "other initial weights and another order, as it would have in practice: part of the deviation is that "
        "difference.",
        figure=figure,
    )


def _scores(scores: Mapping[str, float | None], start: int) -> Section:
    return Section(
        "What follows the gap within this run",
        f"Spearman's rank correlation with the gap over the readings from step {start} on. Within one run anything "
        "that grows with time follows the gap: the step number does, and the training loss does. So a high number here "
        "proves nothing. What a signal is worth shows only across many runs that are compared at equal steps.\n\n"
        "The forms of LAR differ here. The token-centered ones leave out the direction that all inputs share, and in "
        "the language models seen so far that direction carries signal: plain and vocabulary-centered LAR followed "
        "the gap better.",
        table=[
            {"signal": name, "Spearman with the gap": None if score is None else round(score, 2)}
            for name, score in scores.items()
        ],
    )


def _curves(fresh: figures.Columns, again: figures.Columns) -> Section:
    figure, (plain, centered, loss) = figures.new_axes(3, row_height=2.2)
    with figures.house_style():
        for ax, column, words in ((plain, "lar", "LAR, plain"), (centered, "lar_centered", "LAR, centered")):
            ax.plot(fresh["step"], fresh[column], color=figures.COLORS["baseline"], label="fresh text (baseline)")
            ax.plot(again["step"], again[column], color=figures.COLORS["accent"], label="repeated text")
            ax.set_ylabel(words)
        for columns, color, words in ((fresh, "baseline", "fresh text"), (again, "accent", "repeated text")):
            shade = figures.COLORS[color]
            loss.plot(columns["step"], columns["train_loss"], color=shade, label=f"{words}, training")
            loss.plot(columns["step"], columns["val_loss"], color=shade, linestyle="--", label=f"{words}, held out")
        loss.set_ylabel("loss (nats)")
        plain.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.2)
        loss.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.2)
    figure.set_label(
        "Line charts over training steps of both runs: LAR plain and centered, training and held-out loss."
    )
    return Section(
        "Both runs",
        "LAR climbs early, while all inputs share a direction, and falls as more directions come into use; healthy "
        "training falls too. The held-out losses are drawn to check only.",
        figure=figure,
    )


def _how_to_read() -> Section:
    return Section(
        "How to read this",
        "- In language models the signal is the deviation from a baseline that does not overfit, at equal steps; the "
        "level of LAR says little by itself.\n"
        "- The baseline has another seed, which moves LAR too, and every reading is of one batch: a small deviation, "
        "or one that does not last, is no sign of anything.\n"
        "- A falling learning rate moves LAR without any change in generalization, so compare runs of one schedule.\n\n"
        "The published evidence is pre-training at 3 billion parameters; for fine-tuning, adapters, mixtures of "
        "experts and vision, thresholds are unproven.",
    )
