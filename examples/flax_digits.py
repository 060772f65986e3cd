"""Flax NNX: a classifier on digits, 40 % of its labels random, and LAR beside it: python examples/flax_digits.py"""

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import logalign.jax
from logalign.integrations.jax import Recorder


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(64, 256, rngs=rngs)
        self.second = nnx.Linear(256, 256, rngs=rngs)
        self.head = nnx.Linear(256, 10, rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.second(nnx.relu(self.first(x))))


def loss_of(model: Classifier, x: jax.Array, y: jax.Array):
    hidden = model.features(x)
    logits = model.head(hidden)
    sums = logalign.jax.energies(model.head.kernel.T, hidden, outputs=logits, bias=model.head.bias[...])
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), sums


@nnx.jit
def train_step(model: Classifier, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array):
    (loss, sums), gradients = nnx.value_and_grad(loss_of, has_aux=True)(model, x, y)
    optimizer.update(model, gradients)
    return loss, sums


def main() -> None:
    rng = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    labels = np.where(rng.random(len(labels)) < 0.4, rng.integers(0, 10, len(labels)), labels)
    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(2e-3, weight_decay=0.1), wrt=nnx.Param)
    with Recorder(every=10) as recorder:
        for step in range(600):
            batch = rng.integers(0, len(labels), 128)
            loss, sums = train_step(model, optimizer, images[batch], labels[batch])
            recorder.step(sums, loss=loss, epoch=(step + 1) * 128 / len(labels))
            if step % 100 == 0:
                print(f"step {step}: loss {loss:.3f}")
    for readings in list(recorder.readings)[::10]:
        print(f"step {readings.step}: LAR {readings.main.lar:.3f}, centered {readings.main.lar_centered:.3f}")
    print(f"{recorder.verdict.outcome}: {recorder.verdict.reason}")


if __name__ == "__main__":
    main()
