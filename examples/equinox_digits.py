"""Equinox: a classifier on digits, 40 % of its labels random, and LAR beside it: python examples/equinox_digits.py"""

import equinox as eqx
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import logalign.jax
from logalign.integrations.jax import Recorder


class Classifier(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.Linear(64, 256, key=keys[0])
        self.second = eqx.nn.Linear(256, 256, key=keys[1])
        self.head = eqx.nn.Linear(256, 10, key=keys[2])

    def features(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.second(jax.nn.relu(self.first(x))))


optimizer = optax.adamw(2e-3, weight_decay=0.1)


def loss_of(model: Classifier, x: jax.Array, y: jax.Array):
    hidden = jax.vmap(model.features)(x)
    logits = jax.vmap(model.head)(hidden)
    sums = logalign.jax.energies(model.head.weight, hidden, outputs=logits, bias=model.head.bias)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), sums


@eqx.filter_jit
def train_step(model: Classifier, state: optax.OptState, x: jax.Array, y: jax.Array):
    (loss, sums), gradients = eqx.filter_value_and_grad(loss_of, has_aux=True)(model, x, y)
    updates, state = optimizer.update(gradients, state, model)
    return eqx.apply_updates(model, updates), state, loss, sums


def main() -> None:
    rng = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    labels = np.where(rng.random(len(labels)) < 0.4, rng.integers(0, 10, len(labels)), labels)
    model = Classifier(jax.random.key(0))
    state = optimizer.init(eqx.filter(model, eqx.is_array))
    with Recorder(every=10) as recorder:
        for step in range(600):
            batch = rng.integers(0, len(labels), 128)
            model, state, loss, sums = train_step(model, state, images[batch], labels[batch])
            recorder.step(sums, loss=loss, epoch=(step + 1) * 128 / len(labels))
            if step % 100 == 0:
                print(f"step {step}: loss {loss:.3f}")
    for readings in list(recorder.readings)[::10]:
        print(f"step {readings.step}: LAR {readings.main.lar:.3f}, centered {readings.main.lar_centered:.3f}")
    print(f"{recorder.verdict.outcome}: {recorder.verdict.reason}")


if __name__ == "__main__":
    main()
