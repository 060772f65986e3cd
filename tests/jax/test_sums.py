"""Sums in JAX against 50-digit oracles, and against `Energies.of` in NumPy's float64 on the same arrays."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from logalign import Energies, lar
from logalign.errors import InputError
from logalign.jax import Sums, energies

CASES = json.loads((Path(__file__).parent.parent / "data" / "lar_cases.json").read_text())
FORMS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered")
ENERGIES = ("weight", "input", "output")
EPSILON = 2.0**-23


def forms_of(found):
    return {form: getattr(found, form) for form in FORMS}


def exact(weight, inputs, *, outputs=None, bias=None, mask=None):
    """The truth: the very values, whatever their dtype, summed in NumPy's float64."""
    W, X, Z, b = (
        None if each is None else np.asarray(each).astype(np.float64) for each in (weight, inputs, outputs, bias)
    )
    return Energies.of(W, X, outputs=Z, bias=b, mask=None if mask is None else np.asarray(mask))


def arrays(*, m=17, n=7, shape=(5, 6), dtype=jnp.float32, offset=0.5, seed=0):
    rng = np.random.default_rng(seed)
    W = jnp.asarray(rng.normal(size=(m, n)) + offset, dtype)
    X = jnp.asarray(rng.normal(size=(*shape, n)) - offset, dtype)
    return W, X


def assert_same(found, truth, *, tolerance=1e-6):
    found = found.to_energies()
    assert forms_of(found) == pytest.approx(forms_of(truth), abs=tolerance)
    for name in (*ENERGIES, "logit_sum_energy", "output_sum_energy"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=10 * tolerance), name
    for name in ("row_sum", "input_sum"):
        scale = np.abs(getattr(truth, name)).max()
        assert getattr(found, name) == pytest.approx(getattr(truth, name), abs=10 * tolerance * scale), name
    assert (found.n, found.m, found.tokens) == (truth.n, truth.m, truth.tokens)
    assert (found.nonfinite, found.reason) == (0, None)


# What is summed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
@pytest.mark.parametrize("outputs", [False, True], ids=["without outputs", "with outputs"])
def test_oracles(case, outputs):
    given = {}
    if outputs:
        given["outputs"] = jnp.asarray(np.array(case["outputs_with_bias"]), jnp.float32)
        if "bias" in case:
            given["bias"] = jnp.asarray(np.array(case["bias"]), jnp.float32)
    if "mask" in case:
        given["mask"] = jnp.asarray(np.array(case["mask"], dtype=bool))
    weight, inputs = (jnp.asarray(np.array(case[name]), jnp.float32) for name in ("weight", "inputs"))
    found = jax.jit(energies)(weight, inputs, **given).to_energies()
    assert forms_of(found) == pytest.approx({form: case[form] for form in FORMS}, abs=5e-7)
    for name, energy in case["energies"].items():
        assert getattr(found, name) == pytest.approx(energy, rel=2e-6), name


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(3, 4), (40, 50)], ids=["product", "Gram form"])
def test_without_outputs_in_any_precision(dtype, shape):
    W, X = arrays(m=300, n=24, shape=shape, dtype=dtype)
    assert_same(energies(W, X), exact(W, X), tolerance=2e-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-7), (jnp.bfloat16, 2e-4), (jnp.float16, 2e-6)])
def test_with_outputs_and_bias_in_any_precision(dtype, tolerance):
    W, X = arrays(m=60, n=24, shape=(8, 9), dtype=dtype)
    b = jnp.linspace(-2, 2, 60, dtype=dtype)
    Z = X @ W.T + b
    assert_same(energies(W, X, outputs=Z, bias=b), exact(W, X), tolerance=tolerance)


def test_squares_that_leave_the_range_of_float16():
    W, X = (300 * array for array in arrays(dtype=jnp.float16))  # squares up to 2e6; the largest float16 is 65,504
    truth = exact(W, X)
    assert truth.output > 65504
    assert_same(energies(W, X), truth)
    assert_same(energies(W, X, outputs=X.astype(jnp.float32) @ W.astype(jnp.float32).T), truth)
    overflown = energies(W, X, outputs=X @ W.T).to_energies()
    assert overflown.nonfinite > 0
    assert math.isnan(overflown.lar)
    assert "NaN or an infinity" in overflown.reason


def test_means_far_larger_than_the_rest():
    W, X = arrays(offset=100.0)
    assert forms_of(energies(W, X).to_energies()) == pytest.approx(forms_of(exact(W, X)), abs=1e-5)


def test_a_centered_form_is_undefined_where_only_rounding_is_left():
    rng = np.random.default_rng(1)
    row = jnp.asarray(rng.normal(size=7) * 0.1, jnp.float32)
    W, X = arrays(m=1000, shape=(700,))
    for tokens in (3, 700):
        same_inputs = energies(W, jnp.tile(row, (tokens, 1))).to_energies()
        assert math.isnan(same_inputs.lar_token_centered)
        assert math.isnan(same_inputs.lar_centered)
        assert math.isfinite(same_inputs.lar_vocab_centered)
        assert same_inputs.lar == pytest.approx(exact(W, row[None]).lar, abs=1e-6)
    same_rows = energies(jnp.tile(row, (1000, 1)), X).to_energies()
    assert math.isnan(same_rows.lar_vocab_centered)
    assert math.isfinite(same_rows.lar_token_centered)
    pooled = energies(W, row[None]).merge_tokens(energies(W, row[None])).to_energies()
    assert math.isnan(pooled.lar_token_centered)


def rotated(leak, *, seed=0, tokens=400, m=400, n=32, dtype=jnp.float32):
    """W in one half of all directions and X in the other, but for a leak, so that products cancel all but it."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(n, n)))[0]
    W = rng.normal(size=(m, n // 2)) @ basis[:, : n // 2].T
    coordinates = np.concatenate([leak * rng.normal(size=(tokens, n // 2)), rng.normal(size=(tokens, n // 2))], axis=1)
    return jnp.asarray(W, dtype), jnp.asarray(coordinates @ basis.T, dtype)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("leak", "defined"), [(1e-1, True), (1e-6, False), (0, False)])
def test_the_gram_form_says_where_it_has_lost_its_digits(leak, defined, seed):
    W, X = rotated(leak, seed=seed)
    found, truth = energies(W, X).to_energies(), exact(W, X)
    assert abs(found.output - truth.output) < found.output_rounding
    assert found.output_rounding < 1e-5 * truth.weight * truth.input
    if defined:
        assert found.lar == pytest.approx(truth.lar, abs=1e-5)
    else:  # whatever the sign of what rounding leaves
        assert all(math.isnan(form) for form in forms_of(found).values())
        assert found.reason == "nothing but rounding is left of the output energy"
    # few enough tokens that the product costs less: what is left of it is right, if anything is
    W, X = rotated(leak, seed=seed, tokens=8)
    found, truth = energies(W, X).to_energies(), exact(W, X)
    if math.isnan(found.lar):
        assert leak < 1e-1
        assert found.reason == "nothing but rounding is left of the output energy"
    else:
        assert leak > 0
        assert found.lar == pytest.approx(truth.lar, abs=1e-2)


@pytest.mark.parametrize("left", [-1e-7, -0.0, 0.0, 1e-7])
def test_the_sign_of_what_rounding_leaves_makes_no_difference(left):
    W, X = rotated(0)
    found = energies(W, X)
    plain = found.weight_centered * found.input_centered
    found = replace(found, output_centered=left * plain, token_effect=0 * plain, input_mean=0 * found.input_mean)
    found = replace(found, vocabulary_effect=0 * found.vocabulary_effect)
    for sums in (found, found.merge_tokens(found), found.merge_tokens(energies(W, 1e3 * X))):
        assert math.isnan(sums.to_energies().lar)
        assert sums.to_energies().reason == "nothing but rounding is left of the output energy"


@pytest.mark.parametrize("outputs", [False, True])
def test_zero_is_said_of_outputs_that_are_all_zero(outputs):
    W, X = jnp.eye(6)[:3], jnp.eye(6)[3:]
    found = energies(W, X, outputs=X @ W.T if outputs else None).to_energies()
    assert (found.output, found.reason) == (0, "the output energy is zero")


def test_undefined_where_a_bias_leaves_nothing_but_rounding():
    for seed in range(4):
        W, X = arrays(seed=seed)
        b = jnp.asarray(np.random.default_rng(seed).normal(size=17), jnp.float32)
        found = energies(W, X, outputs=X @ W.T + 1e3 * b, bias=1e3 * b).to_energies()
        assert found.lar == pytest.approx(exact(W, X).lar, abs=1e-4)
        found = energies(W, X, outputs=X @ W.T + 1e8 * b, bias=1e8 * b).to_energies()
        assert all(math.isnan(form) for form in forms_of(found).values())
        assert found.reason == "nothing but rounding is left of the output energy"


def test_double_precision_where_it_is_on():
    with jax.enable_x64(True):
        W, X = arrays(dtype=jnp.float64, offset=3.0)
        found = jax.jit(energies)(W, X)
        assert found.row_mean.dtype == jnp.float64
        assert forms_of(found.to_energies()) == pytest.approx(forms_of(exact(W, X)), abs=1e-12)
        half = energies(W.astype(jnp.bfloat16), X.astype(jnp.bfloat16))
        assert half.row_mean.dtype == jnp.float32


def test_a_mask_leaves_tokens_out_whatever_they_hold():
    W, X = arrays()
    mask = np.random.default_rng(4).random((5, 6)) < 0.5
    Z, b = X @ W.T + 1, jnp.ones(17)
    truth = exact(W, X, mask=mask)
    X = jnp.where(mask[..., None], X, jnp.nan)
    Z = jnp.where(mask[..., None], Z, jnp.inf)
    for given in ({}, {"outputs": Z, "bias": b}):
        found = energies(W, X, mask=mask, **given)
        assert_same(found, truth)
        assert (int(found.offered), int(found.masked)) == (30, 1)


def test_a_mask_that_keeps_nothing_gives_no_lar_and_no_nan_on_the_way():
    W, X = arrays()
    with jax.debug_nans(True):
        found = energies(W, X, mask=jnp.zeros((5, 6), bool), outputs=X @ W.T)
    assert found.to_energies().reason == "no token: the mask keeps none"


@pytest.mark.parametrize("name", ["weight", "inputs", "outputs"])
def test_rows_that_are_not_finite_are_counted(name):
    W, X = arrays()
    given = {"weight": W, "inputs": X.reshape(30, 7), "outputs": X.reshape(30, 7) @ W.T}
    given[name] = given[name].at[3, 2].set(jnp.nan).at[5, 1].set(jnp.inf)
    found = energies(**given).to_energies()
    assert found.nonfinite == exact(**given).nonfinite == 2
    assert found.reason == "2 rows of weight, inputs or outputs hold a NaN or an infinity"


@pytest.mark.parametrize("outputs", [False, True])
def test_padding_of_the_vocabulary_is_left_out(outputs):
    W, X = arrays()
    W = W.at[13:].set(jnp.nan)
    Z = X @ W.T
    given = {"outputs": Z} if outputs else {}
    assert_same(energies(W, X, vocabulary=13, **given), exact(W[:13], X))
    given = {"outputs": Z[..., :13]} if outputs else {}
    assert_same(energies(W[:13], X, **given), exact(W[:13], X))


def test_one_input_and_numpy_arrays():
    rng = np.random.default_rng(5)
    W, x = rng.normal(size=(9, 4)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    assert energies(W, x).to_energies().lar == pytest.approx(exact(W, x).lar, abs=1e-6)


def test_the_lar_is_that_of_the_plain_function():
    W, X = arrays()
    assert energies(W, X).to_energies().lar == pytest.approx(lar(np.asarray(W), np.asarray(X)), abs=1e-6)


def test_it_needs_no_implicit_promotion_of_dtypes():
    W, X = arrays(dtype=jnp.bfloat16)
    mask = jnp.ones((5, 6), bool)
    with jax.numpy_dtype_promotion("strict"):
        found = energies(W, X, outputs=X @ W.T, bias=jnp.zeros(17, jnp.bfloat16), mask=mask, when=jnp.asarray(True))
        energies(W, X, vocabulary=5).merge_tokens(energies(W, X, vocabulary=5))
    assert found.row_mean.dtype == jnp.float32


# Under transformations -------------------------------------------------------------------------------------------


def test_merged_over_tokens():
    W, X = arrays(offset=20.0)
    parts = [energies(W, X[:2]), energies(W, 1e3 * X[2:3]), energies(W, X[3:], mask=jnp.zeros((2, 6), bool))]
    merged = parts[0].merge_tokens(parts[1]).merge_tokens(parts[2])
    truth = exact(W, jnp.concatenate([X[:2], 1e3 * X[2:3]]))
    assert_same(merged, truth)
    assert int(merged.offered) == 30
    assert_same(parts[2].merge_tokens(parts[0]), exact(W, X[:2]))


@pytest.mark.parametrize("form", ["carry", "stacked"])
def test_scan_over_micro_batches(form):
    W, X = arrays(offset=3.0)

    @jax.jit
    def found(W, X):
        if form == "stacked":
            return jax.lax.scan(lambda carry, x: (carry, energies(W, x)), None, X)[1].pool()
        first = energies(W, X[0])
        return jax.lax.scan(lambda sums, x: (sums.merge_tokens(energies(W, x)), None), first, X[1:])[0]

    assert_same(found(W, X), exact(W, X))


def test_vmap_over_examples():
    W, X = arrays()
    assert_same(jax.vmap(partial(energies, W))(X).pool(), exact(W, X))
    assert_same(jax.vmap(partial(energies, W))(X.reshape(30, 7)).pool(), exact(W, X))
    named = jax.vmap(partial(energies, W, tokens_axis="batch"), axis_name="batch")(X)
    assert_same(jax.tree.map(lambda leaf: leaf[0], named), exact(W, X))


def test_vmap_over_models():
    W, X = arrays()
    several = jax.vmap(energies, in_axes=(0, None))(jnp.stack([W, 2 * W[::-1]]), X)
    for i, weight in enumerate((W, 2 * W[::-1])):
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], several), exact(weight, X))


def test_only_now_and_then():
    W, X = arrays()

    @jax.jit
    def found(step):
        return energies(W, X, when=step % 10 == 0)

    assert_same(found(20), exact(W, X))
    skipped = found(21)
    assert (int(skipped.offered), int(skipped.tokens)) == (0, 0)
    assert jax.tree.structure(skipped) == jax.tree.structure(found(20))
    assert_same(skipped.merge_tokens(found(30)), exact(W, X))
    assert found._cache_size() == 1


def test_what_is_not_needed_now_is_not_computed():
    W, X = arrays()
    text = jax.jit(lambda when: energies(W, X, when=when)).lower(True).compile().as_text()
    assert "conditional" in text


def loss_and_sums(W, X, labels, *, measured, remat=False):
    def head(W, X):
        Z = jnp.tanh(X) @ W.T
        loss = -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(Z), labels[..., None], axis=-1))
        return loss, energies(W, jnp.tanh(X), outputs=Z) if measured else None

    return (jax.checkpoint(head) if remat else head)(W, X)


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_are_bit_identical_and_remat_counts_once(remat):
    W, X = arrays(m=50, n=16, shape=(8, 12))
    labels = jnp.asarray(np.random.default_rng(6).integers(0, 50, (8, 12)))
    run = {
        measured: jax.jit(
            jax.value_and_grad(partial(loss_and_sums, measured=measured, remat=remat), argnums=(0, 1), has_aux=True)
        )(W, X, labels)
        for measured in (True, False)
    }
    (loss, sums), gradients = run[True]
    (plain_loss, _), plain_gradients = run[False]
    assert np.asarray(loss).tobytes() == np.asarray(plain_loss).tobytes()
    for found, plain in zip(gradients, plain_gradients, strict=True):
        assert np.asarray(found).tobytes() == np.asarray(plain).tobytes()
    assert_same(sums, exact(W, jnp.tanh(X)))
    assert int(sums.offered) == 96


def test_no_gradient_flows_through_the_sums():
    W, X = arrays()

    def loss(W, X, b):
        sums = energies(W, X, outputs=X @ W.T + b, bias=b, when=jnp.asarray(True))
        return jnp.sum(W) + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(sums) if leaf.dtype == jnp.float32)

    gradients = jax.grad(loss, argnums=(0, 1, 2))(W, X, jnp.ones(17))
    assert [float(jnp.abs(gradient).max()) for gradient in gradients] == [1.0, 0.0, 0.0]


def test_the_same_as_in_torch():
    W, X = arrays()
    mask = np.random.default_rng(7).random((5, 6)) < 0.8
    truth = Energies.of(torch.tensor(np.asarray(W)), torch.tensor(np.asarray(X)), mask=torch.tensor(mask))
    assert_same(energies(W, X, mask=mask), truth)


# Wrong input -----------------------------------------------------------------------------------------------------

W, X = np.ones((9, 4), np.float32), np.ones((2, 3, 4), np.float32)
Z, b = np.ones((2, 3, 9), np.float32), np.ones(9, np.float32)
AXES = "expected inputs [..., 4] and outputs [..., 9] for a weight of shape (9, 4) (out, in), found "


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": W[0]}, "weight: expected shape [m, n] (out, in), found (4,); reshape it to the matrix"),
        ({"weight": W.T}, "this is a kernel stored as [in, out]: pass kernel.T"),
        ({"weight": W.T, "outputs": Z}, "found inputs (2, 3, 4), outputs (2, 3, 9); this is a kernel stored as [in,"),
        ({"inputs": Z[..., :5]}, AXES + "inputs (2, 3, 5)"),
        ({"outputs": Z[..., :5]}, AXES + "inputs (2, 3, 4), outputs (2, 3, 5)"),
        ({"outputs": Z[:1]}, "outputs: expected leading shape (2, 3) as the inputs have, found (1, 3)"),
        ({"bias": b[:2]}, "bias: expected shape (9,) for a weight of shape (9, 4), found (2,)"),
        ({"mask": np.ones((2, 4), bool)}, "mask: expected leading shape (2, 3) as the inputs have, found (2, 4)"),
        ({"mask": np.ones((2, 3))}, "mask: expected dtype bool, found float64; compare it first, such as mask != 0"),
        ({"inputs": X.astype(int)}, "inputs: expected a real floating-point array, found dtype int64; convert it"),
        ({"weight": [[1.0]]}, "weight: expected a JAX array, found list; pass its value"),
        ({"weight": np.ones((9, 1), np.float32), "inputs": X[..., :1]}, "expected fan-in n of at least 2, found"),
        ({"inputs": X[:0]}, "inputs: expected at least one element, found shape (0, 3, 4)"),
        ({"vocabulary": 10}, "vocabulary: expected 1 to 9, the rows of the weight, found 10"),
        ({"when": 1}, "when: expected one bool, found int32 of shape (); compare first, for example step % 10 == 0"),
        ({"when": np.ones(2, bool)}, "when: expected one bool, found bool of shape (2,)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_wrong_input(given, message):
    with pytest.raises(InputError) as error:
        energies(**{"weight": W, "inputs": X, **given})
    assert message in str(error.value)


def test_sums_that_have_no_values_yet_or_a_leading_axis():
    with pytest.raises(InputError, match="this is inside jit, grad, vmap or scan; return the sums"):
        jax.jit(lambda X: energies(W, X).to_energies())(X)
    with pytest.raises(InputError, match=r"found a leading axis of \(2,\), .*; call sums.pool\(\)"):
        jax.vmap(partial(energies, W))(X).to_energies()


def test_sums_are_a_pytree_of_arrays():
    found = energies(W, X)
    leaves, structure = jax.tree.flatten(found)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert isinstance(jax.tree.unflatten(structure, leaves), Sums)


def test_without_jax_the_command_that_installs_it_is_told():
    script = "import sys; sys.modules['jax'] = None\nimport logalign.jax"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "logalign.jax needs jax" in done.stderr
    assert 'pip install "logalign[jax]"' in done.stderr
