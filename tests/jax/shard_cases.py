"""Run by test_sharding.py in a process of its own, for the number of devices is fixed when JAX starts.

Prints one JSON object: by case, the forms of LAR and the energies as one of 8 devices found them, beside the truth.
"""

import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from logalign import Energies
from logalign.jax import Sums, energies

NAMES = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered", "weight", "input", "output", "tokens", "m")
CHECK = {"check_vma": True}


def numbers(found: Energies) -> dict[str, float]:
    return {name: getattr(found, name) for name in (*NAMES, "nonfinite")}


def arrays(*, m=24, n=6, shape=(8, 4), offset=1.0):
    rng = np.random.default_rng(0)
    W = (rng.normal(size=(m, n)) + offset).astype(np.float32)
    X = (rng.normal(size=(*shape, n)) - offset).astype(np.float32)
    b = rng.normal(size=m).astype(np.float32)
    mask = rng.random(shape) < 0.7
    mask[2] = False  # a device none of whose tokens count
    return W, X, b, mask, X @ W.T + b


def truth(W, X, b, mask, Z, rows=None):
    W, X, b, Z = (array.astype(np.float64) for array in (W, X, b, Z))
    return Energies.of(W[:rows], X, outputs=Z[..., :rows], bias=b[:rows], mask=mask)


def in_shard_map(mesh, tokens, rows, *, outputs=True, vocabulary=None, when=None, **sizes):
    """Tokens over the mesh axes `tokens`, rows of W over `rows`, the result the same everywhere."""
    W, X, b, mask, Z = arrays(**sizes)
    over = {"tokens_axis": tokens, "rows_axis": rows}

    def local(W, X, b, mask, Z):
        given = {"outputs": Z, "bias": b} if outputs else {}
        return energies(W, X, mask=mask, vocabulary=vocabulary, when=when, **over, **given)

    specs = (
        P(rows or None),
        P(tokens or None),
        P(rows or None),
        P(tokens or None),
        P(tokens or None, None, rows or None),
    )
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), **CHECK))
    return numbers(mapped(W, X, b, mask, Z).to_energies()), numbers(truth(W, X, b, mask, Z, vocabulary))


def under_jit(mesh, tokens, rows, *, outputs=True, vocabulary=None):
    """The same with named shardings: nothing is said to `energies`."""
    W, X, b, mask, Z = arrays()
    specs = (
        P(rows or None),
        P(tokens or None),
        P(rows or None),
        P(tokens or None),
        P(tokens or None, None, rows or None),
    )
    placed = [
        jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip((W, X, b, mask, Z), specs, strict=True)
    ]

    @jax.jit
    def found(W, X, b, mask, Z):
        given = {"outputs": Z, "bias": b} if outputs else {}
        return energies(W, X, mask=mask, vocabulary=vocabulary, **given)

    return numbers(found(*placed).to_energies()), numbers(truth(W, X, b, mask, Z, vocabulary))


def gathered_weight(mesh):
    """FSDP by hand: rows of W are split over the very devices that the tokens are, and gathered for the product."""
    W, X, b, mask, Z = arrays()

    def local(W, X, mask):
        return energies(jax.lax.all_gather(W, "data", axis=0, tiled=True), X, mask=mask, tokens_axis="data")

    mapped = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P("data"), P("data")), out_specs=P(), **CHECK)
    )
    return numbers(mapped(W, X, mask).to_energies()), numbers(truth(W, X, b, mask, Z))


def each_device_alone(mesh):
    """Without names: each device's own sums, pooled outside."""
    W, X, b, mask, Z = arrays()

    def local(W, X, mask):
        return jax.tree.map(lambda leaf: leaf[None], energies(W, X, mask=mask, when=jnp.asarray(True)))

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data"), **CHECK)
    return numbers(jax.jit(lambda *given: mapped(*given).pool())(W, X, mask).to_energies()), numbers(
        truth(W, X, b, mask, Z)
    )


def not_now(mesh):
    W, X, *_ = arrays()

    def local(W, X, when):
        return energies(W, X, when=when, tokens_axis="data")

    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P(), **CHECK))
    found: Sums = mapped(W, X, jnp.asarray(False))
    return {"offered": int(found.offered)}, {"offered": 0}


def gradients(mesh):
    """Data-parallel gradients by shard_map, with and without energies in the loss function, bit for bit."""
    W, X, *_ = arrays()

    def step(W, X, *, measured):
        def loss_of(W):
            Z = X @ W.T
            loss = jax.lax.pmean(jnp.mean(jax.nn.logsumexp(Z, axis=-1)), "data")
            return loss, energies(W, X, outputs=Z, tokens_axis="data") if measured else None

        (_, sums), gradient = jax.value_and_grad(loss_of, has_aux=True)(W)
        return gradient, sums

    found = [
        jax.jit(
            jax.shard_map(
                lambda W, X, measured=measured: step(W, X, measured=measured),
                mesh=mesh,
                in_specs=(P(), P("data")),
                out_specs=P(),
                **CHECK,
            )
        )(W, X)[0]
        for measured in (True, False)
    ]
    return {"bits": np.asarray(found[0]).tobytes().hex()}, {"bits": np.asarray(found[1]).tobytes().hex()}


def main():
    devices = np.array(jax.devices())
    assert len(devices) == 8
    line, grid = Mesh(devices, ("data",)), Mesh(devices.reshape(2, 2, 2), ("data", "context", "model"))
    cases = {
        "tokens": lambda: in_shard_map(line, "data", ()),
        "tokens, Gram form": lambda: in_shard_map(line, "data", (), outputs=False, shape=(64, 16), m=64),
        "tokens, product": lambda: in_shard_map(line, "data", (), outputs=False),
        "tokens, when": lambda: in_shard_map(line, "data", (), when=True),
        "rows": lambda: in_shard_map(line, (), "data"),
        "rows, product": lambda: in_shard_map(line, (), "data", outputs=False),
        "rows, padded": lambda: in_shard_map(line, (), "data", vocabulary=17),
        "tokens and rows": lambda: in_shard_map(grid, ("data", "context"), "model"),
        "tokens and rows, product": lambda: in_shard_map(grid, ("data", "context"), "model", outputs=False),
        "tokens and rows, padded": lambda: in_shard_map(grid, "data", ("context", "model"), vocabulary=19),
        "tokens, jit": lambda: under_jit(line, "data", ()),
        "rows, jit, padded": lambda: under_jit(line, (), "data", vocabulary=17),
        "tokens and rows, jit": lambda: under_jit(grid, ("data", "context"), "model"),
        "tokens and rows, jit, product": lambda: under_jit(grid, ("data", "context"), "model", outputs=False),
        "gathered weight": lambda: gathered_weight(line),
        "each device alone": lambda: each_device_alone(line),
        "not now": lambda: not_now(line),
        "gradients": lambda: gradients(line),
    }
    with jax.numpy_dtype_promotion("strict"):
        json.dump({name: case() for name, case in cases.items()}, sys.stdout)


if __name__ == "__main__":
    main()
