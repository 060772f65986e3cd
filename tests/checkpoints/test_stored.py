"""Stored numbers against PyTorch's own conversions, and paths that lead out of a checkpoint."""

import numpy as np
import pytest
import torch

from logalign.checkpoints.pickled import DTYPES, raw
from logalign.checkpoints.stored import EIGHT_BIT, STORED_AS, decoded, inside
from logalign.errors import CheckpointError


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_are_those_that_pytorch_reads(dtype):
    values = torch.randn(50, 7, dtype=torch.float64).to(dtype)
    name = DTYPES[dtype]
    stored = raw(values, name)
    assert stored.dtype == STORED_AS[name]
    assert decoded(stored, name).dtype == (np.float64 if name == "F64" else np.float32)
    np.testing.assert_array_equal(decoded(stored, name), values.double().numpy())


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_every_code_of_the_8_bit_formats(name):
    dtype = {name: dtype for dtype, name in DTYPES.items()}[name]
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(decoded(codes.numpy(), name), codes.view(dtype).float().numpy())


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "own").write_text("own")
    (tmp_path / "secret").write_text("secret")
    return folder


def test_files_and_links_within_the_folder_are_taken(folder):
    (folder / "link").symlink_to("own")
    assert inside(folder / "link", folder).read_text() == "own"


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "step/../../secret"])
def test_a_link_that_leaves_the_folder_is_refused(folder, target):
    (folder / "link").symlink_to(target)
    with pytest.raises(CheckpointError, match="leads out of it"):
        inside(folder / "link", folder)


def test_a_link_to_nothing_and_a_folder_are_refused(folder):
    (folder / "link").symlink_to("gone")
    (folder / "inner").mkdir()
    with pytest.raises(CheckpointError, match="found nothing there; is the checkpoint complete"):
        inside(folder / "link", folder)
    with pytest.raises(CheckpointError, match="expected a file, found something else"):
        inside(folder / "inner", folder)


def test_blobs_of_the_hub_cache_are_taken_and_nothing_beside_them(tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "9f8e").write_text("blob")
    (repository / "other").write_text("other")
    (snapshot / "good").symlink_to("../../blobs/9f8e")
    (snapshot / "bad").symlink_to("../../other")
    assert inside(snapshot / "good", snapshot).read_text() == "blob"
    with pytest.raises(CheckpointError, match="leads out of it"):
        inside(snapshot / "bad", snapshot)


def test_a_hub_cache_whose_blobs_are_a_link_elsewhere_is_refused(tmp_path, folder):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").symlink_to(folder)
    (snapshot / "file").symlink_to("../../blobs/own")
    with pytest.raises(CheckpointError, match="leads out of it"):
        inside(snapshot / "file", snapshot)
