"""Plain JAX and Optax: digits, 40 % random labels; LAR and drift every tenth step: python examples/optax_digits.py"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import logalign.jax
from logalign.integrations.jax import Recorder

optimizer = optax.adamw(2e-3, weight_decay=0.1)


def initial_parameters(key: jax.Array) -> dict[str, jax.Array]:
    widths = {"first": (64, 256), "second": (256, 256), "head": (256, 10)}
    keys = jax.random.split(key, len(widths))
    return {
        name: jax.random.normal(each, shape) / shape[0] ** 0.5
        for each, (name, shape) in zip(keys, widths.items(), strict=True)
    }


def loss_of(parameters: dict[str, jax.Array], x: jax.Array, y: jax.Array, now: bool):
    hidden = jax.nn.relu(jax.nn.relu(x @ parameters["first"]) @ parameters["second"])
    logits = hidden @ parameters["head"]
    sums = logalign.jax.energies(parameters["head"].T, hidden, outputs=logits, when=now)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean(), (sums, losses)


@jax.jit
def train_step(parameters: dict[str, jax.Array], state: optax.OptState, x: jax.Array, y: jax.Array, now: bool):
    (loss, (sums, losses)), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters, x, y, now)
    updates, state = optimizer.update(gradients, state, parameters)
    return optax.apply_updates(parameters, updates), state, loss, sums, losses


def main() -> None:
    rng = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images / 16, jnp.float32)
    labels = np.where(rng.random(len(labels)) < 0.4, rng.integers(0, 10, len(labels)), labels)
    parameters = initial_parameters(jax.random.key(0))
    state = optimizer.init(parameters)
    with Recorder(every=10) as recorder:
        for step in range(600):
            if step % 14 == 0:
                order = rng.permutation(len(labels))
            batch = order[step % 14 * 128 :][:128]
            now = recorder.next_is_monitored
            parameters, state, loss, sums, losses = train_step(parameters, state, images[batch], labels[batch], now)
            recorder.step(sums, loss=loss, losses=losses, samples=batch, epoch=(step + 1) * 128 / len(labels))
            if step % 100 == 0:
                print(f"step {step}: loss {loss:.3f}")
    for readings in list(recorder.readings)[::10]:
        reading = readings.main
        drift = reading.drift_reason if reading.drift is None else f"{reading.drift:.3f} +- {reading.drift_error:.3f}"
        print(f"step {reading.step}: LAR {reading.lar:.3f}, centered {reading.lar_centered:.3f}, drift {drift}")
    print(f"{recorder.verdict.outcome}: {recorder.verdict.reason}")


if __name__ == "__main__":
    main()
