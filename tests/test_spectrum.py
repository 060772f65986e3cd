"""Spectra against 50-digit oracles, and against an SVD of W that knows nothing of Gram matrices."""

import json
import math
from pathlib import Path

import array_api_compat as compat
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logalign import Energies, spectra
from logalign.mathematics.spectrum import gram, spectra_of_grams

CASES = json.loads((Path(__file__).parent / "data" / "lar_cases.json").read_text())
LIBRARIES = {"numpy": np.asarray, "torch": torch.tensor}


def case_spectra(case, array, dtype):
    weight, inputs = (array(np.array(case[name], dtype=dtype)) for name in ("weight", "inputs"))
    return spectra(weight, inputs, mask=array(np.array(case["mask"], dtype=bool)) if "mask" in case else None)


def by_svd(weight, inputs):
    """p and q from the SVD of W over all n directions; q is spread evenly over equal singular values."""
    s_padded = np.zeros(weight.shape[1])
    _, s, rows = np.linalg.svd(weight, full_matrices=True)
    s_padded[: s.size] = s
    p = s_padded**2 / np.sum(s**2)
    q = np.sum((inputs @ rows.T) ** 2, axis=0) / np.sum(inputs**2)
    start = 0
    for i in range(1, p.size + 1):
        if i == p.size or p[i - 1] - p[i] > 1e-10 * p[0]:
            q[start:i] = q[start:i].mean()
            start = i
    return p, q


def host(array):
    return np.asarray(array, dtype=np.float64)


@pytest.mark.parametrize("array", LIBRARIES.values(), ids=LIBRARIES.keys())
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_oracles(case, array):
    found = case_spectra(case, array, np.float64)
    for name in ("p", "q"):
        expected = np.array(case[name])
        assert host(getattr(found, name)) == pytest.approx(expected, rel=1e-9, abs=1e-12), name
    for name in ("overlap", "lar", "effective_dim", "weight_participation", "input_participation", "coherence"):
        assert getattr(found, name) == pytest.approx(case[name], rel=1e-9, abs=0), name


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_oracles_with_jax_in_float32(case):
    found = case_spectra(case, jnp.asarray, np.float32)
    assert compat.is_jax_array(found.p)
    assert compat.is_jax_array(found.q)
    assert found.p.dtype == jnp.float32
    assert host(found.p) == pytest.approx(np.array(case["p"]), abs=2e-6)
    assert host(found.q) == pytest.approx(np.array(case["q"]), abs=2e-5)
    assert found.lar == pytest.approx(case["lar"], abs=2e-6)


@pytest.mark.parametrize("array", LIBRARIES.values(), ids=LIBRARIES.keys())
def test_the_arrays_are_of_the_callers_library(array):
    found = spectra(array(np.eye(3)), array(np.ones((4, 3))))
    assert type(found.p) is type(array(np.eye(3)))
    assert type(found.q) is type(found.p)
    assert type(found.lar) is float
    assert type(found.coherence) is float


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_torch_arrays_of_lower_precision_are_decomposed_in_float64(dtype):
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(9, 6, generator=generator).to(dtype), torch.randn(30, 6, generator=generator).to(dtype)
    W.requires_grad_()
    found = spectra(W, X)
    p, q = by_svd(W.detach().double().numpy(), X.double().numpy())
    assert found.p.dtype == torch.float64
    assert not found.p.requires_grad
    assert found.p.numpy() == pytest.approx(p, abs=1e-12)
    assert found.q.numpy() == pytest.approx(q, abs=1e-12)


@pytest.mark.parametrize("n", [255, 256, 303])
def test_a_wide_gram_matrix_is_whole_and_symmetric(n):
    rows = np.random.default_rng(0).normal(size=(40, n))
    for array in (rows, torch.tensor(rows)):
        found = host(gram(array))
        np.testing.assert_allclose(found, rows.T @ rows, rtol=0, atol=1e-12 * np.trace(rows.T @ rows))
        np.testing.assert_allclose(found, found.T, rtol=0, atol=1e-13 * np.trace(found))


shapes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(2, 9), st.integers(0, 2**32 - 1))


@given(shapes)
def test_any_shape_agrees_with_the_svd_and_with_the_energies(shape):
    m, tokens, n, seed = shape
    rng = np.random.default_rng(seed)
    W, X = rng.normal(size=(m, n)), rng.normal(size=(tokens, n))
    found, energies = spectra(W, X), Energies.of(W, X)
    p, q = by_svd(W, X)
    assert found.p == pytest.approx(p, abs=1e-12)
    # A direction is known as well as its singular value is apart from the next.
    gaps = -np.diff(p)
    if not np.any((gaps > 1e-13) & (gaps < 1e-6)):
        assert found.q == pytest.approx(q, abs=1e-8)
    assert np.sum(found.p) == pytest.approx(1, abs=1e-12)
    assert np.sum(found.q) == pytest.approx(1, abs=1e-12)
    assert np.all(np.diff(found.p) <= 0)
    assert found.overlap == pytest.approx(energies.overlap, rel=1e-9, abs=1e-14)
    if energies.overlap > 1e-9:  # below, the overlap has fewer digits
        assert found.lar == pytest.approx(energies.lar, abs=1e-9 + 1e-14 / energies.overlap)
    k = math.sqrt(found.weight_participation * found.input_participation) / found.coherence
    assert found.effective_dim == pytest.approx(k, rel=1e-12)
    assert 1 - 1e-12 <= found.weight_participation <= n * (1 + 1e-12)
    assert 1 - 1e-12 <= found.input_participation <= n * (1 + 1e-12)
    assert 0 <= found.coherence <= 1 + 1e-12


def test_q_is_spread_evenly_within_each_eigenspace():
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    W = np.diag([3.0, 3.0, 2.0, 1.0, 0.0, 0.0]) @ rotation
    X = rng.normal(size=(5, 6)) @ np.diag([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) @ rotation
    q = np.sum((X @ rotation.T) ** 2, axis=0) / np.sum(X**2)
    expected = [q[:2].mean()] * 2 + [q[2], q[3]] + [q[4:].mean()] * 2
    assert spectra(W, X).q == pytest.approx(np.array(expected), rel=1e-9)


def test_singular_values_that_differ_are_kept_apart():
    X = np.diag([1.0, 0.0, 0.0])
    apart = spectra(np.diag([1.0, 1.0 - 1e-8, 0.5]), X)
    assert apart.q == pytest.approx([1, 0, 0], abs=1e-9)
    together = spectra(np.diag([1.0, 1.0 - 1e-12, 0.5]), X)
    assert together.q == pytest.approx([0.5, 0.5, 0], abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("array", [np.asarray, lambda rows: jnp.asarray(rows, jnp.float32)], ids=["numpy", "jax"])
def test_an_overlap_of_which_nothing_but_rounding_is_left(array, seed):
    """W in one half of all directions and X in the other, but for a leak."""
    rng, n = np.random.default_rng(seed), 32
    basis = np.linalg.qr(rng.normal(size=(n, n)))[0]
    W = rng.normal(size=(40, 16)) @ basis[:, :16].T
    for leak in (1e-1, 0):
        X = np.concatenate([leak * rng.normal(size=(40, 16)), rng.normal(size=(40, 16))], axis=1) @ basis.T
        found = spectra(array(W), array(X))
        if leak:
            assert found.lar == pytest.approx(Energies.of(W, X).lar, abs=1e-3)
        else:
            assert abs(found.overlap) <= found.rounding
            assert math.isnan(found.lar)
            assert math.isnan(found.effective_dim)


def test_gram_matrices_add_over_rows_and_over_tokens(monkeypatch):
    rng = np.random.default_rng(1)
    W, X = rng.normal(size=(11, 5)), rng.normal(size=(7, 5))
    whole = spectra(W, X)
    parts = spectra_of_grams(gram(W[:4]) + gram(W[4:]), gram(X[:2]) + gram(X[2:]))
    assert parts.p == pytest.approx(whole.p, abs=1e-13)
    assert parts.q == pytest.approx(whole.q, abs=1e-12)
    assert gram(W) == pytest.approx(W.T @ W, rel=1e-12)
    assert host(gram(jnp.asarray(W))) == pytest.approx(W.T @ W, abs=1e-5)
    monkeypatch.setattr("logalign.mathematics.arrays.BLOCK_ELEMENTS", 7)
    assert gram(W) == pytest.approx(W.T @ W, rel=1e-12)


@pytest.mark.parametrize("array", [np.asarray, torch.tensor, jnp.asarray], ids=["numpy", "torch", "jax"])
def test_undefined_is_nan(array):
    rng = np.random.default_rng(2)
    W, X = rng.normal(size=(7, 5)), rng.normal(size=(4, 5))
    bad = X.copy()
    bad[1, 1] = np.nan
    infinite = W.copy()
    infinite[0, 0] = np.inf
    for found in (
        spectra(array(np.zeros((7, 5))), array(X)),
        spectra(array(W), array(np.zeros((4, 5)))),
        spectra(array(W), array(bad)),
        spectra(array(infinite), array(X)),
        spectra(array(W), array(X), mask=array(np.zeros(4, dtype=bool))),
    ):
        assert np.isnan(host(found.p)).all()
        assert np.isnan(host(found.q)).all()
        for name in ("overlap", "lar", "effective_dim", "weight_participation", "input_participation", "coherence"):
            assert math.isnan(getattr(found, name)), name


@pytest.mark.parametrize("scale", [1e-150, 1e-20, 1e20, 1e150])
def test_very_small_and_large_arrays(scale):
    rng = np.random.default_rng(3)
    W, X = rng.normal(size=(7, 5)), rng.normal(size=(4, 5))
    expected, found = spectra(W, X), spectra(scale * W, scale * X)
    assert found.p == pytest.approx(expected.p, rel=1e-12)
    assert found.q == pytest.approx(expected.q, rel=1e-10)
