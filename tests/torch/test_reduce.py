"""Sums of squares against float64, at sizes where the shorter ways are percents off, and what they allocate."""

import functools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from logalign.torch import reduce

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@every_dtype
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 4), (1, 1), (3, 513)])
def test_row_energies(dtype, shape):
    rows = random(*shape, dtype=dtype)
    found = reduce.row_energies(rows)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, rows.double().square().sum(-1), rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("shape", [(1200, 4000), (2, 600, 4099)])
def test_large_bfloat16_tensors_are_summed_by_segments(shape):
    rows = random(*shape, dtype=torch.bfloat16)
    assert rows.numel() > reduce.SMALL
    exact = rows.double().square().sum(-1)
    found = reduce.row_energies(rows)
    torch.testing.assert_close(found, exact, rtol=2**-7, atol=0)
    assert found.sum().item() == pytest.approx(exact.sum().item(), rel=2e-4)


def test_a_sum_over_a_large_matrix_where_one_norm_over_the_whole_is_percents_off():
    rows = random(4096, 8192)
    exact = sum(block.double().square().sum().item() for block in rows.split(256))
    assert reduce.row_energies(rows).sum().item() == pytest.approx(exact, rel=1e-5)
    all_equal = torch.full((64, 16384), 0.1)  # rounding errors of one sign
    exact = all_equal.double().square().sum().item()
    assert reduce.row_energies(all_equal).sum().item() == pytest.approx(exact, rel=1e-6)


def test_float16_values_whose_squares_leave_its_range():
    rows = torch.full((3, 700), 3e4, dtype=torch.float16)
    torch.testing.assert_close(reduce.row_energies(rows), rows.double().square().sum(-1), rtol=1e-6, atol=0)
    rows = torch.full((3, 700), 1e-6, dtype=torch.float16)
    torch.testing.assert_close(reduce.row_energies(rows), rows.double().square().sum(-1), rtol=1e-6, atol=0)


@every_dtype
def test_a_row_that_is_not_finite_stays_so_and_alone(dtype):
    rows = random(6, 40, dtype=dtype)
    rows[1, 3], rows[4, 0] = float("nan"), float("inf")
    assert reduce.row_energies(rows).isfinite().tolist() == [True, False, True, True, False, True]


@every_dtype
def test_views_that_are_not_contiguous(dtype):
    rows = random(40, 6, 8, dtype=dtype).transpose(0, 1)[:, ::3]
    exact = rows.double().square().sum(-1)
    torch.testing.assert_close(reduce.row_energies(rows), exact, rtol=TOLERANCE[dtype], atol=0)


@every_dtype
def test_column_sum_product_and_gram(dtype, monkeypatch):
    rows, vector = random(301, 17, dtype=dtype), random(17, seed=1).double()
    wide = rows.double()
    near = {"rtol": 1e-5 if dtype != torch.float64 else 1e-12, "atol": 1e-4 if dtype != torch.float64 else 1e-11}

    def compare():
        for found, exact in (
            (reduce.column_sum(rows), wide.sum(0)),
            (reduce.product(rows, vector), wide @ vector),
        ):
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, exact, **near)
        gram = reduce.gram([rows[:3], rows[3:]], rows.shape[1], rows.device)
        torch.testing.assert_close(gram, wide.T @ wide, rtol=1e-12, atol=1e-11)

    compare()
    monkeypatch.setattr(reduce, "blocks", lambda rows: torch.split(rows, 7))
    compare()


def at_least_float32(*tensors):
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


WAYS = {
    "one by one": lambda W, X: reduce.output_energies([W], X).sum(),
    "Gram": lambda W, X: reduce.energy_by_gram(reduce.gram([W], W.shape[1], W.device, at_least_float32(W, X)), X)[0],
}


@every_dtype
@pytest.mark.parametrize(("m", "tokens", "n"), [(300, 200, 4), (30, 20, 64), (1, 1, 2)])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_energy_of_outputs_that_are_not_formed(way, dtype, m, tokens, n):
    W, X = random(m, n, dtype=dtype), random(tokens, n, dtype=dtype, seed=1)
    exact = (X.double() @ W.double().T).square().sum().item()
    if way is WAYS["one by one"]:  # as the layer itself would have computed it, so in its precision
        X = reduce.at_least_float32(X)
    assert way(W, X).item() == pytest.approx(exact, rel=1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_output_energy_of_weight_and_inputs_of_two_dtypes(way):
    W, X = random(300, 4, dtype=torch.bfloat16), random(200, 4, seed=1)
    exact = (X.double() @ W.double().T).square().sum().item()
    assert way(W, X).item() == pytest.approx(exact, rel=1e-6)
    assert way(X, W).item() == pytest.approx(exact, rel=1e-6)


def largest_allocation(function):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    return max(event.cpu_memory_usage for event in found.events())


@every_dtype
def test_no_copy_of_the_logits_is_made(dtype):
    logits = random(1024, 16_384, dtype=dtype)
    copied = largest_allocation(lambda: logits.clone())
    assert copied >= 0.9 * logits.nbytes  # the measure sees a copy
    assert largest_allocation(lambda: reduce.row_energies(logits)) < 0.2 * logits.nbytes


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_output_energy_builds_no_matrix_of_logits(way):
    W, X = random(16_384, 64), random(4096, 64)
    logits = 4 * W.shape[0] * X.shape[0]
    assert largest_allocation(lambda: way(W, X)) < 0.3 * logits


def test_segments_of_an_entry_each_are_as_far_off_as_documented():
    rows = torch.full((1200, 4096), 1.0039, dtype=torch.bfloat16)
    exact = rows.double().square().sum().item()
    assert reduce.row_energies(rows).sum().item() == pytest.approx(exact, rel=2**-8)
