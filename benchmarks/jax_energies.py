"""What `logalign.jax.energies` adds to a jitted training step on this machine: python -m benchmarks.jax_energies

A two-layer network with a head of width 256 and vocabulary 32,768 on 1,024 tokens, AdamW by Optax. The ways take turns,
step by step, so that whatever else runs on the machine slows all of them alike.
"""

from __future__ import annotations

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from logalign.integrations.jax import Recorder
from logalign.jax import energies

WIDTH, VOCABULARY, TOKENS, ROUNDS = 256, 32_768, 1_024, 20
WAYS = {
    "none": "no energies",
    "outputs": "every step, with outputs",
    "when": "every tenth step, with outputs and `when=`",
    "inputs": "every step, without outputs",
}


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    initial = {
        "body": jax.random.normal(keys[0], (WIDTH, WIDTH)) / WIDTH**0.5,
        "head": jax.random.normal(keys[1], (WIDTH, VOCABULARY)) / WIDTH**0.5,
    }
    x = jax.random.normal(keys[2], (TOKENS, WIDTH))
    y = jax.random.randint(keys[3], (TOKENS,), 0, VOCABULARY)
    optimizer = optax.adamw(1e-3)

    def loss_of(parameters, x, y, now, *, way):
        hidden = jax.nn.relu(x @ parameters["body"])
        logits = hidden @ parameters["head"]
        given = {"outputs": {"outputs": logits}, "inputs": {}, "when": {"outputs": logits, "when": now}}
        sums = energies(parameters["head"].T, hidden, **given[way]) if way in given else None
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), sums

    @partial(jax.jit, static_argnames="way", donate_argnums=(0, 1))
    def train_step(parameters, state, x, y, now, *, way):
        (loss, sums), gradients = jax.value_and_grad(partial(loss_of, way=way), has_aux=True)(parameters, x, y, now)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss, sums

    runs = {way: (jax.tree.map(jnp.copy, initial), optimizer.init(initial)) for way in WAYS}
    recorders = {way: Recorder(every=10 if way == "when" else 1) for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for step in range(ROUNDS + 1):
        for way in WAYS:
            start = time.perf_counter()
            now = recorders[way].next_is_monitored
            *runs[way], loss, sums = train_step(*runs[way], x, y, now, way=way)
            if sums is not None:
                recorders[way].step(sums, loss=loss)
            jax.block_until_ready((runs[way], loss, sums))
            if step:  # the first compiles
                times[way].append(time.perf_counter() - start)
    print("| energies | step, median | extra, median of pairs (quartiles) |\n| --- | --- | --- |")
    base = np.array(times["none"])
    for way, words in WAYS.items():
        taken = np.array(times[way])
        extra = 100 * (taken / base - 1)
        if way == "when":  # by tens, of which one is monitored
            extra = 100 * (taken.reshape(-1, 10).sum(1) / base.reshape(-1, 10).sum(1) - 1)
        low, middle, high = np.percentile(extra, [25, 50, 75])
        spread = "" if way == "none" else f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"
        print(f"| {words} | {1e3 * np.median(taken):.0f} ms | {spread} |")


if __name__ == "__main__":
    main()
