"""Energies against 50-digit oracles, and against a slow reference that centers first and follows the definition.

Shapes: `W [m, n]`, `X [T, n]`, `Z [T, m]`.
"""

import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logalign import Energies, effective_dim, lar, spectra
from logalign.errors import InputError
from logalign.mathematics.arrays import Layer

CASES = json.loads((Path(__file__).parent / "data" / "lar_cases.json").read_text())
FORMS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered")
LIBRARIES = {
    "numpy": lambda array: np.array(array, dtype=np.float64),
    "torch": lambda array: torch.tensor(array, dtype=torch.float64),
}
EXACT = {"rel": 1e-9, "abs": 0}

every_case = pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
every_library = pytest.mark.parametrize("array", LIBRARIES.values(), ids=LIBRARIES.keys())


def rms(matrix):
    return math.sqrt(np.sum(np.square(matrix)) / matrix.size)


def reference(weight, inputs):
    """All four LARs from the definition: the arrays are centered, the product is formed, RMS norms are compared."""
    weight_centered = weight - weight.mean(axis=0)
    inputs_centered = inputs - inputs.mean(axis=0)

    def by_definition(W, X):
        return math.log(rms(X @ W.T) / (rms(W) * rms(X))) / math.log(W.shape[1])

    return {
        "lar": by_definition(weight, inputs),
        "lar_vocab_centered": by_definition(weight_centered, inputs),
        "lar_token_centered": by_definition(weight, inputs_centered),
        "lar_centered": by_definition(weight_centered, inputs_centered),
    }


def forms_of(found):
    return {form: getattr(found, form) for form in FORMS}


def magnified(W, X):
    """By how much a form magnifies rounding: what centering takes of the energies, and how far the products cancel."""
    W_centered, X_centered = W - W.mean(axis=0), X - X.mean(axis=0)
    arrays = dict(zip(FORMS, [(W, X), (W_centered, X), (W, X_centered), (W_centered, X_centered)], strict=True))
    energies = {form: np.array([np.sum(Y**2) for Y in (A, B, B @ A.T)]) for form, (A, B) in arrays.items()}
    with np.errstate(divide="ignore"):
        return {
            form: np.max(energies["lar"] / parts) + np.sqrt(parts[0] * parts[1] / parts[2]) if parts.all() else math.inf
            for form, parts in energies.items()
        }


def assert_agree(found, expected, *pairs, tolerance):
    """All forms, each as close as it magnifies rounding for these pairs of W and X.

    Where hardly anything is left by centering, a form may be undefined in one alone; where nothing is, it is in both.
    """
    factors = [magnified(W, X) for W, X in pairs]
    for form in FORMS:
        factor = max(each[form] for each in factors)
        if math.isinf(factor):
            assert math.isnan(found[form]), form
            assert math.isnan(expected[form]), form
        elif factor < 1e12:
            assert found[form] == pytest.approx(expected[form], abs=tolerance + 1e-14 * factor), form


def arguments_of(case, array, *, outputs):
    given = {"weight": array(case["weight"]), "inputs": array(case["inputs"])}
    if outputs:
        given["outputs"] = array(case["outputs_with_bias"])
        if "bias" in case:
            given["bias"] = array(case["bias"])
    if "mask" in case:
        as_bool = np.array(case["mask"], dtype=bool)
        given["mask"] = torch.from_numpy(as_bool) if isinstance(given["weight"], torch.Tensor) else as_bool
    return given


@every_case
@every_library
@pytest.mark.parametrize("outputs", [False, True], ids=["norms of W and X", "with outputs"])
def test_oracles(case, array, outputs):
    found = Energies.of(**arguments_of(case, array, outputs=outputs))
    for form in FORMS:
        assert getattr(found, form) == pytest.approx(case[form], **EXACT), form
    assert found.overlap == pytest.approx(case["overlap"], **EXACT)
    assert found.effective_dim == pytest.approx(case["effective_dim"], **EXACT)
    for name, energy in case["energies"].items():
        assert getattr(found, name) == pytest.approx(energy, **EXACT), name
    assert (found.nonfinite, found.reason) == (0, None)


@every_case
@every_library
def test_oracles_by_the_public_functions(case, array):
    found = lar(**arguments_of(case, array, outputs=True))
    assert type(found) is float
    assert found == pytest.approx(case["lar"], **EXACT)
    assert effective_dim(found, case["n"]) == pytest.approx(case["effective_dim"], rel=1e-8)


@every_case
def test_oracles_with_jax_in_float32(case):
    def array(values):
        return jnp.asarray(np.array(values), dtype=jnp.float32)

    outputs = case["name"] in ("bias", "mask", "tiny", "huge")
    found = Energies.of(**arguments_of(case, array, outputs=outputs))
    assert forms_of(found) == pytest.approx({form: case[form] for form in FORMS}, abs=2e-6)
    assert lar(**arguments_of(case, array, outputs=False)) == pytest.approx(case["lar"], abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_arrays_of_lower_precision_are_summed_in_float64(dtype):
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(40, 12, generator=generator).to(dtype), torch.randn(30, 12, generator=generator).to(dtype)
    expected = reference(W.double().numpy(), X.double().numpy())
    assert forms_of(Energies.of(W, X)) == pytest.approx(expected, rel=1e-12)


def test_numpy_float32_and_float16_are_summed_in_float64():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float16):
        W, X = rng.normal(size=(40, 12)).astype(dtype), rng.normal(size=(30, 12)).astype(dtype)
        expected = reference(W.astype(np.float64), X.astype(np.float64))
        assert forms_of(Energies.of(W, X)) == pytest.approx(expected, rel=1e-12)


def test_tensors_that_require_gradients_are_read_and_keep_no_graph():
    layer = torch.nn.Linear(6, 9, dtype=torch.float64)
    inputs = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    found = Energies.of(layer.weight, inputs, outputs=layer(inputs), bias=layer.bias)
    expected = reference(layer.weight.detach().numpy(), inputs.detach().numpy())
    assert forms_of(found) == pytest.approx(expected, rel=1e-12)
    assert lar(layer.weight, inputs) == pytest.approx(expected["lar"], rel=1e-12)
    assert layer.weight.grad is None


def test_leading_axes_are_tokens():
    rng = np.random.default_rng(1)
    W, X = rng.normal(size=(7, 5)), rng.normal(size=(2, 3, 4, 5))
    mask = rng.random((2, 3, 4)) < 0.5
    flat = reference(W, X.reshape(-1, 5)[mask.reshape(-1)])
    assert forms_of(Energies.of(W, X, mask=mask)) == pytest.approx(flat, rel=1e-12)
    assert forms_of(Energies.of(W, X, outputs=X @ W.T, mask=mask)) == pytest.approx(flat, rel=1e-12)
    assert Energies.of(W, X[0, 0, 0]).tokens == 1


def test_what_the_mask_leaves_out_may_be_anything():
    rng = np.random.default_rng(2)
    W, X = rng.normal(size=(7, 5)), rng.normal(size=(9, 5))
    mask = np.arange(9) != 3
    expected = forms_of(Energies.of(W, X[mask]))
    X[3] = np.nan
    found = Energies.of(W, X, outputs=X @ W.T, mask=mask)
    assert forms_of(found) == pytest.approx(expected, rel=1e-12)
    assert found.nonfinite == 0


# What the sums are -----------------------------------------------------------------------------------------------


def test_the_sums_are_what_their_names_say():
    rng = np.random.default_rng(3)
    W, X, b = rng.normal(size=(7, 5)) + 0.5, rng.normal(size=(11, 5)) - 1, rng.normal(size=7)
    Z = X @ W.T
    found = Energies.of(W, X, outputs=Z + b, bias=b)
    assert (found.n, found.m, found.tokens) == (5, 7, 11)
    assert found.weight == pytest.approx(np.sum(W**2), rel=1e-13)
    assert found.input == pytest.approx(np.sum(X**2), rel=1e-13)
    assert found.output == pytest.approx(np.sum(Z**2), rel=1e-13)
    assert found.row_sum == pytest.approx(W.sum(0), rel=1e-12)
    assert found.input_sum == pytest.approx(X.sum(0), rel=1e-12)
    assert found.output_sum == pytest.approx(Z.sum(0), rel=1e-12)
    assert found.logit_sums == pytest.approx(Z.sum(1), rel=1e-12)
    assert found.logit_sum_energy == pytest.approx(np.sum(Z.sum(1) ** 2), rel=1e-12)


def test_a_bias_far_larger_than_the_logits_is_taken_out():
    rng = np.random.default_rng(4)
    W, X, b = rng.normal(size=(7, 5)), rng.normal(size=(11, 5)), 1e4 * rng.normal(size=7)
    found = Energies.of(W, X, outputs=X @ W.T + b, bias=b)
    assert forms_of(found) == pytest.approx(reference(W, X), rel=1e-9)


def test_centered_forms_survive_means_far_larger_than_the_rest():
    rng = np.random.default_rng(5)
    W, X = rng.normal(size=(7, 5)), rng.normal(size=(11, 5))
    expected = reference(W, X)["lar_centered"]
    common = rng.normal(size=5)
    for offset in (10, 100):  # of the energy of Z, a share of about 1 / offset^4 is left
        found = Energies.of(W + offset, X + offset * common)
        assert found.lar_centered == pytest.approx(expected, abs=1e-14 * offset**4)
    assert math.isnan(Energies.of(W + 1e5, X + 1e5 * common).lar_centered)


def test_a_centered_form_is_undefined_where_only_rounding_is_left():
    rng = np.random.default_rng(6)
    row = rng.normal(size=5)
    same_rows = Energies.of(np.tile(row, (7, 1)), rng.normal(size=(11, 5)))
    assert math.isnan(same_rows.lar_vocab_centered)
    assert math.isnan(same_rows.lar_centered)
    assert math.isfinite(same_rows.lar)
    assert math.isfinite(same_rows.lar_token_centered)
    same_inputs = Energies.of(rng.normal(size=(7, 5)), np.tile(row, (11, 1)))
    assert math.isnan(same_inputs.lar_token_centered)
    assert math.isfinite(same_inputs.lar_vocab_centered)
    one_token = Energies.of(rng.normal(size=(7, 5)), row)
    assert math.isnan(one_token.lar_token_centered)
    one_row = Energies.of(row[None, :], rng.normal(size=(11, 5)))
    assert math.isnan(one_row.lar_vocab_centered)
    assert same_rows.reason is None


# Facts of the mathematics ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [64, 256])
def test_independent_random_weight_and_inputs_give_a_half(n):
    rng = np.random.default_rng(n)
    found = Energies.of(rng.normal(size=(4 * n, n)), rng.normal(size=(4 * n, n)))
    assert found.lar == pytest.approx(0.5, abs=0.005)
    assert found.effective_dim == pytest.approx(n, rel=0.03)


def test_rank_one_with_all_inputs_aligned_gives_one():
    rng = np.random.default_rng(7)
    direction = rng.normal(size=9)
    found = Energies.of(np.outer(rng.normal(size=20), direction), np.outer(rng.normal(size=30), direction))
    assert found.lar == pytest.approx(1, abs=1e-12)
    assert found.effective_dim == pytest.approx(1, abs=1e-11)


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_uniform_on_one_subspace_gives_its_dimension(k):
    rng = np.random.default_rng(k)
    basis = np.linalg.qr(rng.normal(size=(8, 8)))[0][:, :k]
    rotation = np.linalg.qr(rng.normal(size=(k, k)))[0]
    found = Energies.of(3 * rotation @ basis.T, 5 * rotation.T @ basis.T)
    assert found.effective_dim == pytest.approx(k, rel=1e-12)
    assert found.lar == pytest.approx(1 - math.log(k) / (2 * math.log(8)), rel=1e-12)


def test_disjoint_directions_have_no_lar():
    found = Energies.of(np.eye(6)[:3], np.eye(6)[3:])
    assert math.isnan(found.lar)
    assert found.reason == "the output energy is zero"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "array", [np.asarray, torch.tensor, lambda rows: jnp.asarray(rows, jnp.float32)], ids=["numpy", "torch", "jax"]
)
@pytest.mark.parametrize("tokens", [8, 400], ids=["blocks", "Gram"])
def test_what_rounding_leaves_of_products_that_cancel(array, tokens, seed):
    """W in one half of all directions and X in the other, but for a leak."""
    rng, n = np.random.default_rng(seed), 32
    basis = np.linalg.qr(rng.normal(size=(n, n)))[0]
    W, b = array(rng.normal(size=(400, 16)) @ basis[:, :16].T), array(rng.normal(size=400))
    for leak in (1e-1, 1e-3, 1e-6, 0):
        coordinates = np.concatenate([leak * rng.normal(size=(tokens, 16)), rng.normal(size=(tokens, 16))], axis=1)
        X = array(coordinates @ basis.T)
        exact = Energies.of(np.asarray(W, np.float64), np.asarray(X, np.float64)).lar
        for rest in ({}, {"outputs": X @ W.T}, {"outputs": X @ W.T + b, "bias": b}):
            found = Energies.of(W, X, **rest)
            if leak == 0 or math.isnan(found.lar):
                assert leak < 1e-1
                assert all(math.isnan(value) for value in forms_of(found).values())
                assert found.reason == "nothing but rounding is left of the output energy"
            else:
                assert found.lar == pytest.approx(exact, abs=1e-2)


def test_undefined_where_a_bias_leaves_nothing_but_rounding():
    for seed in range(4):
        rng = np.random.default_rng(seed)
        W, X, b = rng.normal(size=(7, 5)), rng.normal(size=(11, 5)), rng.normal(size=7)
        found = Energies.of(W, X, outputs=X @ W.T + 1e6 * b, bias=1e6 * b)
        assert found.lar == pytest.approx(reference(W, X)["lar"], abs=1e-9)
        found = Energies.of(W, X, outputs=X @ W.T + 1e18 * b, bias=1e18 * b)
        assert math.isnan(found.lar)
        assert found.reason == "nothing but rounding is left of the output energy"


@pytest.mark.parametrize("left", [-0.0054, -0.0, 0.0, 0.0054])
def test_the_sign_of_what_rounding_leaves_makes_no_difference(left):
    W, X = np.random.default_rng(6).normal(size=(2, 7, 5))
    whole = Energies.of(W, X)
    lost = replace(whole, output=left, output_rounding=0.01)
    for found in (lost, lost.merge_tokens(lost), lost.merge_rows(lost)):
        assert all(math.isnan(value) for value in forms_of(found).values())
        assert math.isnan(found.effective_dim)
        assert found.reason == "nothing but rounding is left of the output energy"
    # What is lost in one part is not lost in the sum.
    assert math.isfinite(lost.merge_tokens(whole).lar)


shapes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(2, 9), st.integers(0, 2**32 - 1))


def arrays_of(shape):
    m, tokens, n, seed = shape
    rng = np.random.default_rng(seed)
    return rng.normal(size=(m, n)) + rng.normal(), rng.normal(size=(tokens, n)) + rng.normal()


@given(shapes)
def test_any_shape_agrees_with_the_definition(shape):
    W, X = arrays_of(shape)
    found = forms_of(Energies.of(W, X))
    if min(shape[:2]) > 1:
        assert_agree(found, reference(W, X), (W, X), tolerance=1e-12)
    plain = math.log(rms(X @ W.T) / (rms(W) * rms(X)), shape[2])
    assert found["lar"] == pytest.approx(plain, abs=1e-12 + 1e-14 * magnified(W, X)["lar"])


@given(shapes)
def test_bounds(shape):
    W, X = arrays_of(shape)
    found = Energies.of(W, X)
    stable_rank = found.weight / np.linalg.norm(W, 2) ** 2
    assert 0 <= found.overlap <= 1 + 1e-12
    assert found.effective_dim >= stable_rank * (1 - 1e-12)
    assert found.lar <= 1 - math.log(stable_rank) / (2 * math.log(shape[2])) + 1e-12


@given(shapes, st.floats(1e-60, 1e60), st.floats(1e-60, 1e60))
def test_rescaling_changes_nothing(shape, by_weight, by_input):
    W, X = arrays_of(shape)
    expected, found = forms_of(Energies.of(W, X)), forms_of(Energies.of(W * by_weight, X * by_input))
    assert_agree(found, expected, (W, X), tolerance=1e-10)


@given(shapes)
def test_a_common_vector_added_to_all_rows_is_a_gauge_of_the_vocabulary_centered_form(shape):
    m, _, n, seed = shape
    W, X = arrays_of(shape)
    moved = W + np.random.default_rng(seed + 1).normal(size=n)
    if m > 1:
        factor = max(magnified(rows, X)["lar_vocab_centered"] for rows in (W, moved))
        found, expected = (Energies.of(rows, X).lar_vocab_centered for rows in (moved, W))
        assert found == pytest.approx(expected, abs=1e-10 + 1e-14 * factor)


# Merging ---------------------------------------------------------------------------------------------------------


def cut(data, length, name):
    return np.split(np.arange(length), sorted(data.draw(st.lists(st.integers(0, length), max_size=3), label=name)))


def assert_same(found, W, X):
    whole = Energies.of(W, X)
    assert_agree(forms_of(found), forms_of(whole), (W, X), tolerance=1e-10)
    assert (found.n, found.m, found.tokens) == (whole.n, whole.m, whole.tokens)
    for name in ("weight", "input", "output", "row_sum", "input_sum", "output_sum", "logit_sum_energy", "logit_sums"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-11, abs=1e-11), name


@given(shapes, st.data())
def test_parts_of_the_tokens_merge_to_the_whole(shape, data):
    W, X = arrays_of(shape)
    found = None
    for part in cut(data, shape[1], "tokens"):
        mask = np.isin(np.arange(shape[1]), part)
        piece = Energies.of(W, X, outputs=X @ W.T, mask=mask)
        found = piece if found is None else found.merge_tokens(piece)
    assert_same(found, W, X)


@given(shapes, st.data())
def test_parts_of_the_vocabulary_merge_to_the_whole(shape, data):
    W, X = arrays_of(shape)
    found = None
    for part in cut(data, shape[0], "rows"):
        if part.size:
            piece = Energies.of(W[part], X)
            found = piece if found is None else found.merge_rows(piece)
    assert_same(found, W, X)


@given(shapes, st.data())
def test_parts_of_both_merge_to_the_whole(shape, data):
    W, X = arrays_of(shape)
    found = None
    for tokens in (part for part in cut(data, shape[1], "tokens") if part.size):
        over_rows = None
        for rows in (part for part in cut(data, shape[0], "rows") if part.size):
            piece = Energies.of(W[rows], X[tokens], outputs=X[tokens] @ W[rows].T)
            over_rows = piece if over_rows is None else over_rows.merge_rows(piece)
        found = over_rows if found is None else found.merge_tokens(over_rows)
    assert_same(found, W, X)


def test_averaging_lars_would_have_been_wrong():
    rng = np.random.default_rng(8)
    W = rng.normal(size=(7, 5))
    small, large = 1e-3 * rng.normal(size=(4, 5)), np.outer(np.ones(4), W[0])
    parts = [Energies.of(W, small), Energies.of(W, large)]
    merged = parts[0].merge_tokens(parts[1])
    assert merged.lar == pytest.approx(reference(W, np.concatenate([small, large]))["lar"], rel=1e-12)
    assert abs(merged.lar - np.mean([part.lar for part in parts])) > 0.02


def test_merging_what_does_not_belong_together_is_refused():
    rng = np.random.default_rng(9)
    W, X = rng.normal(size=(7, 5)), rng.normal(size=(4, 5))
    whole = Energies.of(W, X)
    with pytest.raises(InputError, match="merge_tokens: expected the same weight energy in both"):
        whole.merge_tokens(Energies.of(2 * W, X))
    with pytest.raises(InputError, match="merge_tokens: expected equal m, found 7 and 6"):
        whole.merge_tokens(Energies.of(W[:6], X))
    with pytest.raises(InputError, match="merge_rows: expected the same input energy in both"):
        whole.merge_rows(Energies.of(W, 2 * X))
    with pytest.raises(InputError, match="merge_rows: expected equal tokens, found 4 and 3"):
        whole.merge_rows(Energies.of(W, X[:3]))
    with pytest.raises(InputError, match="merge_rows: expected equal n, found 5 and 4"):
        whole.merge_rows(Energies.of(W[:, :4], X[:, :4]))


# How they are taken ----------------------------------------------------------------------------------------------


@given(st.tuples(st.integers(2, 12), st.integers(2, 12), st.integers(2, 9), st.integers(0, 2**32 - 1)))
def test_the_gram_path_and_the_block_path_agree(shape):
    W, X = arrays_of(shape)
    m, tokens, n = shape[:3]
    columns = max(1, (tokens * m) // (tokens + m) - 1)  # of few columns, the Gram matrix costs less
    narrow_W, narrow_X = W[:, : max(2, min(n, columns))], X[:, : max(2, min(n, columns))]
    wide_W, wide_X = np.pad(narrow_W, ((0, 0), (0, 40))), np.pad(narrow_X, ((0, 0), (0, 40)))
    narrow, wide = Energies.of(narrow_W, narrow_X), Energies.of(wide_W, wide_X)
    # Columns of zeros change n, and so which path is taken, but none of the energies.
    assert (narrow.weight, narrow.input) == pytest.approx((wide.weight, wide.input), rel=1e-13)
    assert narrow.output == pytest.approx(wide.output, rel=1e-12)
    assert narrow.effective_dim == pytest.approx(wide.effective_dim, rel=1e-12)


@pytest.mark.parametrize("block_elements", [1, 7, 64, 1 << 22])
@pytest.mark.parametrize("outputs", [False, True])
def test_the_size_of_the_blocks_does_not_matter(monkeypatch, block_elements, outputs):
    rng = np.random.default_rng(10)
    W, X = rng.normal(size=(23, 5)), rng.normal(size=(19, 5))
    monkeypatch.setattr("logalign.mathematics.arrays.BLOCK_ELEMENTS", block_elements)
    found = Energies.of(W, X, outputs=X @ W.T if outputs else None)
    assert forms_of(found) == pytest.approx(reference(W, X), rel=1e-12)


def test_the_gram_path_gives_way_where_it_would_be_left_with_rounding():
    rng = np.random.default_rng(11)
    weight, inputs = np.zeros((200, 4)), np.zeros((200, 4))
    weight[:, :2], inputs[:, 2:] = rng.normal(size=(200, 2)), rng.normal(size=(200, 2))
    weight[:, 2] = 1e-9 * rng.normal(size=200)
    found = Energies.of(weight, inputs)
    assert found.lar == pytest.approx(reference(weight, inputs)["lar"], rel=1e-9)


@pytest.mark.parametrize(("m", "tokens", "n"), [(3000, 3000, 8), (20_000, 200, 250)], ids=["Gram", "blocks"])
def test_the_matrix_of_logits_is_never_built(monkeypatch, m, tokens, n):
    monkeypatch.setattr("logalign.mathematics.arrays.BLOCK_ELEMENTS", 1 << 16)
    rng = np.random.default_rng(12)
    W, X = rng.normal(size=(m, n)), rng.normal(size=(tokens, n))
    tracemalloc.start()
    try:
        found = Energies.of(W, X)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    logits = 8 * m * tokens
    copies_of_inputs = 3 * X.nbytes  # inputs widened, centered, squared
    assert peak < 0.2 * logits + copies_of_inputs
    assert found.lar == pytest.approx(math.log(rms(X @ W.T) / rms(W) / rms(X), n), rel=1e-9)


# What is undefined, and what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("array", [np.asarray, torch.tensor, jnp.asarray], ids=["numpy", "torch", "jax"])
@pytest.mark.parametrize("outputs", [False, True])
def test_undefined_is_nan_with_a_reason(array, outputs):
    def found_for(W, X, mask=None):
        with np.errstate(invalid="ignore"):
            rest = {"outputs": array(X @ W.T)} if outputs else {}
        found = Energies.of(array(W), array(X), mask=None if mask is None else array(mask), **rest)
        assert all(math.isnan(value) for value in forms_of(found).values())
        assert math.isnan(found.effective_dim)
        return found

    rng = np.random.default_rng(13)
    W, X = rng.normal(size=(7, 5)), rng.normal(size=(4, 5))
    nothing_kept = found_for(W, X, np.zeros(4, dtype=bool))
    assert (nothing_kept.tokens, nothing_kept.reason) == (0, "no token: the mask keeps none")
    assert nothing_kept.weight == pytest.approx(np.sum(W**2), rel=1e-6)
    assert found_for(np.zeros((7, 5)), X).reason == "the weight energy is zero"
    assert found_for(W, np.zeros((4, 5))).reason == "the input energy is zero"
    for bad in (np.nan, np.inf, -np.inf):
        broken = X.copy()
        broken[2, 1] = bad
        found = found_for(W, broken)
        rows = 2 if outputs else 1  # the input, and the output that it makes
        assert found.nonfinite == rows
        assert found.reason == f"{rows} rows of weight, inputs or outputs hold a NaN or an infinity"
    broken = W.copy()
    broken[0, 0], broken[3, 2] = np.nan, np.inf
    assert found_for(broken, X).nonfinite == (2 + 4 if outputs else 2)


def array_of(shape, dtype=np.float64):
    return np.ones(shape, dtype=dtype)


W, X = array_of((7, 5)), array_of((4, 5))
REFUSED = {
    "weight is a vector": (
        {"weight": array_of(5), "inputs": X},
        "weight: expected shape [m, n] (out, in), found shape (5,); reshape it to the matrix of the linear map",
    ),
    "transposed kernel": (
        {"weight": array_of((5, 7)), "inputs": X},
        "inputs: expected shape [..., 7] for a weight of shape (5, 7) (out, in), found (4, 5); "
        "a kernel stored as [in, out] has to be transposed",
    ),
    "inputs are a number": (
        {"weight": W, "inputs": np.array(1.0)},
        "inputs: expected shape [..., 5] for a weight of shape (7, 5) (out, in), found (); "
        "a kernel stored as [in, out] has to be transposed",
    ),
    "whole numbers": (
        {"weight": W, "inputs": array_of((4, 5), np.int64)},
        "inputs: expected a real floating-point array, found dtype int64; convert it first",
    ),
    "quantized weight": (
        {"weight": array_of((7, 5), np.int8), "inputs": X},
        "weight: expected a real floating-point array, found dtype int8; convert it first",
    ),
    "complex": (
        {"weight": array_of((7, 5), np.complex128), "inputs": X},
        "weight: expected a real floating-point array, found dtype complex128; convert it first",
    ),
    "no inputs": (
        {"weight": W, "inputs": array_of((0, 5))},
        "inputs: expected at least one element, found shape (0, 5)",
    ),
    "no rows": (
        {"weight": array_of((0, 5)), "inputs": X},
        "weight: expected at least one element, found shape (0, 5)",
    ),
    "n = 1": (
        {"weight": array_of((7, 1)), "inputs": array_of((4, 1))},
        "weight: expected fan-in n of at least 2, found shape (7, 1); log_n is undefined for n = 1",
    ),
    "a list": (
        {"weight": [[1.0, 2.0]], "inputs": X},
        "weight: expected a NumPy, PyTorch, JAX or CuPy array, found list; "
        "convert it first, for example with numpy.asarray",
    ),
    "two libraries": (
        {"weight": W, "inputs": torch.ones(4, 5)},
        "expected arrays of one library, found weight numpy, inputs torch; convert them to one",
    ),
    "short mask": (
        {"weight": W, "inputs": X, "mask": array_of(3, bool)},
        "mask: expected shape (4,), one value a token, found (3,)",
    ),
    "mask of numbers": (
        {"weight": W, "inputs": X, "mask": array_of(4, np.int64)},
        "mask: expected dtype bool, found int64; compare it first, for example mask != 0",
    ),
}
REFUSED_WITH_OUTPUTS = {
    "outputs of another width": (
        {"weight": W, "inputs": X, "outputs": array_of((4, 6))},
        "outputs: expected shape [..., 7] for a weight of shape (7, 5) (out, in), found (4, 6); "
        "a kernel stored as [in, out] has to be transposed",
    ),
    "outputs of other tokens": (
        {"weight": W, "inputs": X, "outputs": array_of((3, 7))},
        "outputs: expected leading shape (4,) as the inputs have, found (3,)",
    ),
    "bias of another length": (
        {"weight": W, "inputs": X, "bias": array_of(5)},
        "bias: expected shape (7,) for a weight of shape (7, 5), found (5,)",
    ),
}


@pytest.mark.parametrize("function", [lar, Energies.of, spectra], ids=["lar", "Energies.of", "spectra"])
@pytest.mark.parametrize(("arguments", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused(function, arguments, text):
    with pytest.raises(InputError) as caught:
        function(**arguments)
    assert str(caught.value) == text


@pytest.mark.parametrize("function", [lar, Energies.of], ids=["lar", "Energies.of"])
@pytest.mark.parametrize(("arguments", "text"), REFUSED_WITH_OUTPUTS.values(), ids=REFUSED_WITH_OUTPUTS.keys())
def test_bad_outputs_are_refused(function, arguments, text):
    with pytest.raises(InputError) as caught:
        function(**arguments)
    assert str(caught.value) == text


def test_torch_and_jax_input_is_checked_alike():
    with pytest.raises(InputError, match=r"found dtype torch\.int64; convert it first"):
        lar(torch.ones(7, 5), torch.ones(4, 5, dtype=torch.int64))
    with pytest.raises(InputError, match=r"mask: expected dtype bool, found torch\.uint8"):
        lar(torch.ones(7, 5), torch.ones(4, 5), mask=torch.ones(4, dtype=torch.uint8))
    with pytest.raises(InputError, match="found dtype int32; convert it first"):
        lar(jnp.ones((7, 5)), jnp.ones((4, 5), dtype=jnp.int32))


def test_an_input_error_is_a_value_error():
    with pytest.raises(ValueError, match="n: expected a fan-in of at least 2, found 1; log_n is undefined below"):
        effective_dim(0.5, 1)


@settings(max_examples=50)
@given(st.floats(-2, 1), st.integers(2, 10_000))
def test_effective_dim_inverts_lar(value, n):
    k = effective_dim(value, n)
    assert 1 - math.log(k) / (2 * math.log(n)) == pytest.approx(value, abs=1e-12)


def test_effective_dim_of_nan_is_nan():
    assert math.isnan(effective_dim(math.nan, 64))


def test_which_path_is_taken_follows_the_cost(monkeypatch):
    row_elements_of_blocks = []
    blocks = Layer.blocks

    def watched(self, array, row_elements):
        row_elements_of_blocks.append(row_elements)
        return blocks(self, array, row_elements)

    monkeypatch.setattr(Layer, "blocks", watched)
    rng = np.random.default_rng(14)
    Energies.of(rng.normal(size=(300, 4)), rng.normal(size=(200, 4)))  # (T + m) n < T m
    assert 200 not in row_elements_of_blocks
    Energies.of(rng.normal(size=(300, 150)), rng.normal(size=(200, 150)))
    assert 200 in row_elements_of_blocks
