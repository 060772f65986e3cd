"""Pruning Optuna's trials by logalign's verdict, without a validation set, against Optuna's pruners with one.

    python -m benchmarks.optuna_pruning            the scored studies: seeds 0 to 4, about 5 minutes on one core
    python -m benchmarks.optuna_pruning --choose   what the patience was chosen by: seeds 100 to 103, no validation
    python -m benchmarks.optuna_pruning --write    and put the numbers into benchmarks/results/optuna_pruning.json

Task: scikit-learn's digits, of which 1200 are given to the study, a share of their labels drawn at random, and 597 with
right labels test the trial that the study chose. An MLP with two hidden layers; the search is for width, learning rate,
weight decay, dropout and the number of steps. Those who validate set a quarter of the 1200 aside, wrong labels and
all, and train on the rest.

Method: the sampler is random, so that every contestant is offered the same trials, and a training without pruning is
recorded once and replayed to all of them: what a pruner sees is what it would have seen in the training itself, and
what it saves is counted in the steps and CPU seconds after it said so. Of the seconds of validating and of monitoring a
contestant is charged what it needs. With a sampler that learns from results, contestants would be offered different
trials, and luck would be part of the difference.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import logalign
from logalign.integrations.optuna import ATTRIBUTE, LogAlignPruner, held_out_loss, report

RESULTS = Path(__file__).parent / "results" / "optuna_pruning.json"
NOISE = (0.0, 0.2, 0.4)
SCORED, CHOOSING = range(5), range(100, 104)
TRIALS = 20
GIVEN, SET_ASIDE, BATCH, EVERY, MOST_STEPS = 1200, 300, 64, 4, 600
LAST_READINGS = 6
"""Readings whose mean loss is a trial's training loss."""


@dataclass(frozen=True)
class Moment:
    """What a contestant can see after a monitored step, or after a pass: the others are None."""

    steps: int
    verdict: Mapping[str, Any] | None = None
    passes: int | None = None
    accuracy: float | None = None
    training_seconds: float = 0.0
    monitor_seconds: float = 0.0
    validation_seconds: float = 0.0


@dataclass(frozen=True)
class Recorded:
    """A whole training."""

    moments: list[Moment]
    training_loss: float
    held_out_loss: float
    validation_accuracy: float | None
    test_accuracy: float


@dataclass(frozen=True)
class Contestant:
    """A way to run a study: which value decides, and what prunes."""

    name: str
    value: Callable[[Recorded], float | None]
    pruner: Callable[[], BasePruner]
    direction: str = "minimize"
    validates: bool = False
    watches: bool = False
    most_passes: int | None = None


@dataclass
class Stored:
    """Stands for a trial while a training is recorded: it keeps what `report()` stores."""

    user_attrs: dict[str, Any] = field(default_factory=dict)

    def set_user_attr(self, key: str, value: Any) -> None:
        """Keep it."""
        self.user_attrs[key] = value


def plain(name: str, pruner: Callable[[], BasePruner] = NopPruner, **options: Any) -> Contestant:
    """A contestant without a validation set, whose value is the training loss."""
    return Contestant(name, lambda found: found.training_loss, pruner, **options)


def validated(name: str, pruner: Callable[[], BasePruner] = NopPruner, **options: Any) -> Contestant:
    """A contestant with a validation set, whose value is the accuracy on it."""
    return Contestant(
        name, lambda found: found.validation_accuracy, pruner, direction="maximize", validates=True, **options
    )


def hyperband() -> BasePruner:
    """Hyperband over passes, with the most that a trial can have."""
    return HyperbandPruner(min_resource=1, max_resource=MOST_STEPS // ((GIVEN - SET_ASIDE) // BATCH))


CONTESTANTS = [
    plain("training loss, no pruning"),
    plain("training loss, logalign prunes", LogAlignPruner, watches=True),
    Contestant("estimated held-out loss, no pruning", lambda found: found.held_out_loss, NopPruner, watches=True),
    Contestant(
        "estimated held-out loss, logalign prunes", lambda found: found.held_out_loss, LogAlignPruner, watches=True
    ),
    plain("training loss, pruned after 15 passes", most_passes=15),
    validated("validation, no pruning"),
    validated("validation, logalign prunes", LogAlignPruner, watches=True),
    validated("validation, MedianPruner", MedianPruner),
    validated("validation, SuccessiveHalving", SuccessiveHalvingPruner),
    validated("validation, Hyperband", hyperband),
    validated("validation, logalign around MedianPruner", lambda: LogAlignPruner(MedianPruner()), watches=True),
]
PATIENCES = (1, 3, 5, 8, 12, 16, 20, 30)


def choices() -> list[Contestant]:
    """Contestants of `--choose`: several patiences, and several limits for the control that only counts passes."""
    return [
        plain("no pruning"),
        *(
            plain(f"patience {each}", lambda each=each: LogAlignPruner(patience=each), watches=True)
            for each in PATIENCES
        ),
        *(plain(f"pruned after {passes} passes", most_passes=passes) for passes in (12, 15, 18, 22)),
    ]


def main() -> None:
    """Run the studies, print the tables, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", help="compare patiences on seeds that are not scored")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("logalign").addHandler(logging.NullHandler())
    began = time.perf_counter()
    contestants, seeds = (choices(), CHOOSING) if arguments.choose else (CONTESTANTS, SCORED)
    rows = [
        {"noise": noise, "seed": seed, "contestant": contestant.name, **run_study(contestant, noise, seed)}
        for noise in NOISE
        for seed in seeds
        for contestant in contestants
    ]
    console = Console(width=130)
    for noise in NOISE:
        console.print(table(noise, [row for row in rows if row["noise"] == noise], contestants))
    seconds = time.perf_counter() - began
    console.print(f"{len(rows)} studies of {TRIALS} trials in {seconds:.0f} s")
    if arguments.write and not arguments.choose:
        RESULTS.parent.mkdir(exist_ok=True)
        header = {
            "command": "python -m benchmarks.optuna_pruning --write",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": {"optuna": optuna.__version__, "torch": torch.__version__, "python": sys.version.split()[0]},
            "seconds": round(seconds),
        }
        lines = ",\n".join("    " + json.dumps(row, allow_nan=False) for row in rows)
        text = json.dumps(header, indent=2)[:-2] + ',\n  "studies": [\n' + lines + "\n  ]\n}\n"
        RESULTS.write_text(text, encoding="utf-8")
        console.print(f"written: {RESULTS}")


def run_study(contestant: Contestant, noise: float, seed: int) -> dict[str, Any]:
    """One study: the share of steps that was saved, CPU seconds, and the test accuracy of the best trial."""
    ran, offered, seconds = 0, 0, 0.0
    tested: dict[int, float] = {}

    def objective(trial: optuna.Trial) -> float | None:
        nonlocal ran, offered, seconds
        settings = {
            "width": trial.suggest_int("width", 32, 256, log=True),
            "lr": trial.suggest_float("lr", 3e-4, 2e-2, log=True),
            "weight_decay": trial.suggest_float("weight_decay", 1e-3, 5.0, log=True),
            "dropout": trial.suggest_float("dropout", 0.0, 0.6),
            "steps": trial.suggest_int("steps", 100, MOST_STEPS),
        }
        found = training(noise, seed, trial.number, contestant.validates, tuple(settings.items()))
        offered += found.moments[-1].steps
        for moment in found.moments:
            if is_pruned(contestant, trial, moment):
                ran, seconds = ran + moment.steps, seconds + cost(contestant, moment)
                raise optuna.TrialPruned
        ran, seconds = ran + found.moments[-1].steps, seconds + cost(contestant, found.moments[-1])
        tested[trial.number] = found.test_accuracy
        return contestant.value(found)

    study = optuna.create_study(
        study_name=f"digits-{noise}-{seed}",  # Hyperband sorts trials into brackets by it
        sampler=optuna.samplers.RandomSampler(seed=seed),
        pruner=contestant.pruner(),
        direction=contestant.direction,
    )
    study.optimize(objective, n_trials=TRIALS)
    return {
        "saved": round(1 - ran / offered, 4),
        "steps": ran,
        "seconds": round(seconds, 2),
        "pruned": TRIALS - len(tested),
        "best_kept": round(max(tested.values()), 4),
        "test_accuracy": round(tested[study.best_trial.number], 4),
    }


def is_pruned(contestant: Contestant, trial: optuna.Trial, moment: Moment) -> bool:
    """Show the contestant what it may see, and ask its pruner."""
    if contestant.watches and moment.verdict is not None:
        trial.set_user_attr(ATTRIBUTE, moment.verdict)
    elif contestant.validates and moment.accuracy is not None and moment.passes is not None:
        trial.report(moment.accuracy, moment.passes)
    elif contestant.most_passes is not None and moment.passes is not None:
        return moment.passes > contestant.most_passes
    else:
        return False
    return trial.should_prune()


def cost(contestant: Contestant, moment: Moment) -> float:
    """Seconds of training until then, of which validating and monitoring only those who do it."""
    return (
        moment.training_seconds
        + contestant.validates * moment.validation_seconds
        + contestant.watches * moment.monitor_seconds
    )


@cache
def training(
    noise: float, seed: int, number: int, validates: bool, settings: tuple[tuple[str, float], ...]
) -> Recorded:
    """Train once, and record all that any contestant may see."""
    chosen = dict(settings)
    inputs, labels, test_inputs, test_labels = data(noise, seed)
    aside = SET_ASIDE if validates else 0
    held_inputs, held_labels, inputs, labels = inputs[:aside], labels[:aside], inputs[aside:], labels[aside:]
    torch.manual_seed(1000 * seed + number)
    model = network(int(chosen["width"]), chosen["dropout"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen["lr"], weight_decay=chosen["weight_decay"])
    a_pass, steps = len(labels) // BATCH, int(chosen["steps"])
    moments: list[Moment] = []
    in_training = in_monitor = in_validation = 0.0
    stored = Stored()
    with logalign.watch(model, every=EVERY) as monitor:
        for step in range(steps):
            began = time.process_time()
            if step % a_pass == 0:
                order = torch.randperm(len(labels))
            batch = order[step % a_pass * BATCH :][:BATCH]
            loss = F.cross_entropy(model(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            trained = time.process_time()
            taken = monitor.step(loss=loss, lr=chosen["lr"], epoch=step / a_pass)
            if taken is not None:
                report(stored, monitor)  # type: ignore[arg-type]
            in_training, in_monitor = in_training + trained - began, in_monitor + time.process_time() - trained
            clocks = {"training_seconds": in_training, "monitor_seconds": in_monitor}
            ends_pass = (step + 1) % a_pass == 0
            accuracy = None
            if validates and (ends_pass or step == steps - 1):
                began = time.process_time()
                accuracy = accuracy_of(model, held_inputs, held_labels)
                in_validation += time.process_time() - began
            if taken is not None:
                verdict = dict(stored.user_attrs[ATTRIBUTE])
                moments.append(Moment(step + 1, verdict=verdict, validation_seconds=in_validation, **clocks))
            if ends_pass:
                passes = (step + 1) // a_pass
                moments.append(
                    Moment(step + 1, passes=passes, accuracy=accuracy, validation_seconds=in_validation, **clocks)
                )
        moments.append(Moment(steps, validation_seconds=in_validation, **clocks))
        losses = [each.main.loss_mean for each in monitor.readings]
        return Recorded(
            moments=moments,
            training_loss=statistics.fmean(losses[-LAST_READINGS:]),
            held_out_loss=held_out_loss(monitor),
            validation_accuracy=accuracy,
            test_accuracy=accuracy_of(model, test_inputs, test_labels),
        )


def data(noise: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and labels that the study is given, a share of the labels drawn at random, and those of the test."""
    digits = load_digits()
    inputs = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    given, test = order[:GIVEN], order[GIVEN:]
    noisy = labels[given].clone()
    drawn = torch.randint(0, 10, (GIVEN,), generator=generator)
    wrong = torch.rand(GIVEN, generator=generator) < noise
    noisy[wrong] = drawn[wrong]
    return inputs[given], noisy, inputs[test], labels[test]


def network(width: int, dropout: float) -> nn.Module:
    """An MLP 64-width-width-10."""
    return nn.Sequential(
        nn.Linear(64, width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(width, 10),
    )


@torch.no_grad()
def accuracy_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    model.eval()
    found = float((model(inputs).argmax(1) == labels).float().mean())
    model.train()
    return found


def table(noise: float, rows: list[dict[str, Any]], contestants: list[Contestant]) -> Table:
    """Means over seeds; of the test accuracy also the standard deviation, and the difference from the reference."""
    reference = "validation, no pruning" if any(each.validates for each in contestants) else contestants[0].name
    by_seed = {row["seed"]: row["test_accuracy"] for row in rows if row["contestant"] == reference}
    found = Table(
        "contestant",
        "pruned",
        "steps saved",
        "CPU seconds",
        "test accuracy",
        f"difference from\n{reference!r}",
        title=f"{noise:.0%} random labels",
    )
    for contestant in contestants:
        own = [row for row in rows if row["contestant"] == contestant.name]
        accuracies = [row["test_accuracy"] for row in own]
        differences = [row["test_accuracy"] - by_seed[row["seed"]] for row in own]
        found.add_row(
            contestant.name,
            f"{statistics.fmean(row['pruned'] for row in own):.1f}",
            f"{statistics.fmean(row['saved'] for row in own):.0%}",
            f"{statistics.fmean(row['seconds'] for row in own):.1f}",
            f"{statistics.fmean(accuracies):.3f} ± {statistics.stdev(accuracies):.3f}",
            f"{statistics.fmean(differences):+.3f} ({min(differences):+.3f} to {max(differences):+.3f})",
        )
    return found


if __name__ == "__main__":
    main()
