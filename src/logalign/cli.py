"""The command `logalign`: thin commands over the library, with one clear line for every user error.

Every command imports its modules when it runs, so that `--help` is quick and works without the optional packages.

Exit status: 0 done, 1 an error (one line on standard error), 2 wrong usage, 130 interrupted. `diagnose` adds 3 and 4
for its verdict.
"""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from logalign.common.version import __version__
from logalign.errors import LogAlignError

INTRODUCTION = """\
Is a network memorizing or generalizing? Measured while it trains, without held-out data.

logalign records the log-alignment ratio (LAR) of a network's last layer: how well its weights line up with its inputs,
1 for one shared direction, near 1/2 for unrelated ones. How it moves during training is the signal. In your own
training:

    monitor = logalign.watch(model, run="runs/first")
    ...
    monitor.step(loss=loss)        # after every optimizer step

From the command line:

    logalign demo label-noise      # one minute: clean labels beside random ones
    logalign report runs/first     # draw what was recorded, as one HTML file
    logalign diagnose runs/first   # what it shows, and what to do
"""

DEMO_INTRODUCTION = """\
Train a small network here and now, and see what LAR says.

Each demo writes its runs and a report into a folder and names them at the end. Interrupted, it goes on where it stopped
when the same command is given again; --fresh begins anew.
"""


def _printable(text: str) -> str:
    """Escape the control characters of a text, so that a file cannot control the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class _Commands(TyperGroup):
    """A group of commands that turns errors the user can fix into one line on standard error."""

    def list_commands(self, ctx: Any) -> list[str]:
        # The demos come first, because a newcomer can run them.
        return sorted(super().list_commands(ctx), key=lambda name: name != "demo")

    def invoke(self, ctx: Any) -> Any:
        errors = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
        try:
            return super().invoke(ctx)
        except LogAlignError as error:
            errors.print(_printable(f"error: {error}"))
            raise typer.Exit(1) from error
        except OSError as error:
            # An error with a file's name concerns the user's disk (full, read-only). Without one it may be a bug.
            if error.filename is None:
                raise
            errors.print(_printable(f"error: {error.filename}: {error.strerror}"))
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            go_on = ": give the same command again, without --fresh, to go on where it stopped"
            errors.print(f"interrupted{go_on if ctx.invoked_subcommand == 'demo' else ''}")
            raise typer.Exit(130) from error


RUN_HELP = (
    "A run folder; a JSONL or CSV file with columns step and lar; or what TensorBoard, W&B (an offline run, an export),"
    " MLflow (a run folder, mlflow.db#RUN_ID), Transformers' Trainer (trainer_state.json), Lightning or Keras (CSV,"
    " JSON) recorded, with LAR or with a loss alone. A URL such as s3://bucket/run will do."
)

app = typer.Typer(
    cls=_Commands,
    name="logalign",
    help=INTRODUCTION,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
demo = typer.Typer(name="demo", help=DEMO_INTRODUCTION, no_args_is_help=True, rich_markup_mode="markdown")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"logalign {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for runs and report. [logalign-demos/NAME]")]
Seed = Annotated[int, typer.Option(min=0, help="Of initial weights, data and order of batches.")]
Device = Annotated[str, typer.Option(help="Any PyTorch device, such as cpu, cuda, mps.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Begin anew instead of going on from an interrupted run.")]


def _demo_folder(out: Path | None, name: str) -> Path:
    return Path("logalign-demos") / name if out is None else out


app.add_typer(demo)


@demo.command("label-noise")
def label_noise(
    out: Out = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each of the two runs.")] = 1500,
    noise: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the noisy run's labels made random.")] = 0.4,
    seed: Seed = 0,
    device: Device = "cpu",
    fresh: Fresh = False,
) -> None:
    """Train on digits, once with clean labels and once with random labels (under a minute).

    Both training losses go to zero. LAR stays flat with clean labels. It falls with wrong labels, before the held-out
    loss rises.
    """
    from logalign.demos import label_noise

    label_noise.run(
        out=_demo_folder(out, "label-noise"), steps=steps, noise=noise, seed=seed, device=device, fresh=fresh
    )


@demo.command("language-model")
def language_model(
    out: Out = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="A text file to train on; may be repeated. [Python's own sources]")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each of the two runs.")] = 700,
    unique_tokens: Annotated[int, typer.Option(min=1, help="Tokens that the second run repeats.")] = 100_000,
    seed: Seed = 0,
    device: Device = "cpu",
    fresh: Fresh = False,
) -> None:
    """Train a small GPT on fresh text and on a small repeated text (some minutes).

    The report shows how far LAR falls below the run on fresh text, and the true gap of training and held-out loss.
    """
    from logalign.demos import language_model

    language_model.run(
        out=_demo_folder(out, "language-model"),
        text=text,
        steps=steps,
        unique_tokens=unique_tokens,
        seed=seed,
        device=device,
        fresh=fresh,
    )


@demo.command("grokking")
def grokking(
    out: Out = None,
    p: Annotated[int, typer.Option(min=3, help="The modulus of the addition to be learned, a prime number.")] = 59,
    width: Annotated[int, typer.Option(min=2, help="Width of the embedding and of the last layer's input, n.")] = 64,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="With 0 the network never generalizes.")] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1500,
    seed: Seed = 0,
    device: Device = "cpu",
    fresh: Fresh = False,
) -> None:
    """Train on modular addition until the network generalizes (under two minutes).

    The effective dimension falls to the number of directions that the learned function uses.
    """
    from logalign.demos import grokking

    grokking.run(
        out=_demo_folder(out, "grokking"),
        p=p,
        width=width,
        weight_decay=weight_decay,
        steps=steps,
        seed=seed,
        device=device,
        fresh=fresh,
    )


@app.command("report")
def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help=RUN_HELP),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")] = Path("report.html"),
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN",
            help="A run of the same set-up that does not overfit, to compare with; may be given several times.",
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write each figure into this folder, too, as PNG (300 dpi) and SVG."),
    ] = None,
) -> None:
    """Draw one run, or several over each other, as one interactive HTML file that loads nothing else.

    The file shows the verdict of `logalign diagnose` first, and then its curves.
    """
    from logalign.report.run_report import write_run_report

    typer.echo(f"report: {write_run_report(runs, out, baseline=baseline, figures=figures)}")
    if figures is not None:
        typer.echo(f"figures: {figures}")


class RegimeOption(StrEnum):
    """The logic that judges a run."""

    auto = "auto"
    grokking = "grokking"
    decline = "decline"
    both = "both"


class AlignOption(StrEnum):
    """The axis of a comparison."""

    step = "step"
    tokens = "tokens"
    epoch = "epoch"


@app.command("diagnose")
def diagnose(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help=RUN_HELP,
        ),
    ],
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN",
            help="A run of the same set-up that does not overfit, best of another seed and on data that does not "
            "repeat; may be given several times.",
        ),
    ] = None,
    regime: Annotated[
        RegimeOption,
        typer.Option(
            help="grokking judges networks that fit repeated data exactly, decline all others; auto takes what fits."
        ),
    ] = RegimeOption.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as one JSON object.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print the numbers, what the verdict rests on, and its limits, too.")
    ] = False,
) -> None:
    """Print a run's verdict, since when it holds, why, and what to do.

    Exit status, for scripts:

    - 0: healthy, approaching or generalizing
    - 1: an error, with a message of one line
    - 3: overfitting, memorizing or diverged, now or earlier
    - 4: undecidable, with the reason
    """
    from logalign.diagnosis.baseline import Baseline
    from logalign.diagnosis.detector import diagnose
    from logalign.runs.remote import shown

    verdict = diagnose(run, baseline=Baseline.from_run(baseline) if baseline else None, regime=regime.value)
    if as_json:
        typer.echo(json.dumps({"run": shown(run), **verdict.record()}, indent=2, allow_nan=False))
    else:
        from logalign.report.terminal import print_verdict

        print_verdict(verdict, name=shown(run), console=Console(highlight=False), verbose=verbose)
    raise typer.Exit(verdict.exit_status)


@app.command("follow")
def follow(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run folder, a JSONL or a CSV file, or another tool's log; it need not be there yet."
        ),
    ],
    baseline: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN", help="As of diagnose: a run of the same set-up that does not overfit."),
    ] = None,
    regime: Annotated[RegimeOption, typer.Option(help="As of diagnose.")] = RegimeOption.auto,
    once: Annotated[bool, typer.Option("--once", help="Print what is there now, and exit.")] = False,
) -> None:
    """Show a run while it grows: verdict, curves, pace (full-screen on a terminal, else one line a reading).

    The command works over ssh, and on runs that another machine writes. Press ? for the keys, q to quit.
    """
    from logalign.diagnosis.baseline import Baseline
    from logalign.follow.app import follow

    reference = Baseline.from_run(baseline) if baseline else None
    raise typer.Exit(follow(run, baseline=reference, regime=regime.value, once=once))


@app.command("compare")
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help=f"Two or more runs of one task. {RUN_HELP}"),
    ],
    align: Annotated[
        AlignOption, typer.Option(help="Along what: steps do not compare where batches have other sizes.")
    ] = AlignOption.step,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the runs over each other, too, as one HTML file: the best eight."),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print a list of {run, low, high, is_sure, step, left_out, quantity, align, at}, best first; with "
            "drift and drift_error where any run has a drift.",
        ),
    ] = False,
) -> None:
    """Order runs by how well they are likely to generalize, without held-out data.

    The order follows an estimate of the held-out loss. In classifiers with short passes it follows training loss and
    LAR. All runs are judged at the last step, token or epoch that all have reached. A run is left out and named if it
    was killed early, has diverged, or lacks what the others recorded.
    """
    from logalign.diagnosis.ranking import rank
    from logalign.report.drifts import drift_records, drifts_of

    ranking = rank(runs, align=align.value)
    drifts = drifts_of(ranking)
    if as_json:
        records = ranking.records()
        for record, drift in zip(records, drift_records(drifts), strict=False):
            record.update(drift)
        typer.echo(json.dumps(records, indent=2, allow_nan=False))
    else:
        from logalign.report.terminal import print_ranking

        print_ranking(ranking, console=Console(highlight=False), drifts=drifts)
    if html is not None:
        from logalign.report.compared import write_comparison

        typer.echo(f"overlay: {write_comparison(ranking, html)}", err=as_json)


@app.command("export")
def export(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help=f"Runs, folders with run folders somewhere below them, or patterns in quotes. {RUN_HELP}",
        ),
    ],
    parquet: Annotated[Path, typer.Option(metavar="FILE", help="The Parquet file to write.")],
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first run that cannot be read, and write nothing.")
    ] = False,
) -> None:
    """Write the readings of many runs into one table, for polars, DuckDB, pandas or Spark.

    A run that cannot be read is named and left out. The exit status is then 1.
    """
    from logalign.runs.export import export

    errors = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    done = export(runs, parquet, strict=strict, told=lambda error: errors.print(_printable(f"skipped: {error}")))
    left_out = f", {len(done.skipped):,} left out" if done.skipped else ""
    typer.echo(f"export: {done.path} ({done.runs:,} runs, {done.readings:,} readings{left_out})")
    if done.skipped:
        raise typer.Exit(1)


@app.command("spectra")
def spectra(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="safetensors files, folders of Transformers or of torch.distributed.checkpoint, pickled files of "
            "tensors alone; or a folder of checkpoints with steps in their names.",
        ),
    ],
    layers: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Weights to look at, such as 'model.layers.*.down_proj'; repeatable."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every 2-D weight instead of the head alone.")] = False,
    text: Annotated[
        Path | None, typer.Option(help="A text file: measure true LAR on it, with a model that Transformers loads.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder with tokenizer and config.json. [the checkpoint's own]")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens of the text to use.")] = 16_384,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="RUN", help="Write a run folder, for `logalign report`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects, one for each checkpoint.")] = False,
) -> None:
    """Analyze the weights of checkpoints: how many directions they use, and the largest LAR that they allow.

    The command reads one matrix at a time. It builds a model only for --text.
    """
    from logalign.checkpoints.command import run

    asked = ["*"] if every else layers or "unembedding"
    run(checkpoints, layers=asked, text=text, model=model, tokens=tokens, out=out, as_json=as_json)


def main() -> None:
    """Run the command line (the entry point of the script `logalign`)."""
    app(prog_name="logalign")


if __name__ == "__main__":
    main()
