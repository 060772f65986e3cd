"""The README's loop, and the same training in three frameworks: is the verdict confirmed by the held-out loss?

    python -m benchmarks.first_alarm                  all of them, one after the other (10 minutes on a core)
    python -m benchmarks.first_alarm loop trainer     some of loop, trainer, lightning, jax
    python -m benchmarks.first_alarm --write          and put the table into docs/revisits.md

A small GPT passes 15 times over 100,000 tokens of text. logalign gets what the README's five lines give it: no epoch,
no ids, no held-out data. The held-out loss is measured beside it, twice a pass, and is used for regret alone.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import logalign
from benchmarks.pages import markdown, put, show
from benchmarks.revisits import PAGE
from logalign.demos.corpus import read_documents, tokenize
from logalign.demos.gpt import GPT

TOKENS, PASSES, BATCH, LENGTH, WIDTH, LAYERS, HEADS = 100_000, 15, 16, 64, 96, 2, 4
RATE, DECAY = 1e-3, 0.1
HELD_OUT = 128


class Data(NamedTuple):
    """Rows of tokens [rows, LENGTH + 1], to train on and held out."""

    train: Tensor
    held_out: Tensor
    vocabulary: int

    @property
    def per_pass(self) -> int:
        """Steps of a pass."""
        return len(self.train) // BATCH


class Course(NamedTuple):
    """What a training gave: held-out losses, and the outcome at each reading."""

    held_out: list[tuple[int, float]]
    outcomes: list[tuple[int, str]]
    drifts: list[tuple[int, bool, str]]  # whether it is above two of its standard errors, and in words


def data() -> Data:
    """Text that every machine has."""
    corpus = tokenize(read_documents())

    def rows(tokens: Any, count: int) -> Tensor:
        starts = torch.arange(count)[:, None] * LENGTH
        return torch.from_numpy(np.asarray(tokens)).long()[starts + torch.arange(LENGTH + 1)]

    return Data(rows(corpus.train, TOKENS // LENGTH), rows(corpus.held_out, HELD_OUT), corpus.vocabulary)


def order(size: int, passes: int = PASSES) -> Any:
    """Rows of every step: shuffled anew in every pass."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(passes):
        yield from torch.randperm(size, generator=generator)[: size // BATCH * BATCH].reshape(-1, BATCH)


def loss_of(logits: Tensor, rows: Tensor) -> Tensor:
    """Cross entropy of the next tokens."""
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def held_out_loss(model: torch.nn.Module, rows: Tensor) -> float:
    """Mean loss on rows that nothing is trained on."""
    training = model.training
    model.eval()
    with torch.no_grad():
        loss = loss_of(model(rows[:, :-1]), rows)
    model.train(training)
    return float(loss)


def gpt(given: Data) -> GPT:
    """The network, at the start."""
    torch.manual_seed(0)
    return GPT(vocabulary=given.vocabulary, width=WIDTH, layers=LAYERS, heads=HEADS, context=LENGTH)


def loop(given: Data) -> Course:
    """The loop of the README."""
    model = gpt(given)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    batches = ((given.train[rows, :-1], given.train[rows, 1:]) for rows in order(len(given.train)))

    def loss_function(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    held_out, outcomes, step = [], [], 0
    monitor = logalign.watch(model)
    for inputs, targets in batches:
        loss = loss_function(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step(loss=loss)
        step = note(step, given, monitor, outcomes, held_out, lambda: held_out_loss(model, given.held_out))
    monitor.close()
    return Course(held_out, outcomes, drifts_of(monitor))


def note(
    step: int,
    given: Data,
    monitor: Any,
    outcomes: list[tuple[int, str]],
    held_out: list[tuple[int, float]],
    measure: Callable[[], float],
) -> int:
    """Note the outcome of a step, and twice a pass the held-out loss; the next step."""
    if monitor.readings and (not outcomes or monitor.readings[-1].step != outcomes[-1][0]):
        outcomes.append((monitor.readings[-1].step, monitor.verdict.outcome))
    if step % (given.per_pass // 2) == 0:
        held_out.append((step, measure()))
    return step + 1


def drifts_of(monitor: Any) -> list[tuple[int, bool, str]]:
    """Drift at every reading that has one."""
    mains = [readings.main for readings in monitor.readings]
    return [
        (each.step, each.drift > 2 * each.drift_error, f"{each.drift:+.2f} ± {each.drift_error:.2f}")
        for each in mains
        if each.drift is not None
    ]


def trainer(given: Data) -> Course:
    """The Transformers Trainer on a Llama of that size."""
    from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from logalign.integrations.transformers import LogAlignCallback

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=given.vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    model, callback = LlamaForCausalLM(config), LogAlignCallback()
    held_out: list[tuple[int, float]] = []
    outcomes: list[tuple[int, str]] = []

    def measure() -> float:
        model.eval()
        with torch.no_grad():
            loss = model(input_ids=given.held_out[:, :-1], labels=given.held_out[:, :-1]).loss
        model.train()
        return float(loss)

    class Notes(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            note(state.global_step - 1, given, callback.monitor, outcomes, held_out, measure)

    rows = [{"input_ids": row[:-1], "labels": row[:-1]} for row in given.train]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            num_train_epochs=PASSES,
            learning_rate=RATE,
            weight_decay=DECAY,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        trained = Trainer(model, arguments, train_dataset=rows, callbacks=[callback, Notes()])
        trained.remove_callback(PrinterCallback)
        trained.train()
    return Course(held_out, outcomes, drifts_of(callback.monitor))


def lightning(given: Data) -> Course:
    """Lightning's Trainer."""
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from logalign.integrations.lightning import LogAlignCallback

    held_out: list[tuple[int, float]] = []
    outcomes: list[tuple[int, str]] = []

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = gpt(given)

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.model(tokens)
            return logits

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return loss_of(self(batch[:, :-1]), batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=DECAY)

    class Notes(pl.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            note(
                trainer.global_step - 1,
                given,
                callback.monitor,
                outcomes,
                held_out,
                lambda: held_out_loss(module, given.held_out),
            )

    callback, module = LogAlignCallback(module="model"), Module()
    loader = DataLoader(given.train, batch_size=BATCH, shuffle=True, drop_last=True)  # type: ignore[arg-type]
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    fit = pl.Trainer(
        max_epochs=PASSES, accelerator="cpu", callbacks=[callback, Notes()], enable_model_summary=False, **quiet
    )
    fit.fit(module, loader)
    return Course(held_out, outcomes, drifts_of(callback.monitor))


def jax(given: Data) -> Course:
    """A GPT in plain JAX, with optax; losses of the rows and their tokens go to `HookRecorder.step()`."""
    import jax as J
    import jax.numpy as jnp
    import optax

    from logalign.integrations.jax import Recorder
    from logalign.jax import energies

    def dense(key: Any, rows: int, columns: int) -> Any:
        return 0.02 * J.random.normal(key, (rows, columns))

    keys = iter(J.random.split(J.random.key(0), 64))
    parameters: dict[str, Any] = {
        "tokens": dense(next(keys), given.vocabulary, WIDTH),
        "places": dense(next(keys), LENGTH, WIDTH),
        "head": dense(next(keys), given.vocabulary, WIDTH),
        "blocks": [
            {
                "qkv": dense(next(keys), WIDTH, 3 * WIDTH),
                "out": dense(next(keys), WIDTH, WIDTH),
                "up": dense(next(keys), WIDTH, 4 * WIDTH),
                "down": dense(next(keys), 4 * WIDTH, WIDTH),
            }
            for _ in range(LAYERS)
        ],
    }

    def norm(x: Any) -> Any:
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)

    def forward(parameters: Any, tokens: Any) -> tuple[Any, Any]:
        """Hidden states [B, T, n] and logits [B, T, m]."""
        x = parameters["tokens"][tokens] + parameters["places"]
        for block in parameters["blocks"]:
            q, k, v = jnp.split((norm(x) @ block["qkv"]).reshape(*x.shape[:2], HEADS, -1), 3, axis=-1)
            x += J.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ block["out"]
            x += J.nn.gelu(norm(x) @ block["up"]) @ block["down"]
        x = norm(x)
        return x, x @ parameters["head"].T

    def losses_of(parameters: Any, rows: Any) -> tuple[Any, Any]:
        """The mean loss of each row, and the head's energies."""
        hidden, logits = forward(parameters, rows[:, :-1])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean(1)
        return each, energies(parameters["head"], hidden, outputs=logits)

    optimizer = optax.adamw(RATE, weight_decay=DECAY)

    @J.jit
    def train_step(parameters: Any, state: Any, rows: Any) -> Any:
        def mean_loss(parameters: Any) -> Any:
            each, sums = losses_of(parameters, rows)
            return each.mean(), (each, sums)

        (loss, (each, sums)), gradient = J.value_and_grad(mean_loss, has_aux=True)(parameters)
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss, each, sums

    held_out_mean = J.jit(lambda parameters, rows: losses_of(parameters, rows)[0].mean())
    state = optimizer.init(parameters)
    train, held_out_rows = jnp.asarray(given.train.numpy()), jnp.asarray(given.held_out.numpy())
    held_out: list[tuple[int, float]] = []
    outcomes: list[tuple[int, str]] = []
    step = 0
    with Recorder() as recorder:
        for rows in order(len(given.train)):
            batch = train[rows.numpy()]
            parameters, state, loss, losses, sums = train_step(parameters, state, batch)
            recorder.step(sums, loss=loss, losses=losses, samples=batch)
            measure = lambda: float(held_out_mean(parameters, held_out_rows))  # noqa: B023, E731
            step = note(step, given, recorder, outcomes, held_out, measure)
    return Course(held_out, outcomes, drifts_of(recorder))


def row_of(words: str, course: Course, per_pass: int) -> dict[str, str]:
    """When the verdict came, and what following it costs."""
    steps, losses = np.array(course.held_out).T
    row = {"": words, "held-out loss lowest at pass": f"{steps[losses.argmin()] / per_pass:.1f}"}
    alarms = {
        "drift above 2 errors": next((step for step, rises, _ in course.drifts if rises), None),
        "approaching": next((step for step, said in course.outcomes if said == "approaching"), None),
        "overfitting": next((step for step, said in course.outcomes if said == "overfitting"), None),
    }
    for name, step in alarms.items():
        regret = 0.0 if step is None else float(np.interp(step, steps, losses) - losses.min())
        row[f"{name}, at pass (regret)"] = "none" if step is None else f"{step / per_pass:.1f} ({regret:.3f})"
    row["at the end: regret"] = f"{losses[-1] - losses.min():.3f}"
    row["outcome"] = course.outcomes[-1][1]
    row["drift"] = course.drifts[-1][2] if course.drifts else "none"
    return row


WAYS: dict[str, tuple[str, Callable[[Data], Course]]] = {
    "loop": ("the README's loop", loop),
    "trainer": ("Transformers Trainer", trainer),
    "lightning": ("Lightning", lightning),
    "jax": ("JAX, optax", jax),
}


def main() -> None:
    """Train, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", choices=[[], *WAYS], help="which of them; all by default")
    parser.add_argument("--write", action="store_true", help="put the table into docs/revisits.md")
    arguments = parser.parse_args()
    given, rows = data(), []
    for name in arguments.ways or WAYS:
        words, train = WAYS[name]
        rows.append(row_of(words, train(given), given.per_pass))
        print(rows[-1], flush=True)
    show(rows, width=160)
    if arguments.write:
        put(PAGE, "first-alarm", markdown(rows))


if __name__ == "__main__":
    main()
