"""Pickled checkpoints: tensors alone are read, and nothing else is run."""

import json
import os
from fractions import Fraction

import numpy as np
import pytest
import torch

from logalign.checkpoints import spectra_of
from logalign.checkpoints.opening import open_checkpoint
from logalign.errors import CheckpointError
from tests.checkpoints.conftest import llama


class Marker:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def state():
    return llama().state_dict()


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model": s, "step": 3, "lrs": [0.1]}, lambda s: {"a": {"b": s}}]
)
def test_nested_dictionaries_of_tensors(tmp_path, state, wrap):
    torch.save(wrap(state), tmp_path / "x.pt")
    opened = open_checkpoint(tmp_path / "x.pt")
    assert len(opened.tensors) == len(state)
    (head,) = spectra_of(opened).weights
    assert head.name.endswith("lm_head.weight")
    assert head.norm == pytest.approx(float(state["lm_head.weight"].double().norm()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float64], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_numbers_are_those_of_the_tensor(tmp_path, dtype, turned):
    weight = torch.randn(10, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = weight.T if turned else weight
    torch.save({"lm_head.weight": weight}, tmp_path / "x.pth")
    (head,) = spectra_of(tmp_path / "x.pth").weights
    squares = np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2
    np.testing.assert_allclose(head.p[:6], squares / squares.sum(), atol=1e-13)


def test_a_folder_of_pickled_shards(tmp_path, state):
    names = list(state)
    files = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in names if files[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    opened = open_checkpoint(tmp_path)
    assert (set(opened.tensors), opened.kind) == (set(names), "2 pickled files, weights_only")
    files[names[0]] = "../elsewhere.bin"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(CheckpointError, match="expected names of files in its own folder"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["x.pt", "pytorch_model.bin", "x.ckpt"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, state, name):
    torch.save({"model": state, "extra": Marker(tmp_path / "ran")}, tmp_path / name)
    with pytest.raises(
        CheckpointError, match=r"found posix\.mkdir, which could run any code; convert it to safetensors"
    ):
        open_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / name, weights_only=False)
    assert (tmp_path / "ran").exists(), "it would have run"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda state: {"args": Fraction(1, 3), **state},
            "found fractions.Fraction, which could run any code",
        ),
        (lambda state: llama(), "found transformers.models.llama.modeling_llama.LlamaForCausalLM, which"),
    ],
)
def test_what_weights_only_does_not_take_is_named(tmp_path, state, content, message):
    torch.save(content(state), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "x.pt")


def test_files_of_before_pytorch_1_6(tmp_path, state):
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"mmap=True\), found one of before PyTorch 1.6, or damage; convert it"):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("data", [b"", b"x" * 50, b"PK\x03\x04" + b"x" * 50, None])
def test_damaged_files(tmp_path, state, data):
    torch.save(state, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(data if data is not None else (tmp_path / "x.pt").read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"x\.pt: expected a file of torch\.save"):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("value", [{}, {"a": 1}, [torch.ones(2, 2)], {"a": torch.eye(3).to_sparse()}])
def test_no_matrix_in_it(tmp_path, value):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="expected a floating-point weight of two axes, found no tensor at all"):
        spectra_of(tmp_path / "x.pt", layers=["*"])
