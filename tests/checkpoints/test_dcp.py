"""Folders of torch.distributed.checkpoint, as one process and as two really save them; metadata are not trusted."""

import os
import pickle
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from logalign.checkpoints import spectra_of, spectrum
from logalign.checkpoints.opening import open_checkpoint
from logalign.errors import CheckpointError
from tests.checkpoints import distributed_cases as cases
from tests.torch.workers import Workers


@pytest.fixture(scope="module")
def two():
    workers = Workers(2)
    yield workers
    workers.stop()


@pytest.fixture
def alone(tmp_path):
    """A checkpoint of one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": cases.weights(), "step": 7}, checkpoint_id=tmp_path / "alone")
    return tmp_path / "alone"


def assert_true(found, name):
    weight = cases.weights()[name].double().numpy()
    squares = np.zeros(weight.shape[1])
    squares[: min(weight.shape)] = np.linalg.svd(weight, compute_uv=False) ** 2
    assert (found.m, found.n) == weight.shape
    np.testing.assert_allclose(found.p, squares / squares.sum(), atol=1e-13)
    assert found.norm == pytest.approx(np.linalg.norm(weight), rel=1e-12)


def test_one_process(alone):
    found = spectra_of(alone, layers=["*"])
    assert (found.kind, found.weights[0].site) == ("torch.distributed.checkpoint, 1 file", "unembedding")
    for weight in found.weights:
        assert_true(weight, weight.name.removeprefix("model."))


@pytest.mark.parametrize("rows", [7, 1000])
def test_two_processes_with_fsdp(two, tmp_path, monkeypatch, rows):
    two.run(cases.fsdp, str(tmp_path / "fsdp"))
    monkeypatch.setattr(spectrum, "BLOCK_ELEMENTS", rows * cases.COLUMNS)
    found = spectra_of(tmp_path / "fsdp", layers=["*"])
    assert found.kind == "torch.distributed.checkpoint, 2 files"
    (head,) = found.weights
    assert_true(head, "lm_head.weight")
    assert found.left_out["of an optimizer"] >= 2


@pytest.mark.parametrize("elements", [50, 1 << 20])
def test_two_processes_with_dtensors_by_rows_and_by_columns(two, tmp_path, monkeypatch, elements):
    two.run(cases.sharded, str(tmp_path / "sharded"))
    monkeypatch.setattr(spectrum, "BLOCK_ELEMENTS", elements)
    found = spectra_of(tmp_path / "sharded", layers=["*"])
    assert len(found.weights) == 3
    for weight in found.weights:
        assert_true(weight, weight.name)


def test_the_folder_of_a_training_that_holds_it(alone, tmp_path):
    shutil.move(alone, tmp_path / "checkpoint-30" / "pytorch_model_fsdp_0")
    found = spectra_of(tmp_path / "checkpoint-30")
    assert found.step == 30
    assert_true(found.weights[0], "lm_head.weight")


def test_a_file_of_it_points_to_its_folder(alone):
    for name in (".metadata", "__0_0.distcp"):
        with pytest.raises(CheckpointError, match=f"expected the folder that this file is in: give {alone}"):
            open_checkpoint(alone / name)


def test_of_a_matrix_that_was_left_nothing_is_kept(alone):
    opened = open_checkpoint(alone)
    opened.rows("model.up.weight", 0, 1)
    opened.rows("model.lm_head.weight", 0, 1)
    assert [name for name, _ in opened._loaded] == ["model.lm_head.weight"]


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_metadata_that_run_code_are_refused_and_do_not_run(alone, tmp_path):
    evil = pickle.dumps(Runs(f"touch {tmp_path / 'ran'}"))
    (alone / ".metadata").write_bytes(evil)
    with pytest.raises(CheckpointError, match=r"UnpicklingError: posix\.system; it is damaged, .* not to be trusted"):
        open_checkpoint(alone)
    assert not (tmp_path / "ran").exists()
    pickle.loads(evil)
    assert (tmp_path / "ran").exists(), "it would have run"


def rewritten(folder, change):
    """The folder, after a change of its metadata."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def places(metadata):
    return [info for index, info in metadata.storage_data.items() if index.fqn == "model.lm_head.weight"]


def elsewhere(metadata):
    for info in places(metadata):
        object.__setattr__(info, "relative_path", "../secret.distcp")


def absolute(metadata):
    for info in places(metadata):
        object.__setattr__(info, "relative_path", "/etc/passwd")


def gone(metadata):
    for info in places(metadata):
        object.__setattr__(info, "relative_path", "__9_0.distcp")


def compressed(metadata):
    for info in places(metadata):
        object.__setattr__(info, "transform_descriptors", ["stream.zstd"])


def without_place(metadata):
    for index in [index for index in metadata.storage_data if index.fqn == "model.lm_head.weight"]:
        del metadata.storage_data[index]


def smaller(metadata):
    entry = metadata.state_dict_metadata["model.lm_head.weight"]
    object.__setattr__(entry, "size", torch.Size([cases.ROWS + 1, cases.COLUMNS]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (elsewhere, "leads out of it"),
        (absolute, "leads out of it"),
        (gone, "found nothing there; is the checkpoint complete"),
        (compressed, r"found model.lm_head.weight transformed by stream.zstd; save it without extensions"),
        (without_place, r"expected a place for model.lm_head.weight at \(0, 0\), found none"),
        (smaller, r"expected chunks that make up model.lm_head.weight \(102, 24\), found 1 with 2424 numbers"),
        (lambda metadata: setattr(metadata, "storage_data", None), "TypeError: no Metadata of torch.distributed"),
    ],
)
def test_metadata_that_are_wrong(alone, tmp_path, change, message):
    (tmp_path / "secret.distcp").write_bytes(b"x" * 100_000)
    with pytest.raises(CheckpointError, match=message):
        spectra_of(rewritten(alone, change))


@pytest.mark.parametrize("data", [b"", b"\x80\x04garbage", pickle.dumps([1, 2])])
def test_damaged_metadata(alone, data):
    (alone / ".metadata").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"\.metadata: expected the metadata of torch\.distributed\.checkpoint"):
        open_checkpoint(alone)


def test_chunks_that_were_cut_off_or_overwritten(alone):
    file = alone / "__0_0.distcp"
    data = file.read_bytes()
    file.write_bytes(data[:-100] if b"down" not in data[-3000:] else data[:2000])
    with pytest.raises(CheckpointError, match="it was cut off"):
        open_checkpoint(alone)
    file.write_bytes(b"\0" * len(data))
    with pytest.raises(
        CheckpointError, match=r"__0_0.distcp: expected model.lm_head.weight, F32 \(101, 24\), found dam"
    ):
        spectra_of(alone)


def test_a_chunk_that_holds_another_tensor(alone):
    def swap(metadata):
        (head,) = places(metadata)
        (other,) = (info for index, info in metadata.storage_data.items() if index.fqn == "model.up.weight")
        object.__setattr__(head, "offset", other.offset)
        object.__setattr__(head, "length", other.length)

    with pytest.raises(CheckpointError, match=r"found damage \(torch.float32 \(40, 16\)\)"):
        spectra_of(rewritten(alone, swap))


PEAK = """
import re, sys
from pathlib import Path
from logalign.checkpoints import dcp, spectra_of, spectrum
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
spectrum.BLOCK_ELEMENTS = 1 << 18
spectra_of(sys.argv[1], layers=["small"])
base = peak()
spectra_of(sys.argv[1], layers=[sys.argv[2]])
print(peak() - base)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("name", ["tall", "wide"])
def test_memory_is_that_of_one_matrix_and_a_fixed_part(tmp_path, name):
    size = 96 << 20
    tall = torch.randn(size // 4 // 128, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            {"tall": tall, "other": tall + 1, "wide": tall.T.contiguous(), "small": torch.eye(128)},
            checkpoint_id=tmp_path / "large",
        )
    command = [sys.executable, "-c", PEAK, str(tmp_path / "large"), name]
    found = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.9 * size < found < 1.4 * size
