"""Classifiers of clean digits, which do not overfit: how often is there a false alarm?

    python -m benchmarks.clean_digits                   four set-ups, 20 seeds of each (20 minutes on a core)
    python -m benchmarks.clean_digits mlp --seeds 5     some of mlp, cnn, lightning, flax
    python -m benchmarks.clean_digits --write           and put the table into docs/benchmark.md

A plain loop with an MLP and with a CNN, Lightning, and Flax NNX: 1,280 of scikit-learn's digits, Adam at 1e-3, batches
of 32, 30 passes. logalign gets what the README's lines give it, and in Flax the losses of the rows and their ids.
Held-out images are looked at beside it, once a pass, and reach no verdict. Regret is the held-out loss at the first
alarm less the lowest. The seeds begin at 100: on some of the first the rule was mended.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import logalign
from benchmarks.pages import markdown, put, show

TRAINED, BATCH, PASSES, RATE = 1280, 32, 30, 1e-3
FIRST_SEED = 100
PER_PASS = TRAINED // BATCH
ALARMS = ("approaching", "overfitting")
PAGE = Path(__file__).parent.parent / "docs" / "benchmark.md"


class Digits(NamedTuple):
    """Images [count, 64] and labels, to train on and held out."""

    images: Tensor
    labels: Tensor
    other_images: Tensor
    other_labels: Tensor


class Course(NamedTuple):
    """What a training gave: the outcome at each reading, and held-out loss and accuracy after each pass."""

    outcomes: list[tuple[int, str]]
    held_out: list[tuple[float, float]]

    @property
    def alarm(self) -> int | None:
        """The step of the first alarm."""
        return next((step for step, outcome in self.outcomes if outcome in ALARMS), None)

    @property
    def regret(self) -> float:
        """Held-out loss at the first alarm, or at the end, less the lowest."""
        losses = np.array([loss for loss, _ in self.held_out])
        at = PASSES if self.alarm is None else (self.alarm + 1) / PER_PASS
        return float(np.interp(at, np.arange(1, PASSES + 1), losses) - losses.min())


def digits(seed: int) -> Digits:
    """Another split for each seed."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x, y = torch.tensor(images[order] / 16, dtype=torch.float32), torch.tensor(labels[order])
    return Digits(x[:TRAINED], y[:TRAINED], x[TRAINED:], y[TRAINED:])


def orders(seed: int) -> Iterator[Tensor]:
    """The images of every step, shuffled anew in every pass."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(PASSES):
        yield from torch.randperm(TRAINED, generator=generator).reshape(-1, BATCH)


def mlp() -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def cnn() -> nn.Module:
    """Two convolutions."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def scores(model: nn.Module, given: Digits) -> tuple[float, float]:
    """Held-out loss and accuracy."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(given.other_images)
    model.train(was_training)
    right = float((logits.argmax(-1) == given.other_labels).float().mean())
    return float(F.cross_entropy(logits, given.other_labels)), right


def note(step: int, monitor: Any, course: Course, measure: Callable[[], tuple[float, float]]) -> None:
    """Write down what stands after a step."""
    if monitor.readings and monitor.readings[-1].step == step:
        course.outcomes.append((step, monitor.verdict.outcome))
    if (step + 1) % PER_PASS == 0:
        course.held_out.append(measure())


def loop(model_of: Callable[[], nn.Module], seed: int) -> Course:
    """A plain loop."""
    torch.manual_seed(seed)
    given, course, model = digits(seed), Course([], []), model_of()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    with logalign.watch(model) as monitor:
        for step, rows in enumerate(orders(seed)):
            loss = F.cross_entropy(model(given.images[rows]), given.labels[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss=loss)
            note(step, monitor, course, lambda: scores(model, given))
    return course


def lightning(seed: int) -> Course:
    """Lightning's Trainer, with the MLP."""
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader, TensorDataset

    from logalign.integrations.lightning import LogAlignCallback

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = mlp()

        def forward(self, images: Tensor) -> Any:
            return self.model(images)

        def training_step(self, batch: Any, index: int) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self(images), labels)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=RATE)

    class Notes(pl.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            note(trainer.global_step - 1, callback.monitor, course, lambda: scores(module, given))

    pl.seed_everything(seed, verbose=False)
    given, course, callback, module = digits(seed), Course([], []), LogAlignCallback(), Module()
    loader = DataLoader(TensorDataset(given.images, given.labels), batch_size=BATCH, shuffle=True)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=PASSES, accelerator="cpu", callbacks=[callback, Notes()], enable_model_summary=False, **quiet
    )
    trainer.fit(module, loader)
    return course


def flax(seed: int) -> Course:
    """Flax NNX, with the same MLP."""
    import jax
    import optax
    from flax import nnx

    import logalign.jax
    from logalign.integrations.jax import Recorder

    class Classifier(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = nnx.Linear(64, 128, rngs=rngs)
            self.second = nnx.Linear(128, 128, rngs=rngs)
            self.head = nnx.Linear(128, 10, rngs=rngs)

        def features(self, x: Any) -> Any:
            return nnx.relu(self.second(nnx.relu(self.first(x))))

    def losses_of(model: Classifier, x: Any, y: Any) -> Any:
        hidden = model.features(x)
        logits = model.head(hidden)
        sums = logalign.jax.energies(model.head.kernel.T, hidden, outputs=logits, bias=model.head.bias[...])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y), (sums, logits)

    @nnx.jit
    def train_step(model: Classifier, optimizer: Any, x: Any, y: Any) -> Any:
        def mean_loss(model: Classifier) -> Any:
            losses, (sums, _) = losses_of(model, x, y)
            return losses.mean(), (losses, sums)

        (loss, (losses, sums)), gradients = nnx.value_and_grad(mean_loss, has_aux=True)(model)
        optimizer.update(model, gradients)
        return loss, losses, sums

    @nnx.jit
    def held_out(model: Classifier, x: Any, y: Any) -> Any:
        losses, (_, logits) = losses_of(model, x, y)
        return losses.mean(), (logits.argmax(-1) == y).mean()

    given, course, model = digits(seed), Course([], []), Classifier(nnx.Rngs(seed))
    x, y, other_x, other_y = (jax.numpy.asarray(each.numpy()) for each in given)
    optimizer = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.Param)
    with Recorder() as recorder:
        for step, rows in enumerate(orders(seed)):
            ids = rows.numpy()
            loss, losses, sums = train_step(model, optimizer, x[ids], y[ids])
            recorder.step(sums, loss=loss, losses=losses, samples=ids)
            note(step, recorder, course, lambda: tuple(map(float, held_out(model, other_x, other_y))))  # type: ignore[arg-type,return-value]
    return course


WAYS: dict[str, tuple[str, Callable[[int], Course]]] = {
    "mlp": ("a plain loop, MLP", lambda seed: loop(mlp, seed)),
    "cnn": ("a plain loop, CNN", lambda seed: loop(cnn, seed)),
    "lightning": ("Lightning, MLP", lightning),
    "flax": ("Flax NNX, MLP", flax),
}


def row_of(words: str, courses: list[Course]) -> dict[str, str]:
    """One line of the table."""
    alarmed = [course for course in courses if course.alarm is not None]
    ends = sorted({course.outcomes[-1][1] for course in courses})
    return {
        "": words,
        "without an alarm": f"{len(courses) - len(alarmed)} of {len(courses)}",
        "regret of the alarms": ", ".join(f"{course.regret:.3f}" for course in alarmed) or "–",
        "at the end": ", ".join(f"{end} {sum(c.outcomes[-1][1] == end for c in courses)}" for end in ends),
        "held-out accuracy at the end": f"{np.mean([course.held_out[-1][1] for course in courses]):.3f}",
        "held-out loss at the end above its lowest, median": f"{np.median([_rise(course) for course in courses]):.3f}",
    }


def _rise(course: Course) -> float:
    losses = [loss for loss, _ in course.held_out]
    return losses[-1] - min(losses)


def main() -> None:
    """Train, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", choices=[[], *WAYS], help="which of them; all by default")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmark.md")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.ways or WAYS:
        words, train = WAYS[name]
        rows.append(row_of(words, [train(seed) for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds)]))
        print(rows[-1], flush=True)
    show(rows, width=160)
    if arguments.write:
        put(PAGE, "clean-digits", markdown(rows))


if __name__ == "__main__":
    main()
