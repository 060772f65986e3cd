"""Spectra of stored weights against NumPy's SVD, against oracles of 50 digits, and how much memory they take."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

import logalign
from logalign.checkpoints import spectra_of, spectrum

CASES = json.loads((Path(__file__).parents[1] / "data" / "lar_cases.json").read_text())


def spectrum_from(path, weight, **options):
    save_file({"lm_head.weight": np.ascontiguousarray(weight)}, path / "model.safetensors")
    return spectra_of(path / "model.safetensors", **options).weights[0]


def assert_as_svd(found, weight, *, rel):
    """`weight` is [m, n]."""
    weight = np.asarray(weight, dtype=np.float64)
    m, n = weight.shape
    squares = np.zeros(n)
    squares[: min(m, n)] = np.linalg.svd(weight, compute_uv=False) ** 2
    p = squares / squares.sum()
    assert (found.m, found.n) == (m, n)
    np.testing.assert_allclose(found.p, p, atol=rel * p[0])
    assert found.participation == pytest.approx(1 / (p**2).sum(), rel=rel)
    assert found.stable_rank == pytest.approx(squares.sum() / squares[0], rel=rel)
    assert found.norm == pytest.approx(np.linalg.norm(weight), rel=rel)
    assert found.lar_bound == pytest.approx(1 - math.log(1 / p[0], n) / 2, rel=rel)
    assert (found.nonfinite, found.reason) == (0, None)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16), (1, 5), (300, 2)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_spectra_are_those_of_the_svd(tmp_path, shape, dtype):
    weight = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    assert_as_svd(spectrum_from(tmp_path, weight), weight, rel=1e-12)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_spectra_of_dtypes_that_numpy_lacks(tmp_path, shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_torch_file({"lm_head.weight": weight}, tmp_path / "model.safetensors")
    found = spectra_of(tmp_path / "model.safetensors").weights[0]
    assert_as_svd(found, weight.double().numpy(), rel=1e-12)


@pytest.mark.parametrize("shape", [(300, 24), (24, 300)])
def test_many_blocks_give_what_one_gives(tmp_path, monkeypatch, shape):
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    monkeypatch.setattr(spectrum, "BLOCK_ELEMENTS", 24 * 7)
    assert_as_svd(spectrum_from(tmp_path, weight), weight, rel=1e-12)


@pytest.mark.parametrize("shape", [(3000, 24), (24, 3000)])
@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25], ids=str)
def test_large_matrices_are_summed_in_float32_and_are_right_to_a_millionth(tmp_path, monkeypatch, shape, size):
    weight = (size * np.random.default_rng(2).standard_normal(shape)).astype(np.float32)
    monkeypatch.setattr(spectrum, "SMALL", 0)
    monkeypatch.setattr(spectrum, "BLOCK_ELEMENTS", 24 * 512)
    found = spectrum_from(tmp_path, weight)
    assert_as_svd(found, weight, rel=1e-6)
    if size == 1:
        weight64 = weight.astype(np.float64)
        exact = np.linalg.norm(weight64)
        assert abs(found.norm / exact - 1) > 1e-13, "the products were taken in float64"


@pytest.mark.parametrize("case", [case for case in CASES if len(case["weight"][0]) > 1], ids=lambda case: case["name"])
def test_no_oracle_has_a_lar_above_the_bound(tmp_path, case):
    found = spectrum_from(tmp_path, np.array(case["weight"]))
    assert found.norm**2 == pytest.approx(case["energies"]["weight"], rel=1e-12)
    if case["lar"] is not None:
        assert case["lar"] <= found.lar_bound + 1e-12


def test_participation_is_that_of_the_spectra_with_inputs(tmp_path):
    generator = np.random.default_rng(3)
    weight, inputs = generator.standard_normal((20, 9)), generator.standard_normal((50, 9))
    found, both = spectrum_from(tmp_path, weight), logalign.spectra(weight, inputs)
    assert found.participation == pytest.approx(both.weight_participation, rel=1e-12)
    np.testing.assert_allclose(found.p, both.p, atol=1e-14)


def test_the_bound_is_reached_by_inputs_in_the_strongest_direction(tmp_path):
    weight = np.random.default_rng(4).standard_normal((20, 9))
    strongest = np.linalg.svd(weight)[2][:1]
    assert spectrum_from(tmp_path, weight).lar_bound == pytest.approx(logalign.lar(weight, strongest), rel=1e-12)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_rows_that_are_not_finite_are_counted_and_nothing_is_made_of_them(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(spectrum, "BLOCK_ELEMENTS", 12)
    weight = np.ones(shape, dtype=np.float32)
    weight[1, 0], weight[1, 5], weight[4, 3] = np.nan, np.inf, -np.inf
    found = spectrum_from(tmp_path, weight)
    assert (found.nonfinite, found.reason) == (2, "2 stored rows of the weight hold a NaN or an infinity")
    assert (found.p, found.participation, found.stable_rank, found.lar_bound, found.norm) == (None,) * 5


def test_a_weight_of_zeros_has_no_spectrum(tmp_path):
    found = spectrum_from(tmp_path, np.zeros((4, 3), dtype=np.float32))
    assert (found.reason, found.norm, found.p, found.lar_bound) == ("the weight is zero", 0.0, None, None)


def test_energies_beyond_float64_have_no_spectrum(tmp_path):
    found = spectrum_from(tmp_path, np.full((4, 3), 1e200))
    assert (found.reason, found.norm, found.p) == ("the energy of the weight is not finite", None, None)


def test_fan_in_1_has_no_bound(tmp_path):
    found = spectrum_from(tmp_path, np.ones((4, 1), dtype=np.float32))
    assert (found.lar_bound, found.stable_rank, found.reason) == (None, 1.0, "fan-in 1: log_n is undefined")


@pytest.mark.parametrize(
    ("scales", "reason", "has_p"),
    [
        (torch.tensor([2.0]), None, True),
        (torch.ones(2, 2), "8-bit codes with 4 scales in lm_head.weight_scale_inv, which are not applied", False),
    ],
)
def test_8_bit_weights_with_scales_beside_them(tmp_path, scales, reason, has_p):
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    file = tmp_path / "model.safetensors"
    save_torch_file({"lm_head.weight": weight, "lm_head.weight_scale_inv": scales}, file)
    found = spectra_of(file, layers=["lm_head"]).weights[0]
    assert (found.reason, found.p is not None, found.norm) == (reason, has_p, None)


def test_the_record_is_plain(tmp_path):
    record = spectrum_from(tmp_path, np.eye(3)).record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["participation"], record["stable_rank"], record["lar_bound"]) == (
        pytest.approx(3),
        pytest.approx(3),
        pytest.approx(0.5),
    )


PEAK = """
import re, sys
from pathlib import Path
from logalign.checkpoints import spectra_of, spectrum
def peak():
    # Not ru_maxrss, which begins with that of the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
spectrum.BLOCK_ELEMENTS = 1 << 18
base = peak()
spectra_of(sys.argv[1], layers=sys.argv[2:])
print(peak() - base)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_memory_is_that_of_one_matrix_and_a_fixed_part(tmp_path):
    file = tmp_path / "model.safetensors"
    generator = np.random.default_rng(0)
    tall = generator.standard_normal((1 << 17, 128), dtype=np.float32)  # 64 MiB each
    save_file({f"layers.{i}.up.weight": tall for i in range(3)} | {"down.weight": tall.T.copy()}, file)

    def peak(*patterns):
        command = [sys.executable, "-c", PEAK, str(file), *patterns]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert peak("*.up.*") < 32 << 20, "by rows, a block at a time"
    assert 64 << 20 < peak("down.*") < 96 << 20, "the wide one as it is stored"
