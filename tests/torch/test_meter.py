"""A meter's sums, unpacked on the host, against the energies of all its calls in float64."""

import numpy as np
import pytest
import torch

from logalign import Energies
from logalign.errors import InputError
from logalign.torch.meter import Meter, unpack

FORMS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered")
CPU = torch.device("cpu")
RELATIVE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 2e-3}


def energies_of(meter):
    packed = meter.pack()
    return unpack(packed, packed.vector.numpy())


def layer_of(dtype, *, m=23, n=8, calls=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = (torch.randn(m, n, generator=generator) + 0.3).to(dtype)
    b = torch.randn(m, generator=generator).to(dtype)
    Xs = [(torch.randn(2, 5 + i, n, generator=generator) - 0.2).to(dtype) for i in range(calls)]
    return W, b, Xs


def assert_agree(found, exact, rel):
    assert (found.n, found.m, found.tokens, found.nonfinite) == (exact.n, exact.m, exact.tokens, exact.nonfinite)
    for name in ("weight", "input", "output", "logit_sum_energy", "output_sum_energy"):
        assert getattr(found, name) == pytest.approx(getattr(exact, name), rel=rel), name
    for name in ("row_sum", "input_sum"):
        expected = getattr(exact, name)
        assert getattr(found, name) == pytest.approx(expected, abs=rel * np.abs(expected).max()), name
    for form in FORMS:
        assert getattr(found, form) == pytest.approx(getattr(exact, form), abs=10 * rel), form


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_calls_pool_to_the_energies_of_all_tokens(dtype, biased, masked):
    W, b, Xs = layer_of(dtype)
    meter = Meter((23, 8), CPU)
    masks = [torch.arange(X.shape[0] * X.shape[1]).reshape(X.shape[:-1]) % 3 != 0 for X in Xs]
    for X, mask in zip(Xs, masks, strict=True):
        outputs = torch.nn.functional.linear(X, W, b if biased else None)
        meter.add(W, X, outputs=outputs, bias=b if biased else None, mask=mask if masked else None)
    X = torch.cat([X.reshape(-1, 8) for X in Xs])
    mask = torch.cat([mask.reshape(-1) for mask in masks])
    exact = Energies.of(W.double(), X.double(), mask=mask if masked else None)
    found, offered, was_masked = energies_of(meter)
    assert_agree(found, exact, RELATIVE[dtype])
    assert (offered, was_masked) == (X.shape[0], masked)


def test_outputs_are_measured_as_they_are():
    W, _, Xs = layer_of(torch.float64, calls=1)
    meter = Meter((23, 8), CPU)
    meter.add(W, Xs[0], outputs=2 * Xs[0] @ W.T)
    assert energies_of(meter)[0].output == pytest.approx(4 * (Xs[0] @ W.T).square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("tokens", [3, 400])
def test_without_outputs(tokens):
    generator = torch.Generator().manual_seed(0)
    W, X = (torch.randn(rows, 8, generator=generator, dtype=torch.float64) for rows in (50, tokens))
    b = torch.randn(50, generator=generator, dtype=torch.float64)
    meter = Meter((50, 8), CPU)
    meter.add(W, X, bias=b)
    assert_agree(energies_of(meter)[0], Energies.of(W, X), 1e-11)


def test_a_bias_far_larger_than_the_logits_is_taken_out():
    W, b, Xs = layer_of(torch.float64, calls=2)
    meter = Meter((23, 8), CPU)
    for X in Xs:
        meter.add(W, X, outputs=X @ W.T + 1e3 * b, bias=1e3 * b)
    exact = Energies.of(W, torch.cat([X.reshape(-1, 8) for X in Xs]))
    assert_agree(energies_of(meter)[0], exact, 1e-7)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [1e8, 1e5])
def test_undefined_where_a_bias_leaves_nothing_but_rounding(size, seed):
    W, b, Xs = layer_of(torch.float32, calls=1, seed=seed)
    meter = Meter((23, 8), CPU)
    meter.add(W, Xs[0], outputs=Xs[0] @ W.T + size * b, bias=size * b)
    found = energies_of(meter)[0]
    assert all(np.isnan(getattr(found, form)) for form in FORMS)
    assert found.reason == "nothing but rounding is left of the output energy"  # whatever the sign of what is left


def test_logits_of_zero_beside_a_bias_are_not_told_from_rounding():
    W, X, b = torch.eye(6)[:3], torch.eye(6)[3:], torch.tensor([0.1, 0.2, 0.3])
    meter = Meter((3, 6), CPU)
    meter.add(W, X, outputs=X @ W.T + b, bias=b)
    assert energies_of(meter)[0].reason == "nothing but rounding is left of the output energy"
    for given in ({}, {"outputs": X @ W.T}):
        meter = Meter((3, 6), CPU)
        meter.add(W, X, **given)
        assert energies_of(meter)[0].reason == "the output energy is zero"


def test_a_large_bias_takes_digits_of_the_output_alone():
    W, b, Xs = layer_of(torch.float32, calls=1)
    W[:, 7], Xs[0][..., 7] = 0, 100  # the weight ignores where most of the input energy is
    meter = Meter((23, 8), CPU)
    meter.add(W, Xs[0], outputs=Xs[0] @ W.T + 200 * b, bias=200 * b)
    exact = Energies.of(W.double(), Xs[0].double())
    assert energies_of(meter)[0].lar_token_centered == pytest.approx(exact.lar_token_centered, abs=5e-3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [8, 400], ids=["one by one", "Gram"])
@pytest.mark.parametrize("given", [False, True], ids=["without outputs", "with outputs"])
def test_what_rounding_leaves_of_products_that_cancel(given, tokens, dtype, seed):
    """W in one half of all directions and X in the other, but for a leak."""
    rng, n = np.random.default_rng(seed), 32
    basis = np.linalg.qr(rng.normal(size=(n, n)))[0]
    W = torch.tensor(rng.normal(size=(400, 16)) @ basis[:, :16].T).to(dtype)
    for leak in (1e-1, 1e-4, 1e-7, 0):
        coordinates = np.concatenate([leak * rng.normal(size=(tokens, 16)), rng.normal(size=(tokens, 16))], axis=1)
        X = torch.tensor(coordinates @ basis.T).to(dtype)
        exact = Energies.of(W.double(), X.double()).lar
        meter = Meter((400, n), CPU)
        meter.add(W, X, outputs=X @ W.T if given else None)
        found = energies_of(meter)[0]
        if np.isnan(found.lar):
            assert leak < 1e-1
            assert found.reason == "nothing but rounding is left of the output energy"
        else:
            assert leak > 0
            assert found.lar == pytest.approx(exact, abs=2e-3)


def test_calls_with_and_without_a_bias_do_not_pool():
    W, b, Xs = layer_of(torch.float64)
    meter = Meter((23, 8), CPU)
    meter.add(W, Xs[0], outputs=Xs[0] @ W.T + b, bias=b)
    with pytest.raises(InputError, match="to be with a bias in their outputs, or all without, found both"):
        meter.add(W, Xs[1])


def test_what_the_mask_leaves_out_may_be_nan():
    W, b, Xs = layer_of(torch.float64, calls=1)
    X = Xs[0].reshape(-1, 8)
    mask = torch.arange(X.shape[0]) != 3
    exact = Energies.of(W, X, mask=mask)
    X[3] = float("nan")
    meter = Meter((23, 8), CPU, spectral=True)
    meter.add(W, X, outputs=X @ W.T + b, bias=b, mask=mask)
    assert_agree(energies_of(meter)[0], exact, 1e-11)
    assert meter.grams[1].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["weight", "inputs", "outputs"])
def test_rows_that_are_not_finite_are_counted(bad, place):
    W, _, Xs = layer_of(torch.float32, calls=1)
    X = Xs[0].reshape(-1, 8)
    Z = X @ W.T
    {"weight": W, "inputs": X, "outputs": Z}[place][2, 1] = bad
    meter = Meter((23, 8), CPU)
    meter.add(W, X, outputs=Z)
    found = energies_of(meter)[0]
    assert found.nonfinite == 1
    assert found.reason == "1 rows of weight, inputs or outputs hold a NaN or an infinity"
    assert np.isnan(found.lar)


def test_nothing_kept_is_said_so():
    W, b, Xs = layer_of(torch.float32, calls=1)
    meter = Meter((23, 8), CPU)
    meter.add(W, Xs[0], outputs=Xs[0] @ W.T + b, bias=b, mask=torch.zeros(Xs[0].shape[:-1], dtype=torch.bool))
    found, offered, masked = energies_of(meter)
    assert (found.tokens, offered, masked) == (0, 10, True)
    assert found.reason == "no token: the mask keeps none"
    assert all(np.isnan(getattr(found, form)) for form in FORMS)


def test_gram_matrices_pool_over_calls():
    W, _, Xs = layer_of(torch.bfloat16)
    meter = Meter((23, 8), CPU, spectral=True)
    for X in Xs:
        meter.add(W, X, outputs=X @ W.T)
    X = torch.cat([X.reshape(-1, 8) for X in Xs]).double()
    torch.testing.assert_close(meter.grams[0], W.double().T @ W.double(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(meter.grams[1], X.T @ X, rtol=1e-12, atol=1e-12)
    assert Meter((23, 8), CPU).grams is None


def test_counts_beyond_what_float32_holds():
    meter = Meter((1, 2), CPU)
    X = torch.ones(1, 2).expand(2**24 + 1, 2)
    meter.add(torch.ones(1, 2), X, outputs=torch.full((1, 1), 2.0).expand(2**24 + 1, 1))
    found, offered, _ = energies_of(meter)
    assert (found.tokens, offered) == (2**24 + 1, 2**24 + 1)
    assert found.input == pytest.approx(2 * (2**24 + 1), rel=1e-7)


def test_tensors_that_require_gradients_leave_no_graph_behind():
    W = torch.nn.Parameter(torch.randn(23, 8))
    X = torch.randn(5, 8, requires_grad=True)
    meter = Meter((23, 8), CPU, spectral=True)
    meter.add(W, X, outputs=X @ W.T)
    assert not meter.pack().vector.requires_grad
    assert not any(each.requires_grad for each in meter.grams)


def test_autocast_does_not_reach_the_sums():
    W, _, Xs = layer_of(torch.float32)
    meters = [Meter((23, 8), CPU), Meter((23, 8), CPU)]
    for X in Xs:
        meters[0].add(W, X)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            meters[1].add(W, X)
    assert torch.equal(meters[0].pack().vector, meters[1].pack().vector)
