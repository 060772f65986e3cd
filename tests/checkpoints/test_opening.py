"""What is taken for a checkpoint, in which order, and what is refused with one clear error."""

import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from logalign.checkpoints import spectra_of
from logalign.checkpoints.opening import expanded, open_checkpoint, step_of
from logalign.errors import CheckpointError
from tests.checkpoints.conftest import gpt2, llama

WEIGHT = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)


def write(path, *, name="lm_head.weight", weight=WEIGHT):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight}, path)
    return path


def header_only(path, entries, data=b""):
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.mark.parametrize("model", [gpt2, llama])
@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_what_transformers_saved_whole_and_in_shards(saved, model, size):
    model = model()
    folder = saved(model, max_shard_size=size)
    assert (folder / "model.safetensors.index.json").exists() == (size == "20KB")
    opened = open_checkpoint(folder)
    state = model.state_dict()
    assert set(opened.tensors) == set(state) - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    for name, stored in opened.tensors.items():
        assert stored.shape == tuple(state[name].shape)
        if len(stored.shape) == 2:
            np.testing.assert_array_equal(opened.rows(name, 3, 8), state[name][3:8].numpy())


def test_the_index_can_be_named_itself(saved):
    folder = saved(llama(), max_shard_size="20KB")
    by_folder, by_index = spectra_of(folder), spectra_of(folder / "model.safetensors.index.json")
    assert by_folder.weights[0].norm == by_index.weights[0].norm
    assert by_index.model == "LlamaForCausalLM"


def test_files_without_an_index_are_one_checkpoint(tmp_path):
    write(tmp_path / "a.safetensors")
    write(tmp_path / "b.safetensors", name="other.weight")
    assert set(open_checkpoint(tmp_path).tensors) == {"lm_head.weight", "other.weight"}
    write(tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match=r"expected each tensor in one file, found lm_head.weight in a\.safet"):
        open_checkpoint(tmp_path)


def test_a_series_is_found_in_the_order_of_its_steps(tmp_path):
    for name in ("checkpoint-1000", "checkpoint-20", "checkpoint-300"):
        write(tmp_path / name / "model.safetensors")
    (tmp_path / "logs-5").mkdir()
    (tmp_path / "checkpoint-7").mkdir()  # begun, and nothing in it
    assert [path.name for path in expanded([tmp_path])] == ["checkpoint-20", "checkpoint-300", "checkpoint-1000"]
    write(tmp_path / "model.safetensors")
    assert expanded([tmp_path]) == [tmp_path], "a folder that is a checkpoint is no series"


def test_files_with_steps_in_their_names_are_a_series(tmp_path):
    for name in ("step_300.safetensors", "step_20.safetensors", "step_100.pt"):
        write(tmp_path / name)
    assert [path.name for path in expanded([tmp_path])] == [
        "step_20.safetensors",
        "step_100.pt",
        "step_300.safetensors",
    ]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-100", 100),
        ("step_200", 200),
        ("global_step400", 400),
        ("iter_0000500", 500),
        ("epoch=3-step=1200.ckpt", 1200),
        ("pythia-step7000", 7000),
        ("600", 600),
        ("gpt2", None),
        ("llama-7b", None),
        ("overstep", None),
    ],
)
def test_steps_are_read_from_names(tmp_path, name, step):
    (tmp_path / name).mkdir()
    assert step_of(tmp_path / name) == step


def test_the_step_of_a_file_is_that_of_its_folder_and_trainer_state_goes_first(tmp_path):
    file = write(tmp_path / "checkpoint-100" / "model.safetensors")
    assert step_of(file) == 100
    (file.parent / "trainer_state.json").write_text('{"global_step": 99}')
    assert step_of(file.parent) == 99


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda at: None, "found nothing there"),
        (lambda at: at.mkdir(), "found an empty folder"),
        (lambda at: (at.mkdir(), (at / "notes.txt").write_text("x")), r"steps in their names, found notes\.txt"),
        (lambda at: at.write_text("x"), r"found a file of another kind \(no ending\)"),
        (lambda at: os.mkfifo(at), "found something that is no regular file"),
        (lambda at: (at.mkdir(), (at / "config.json").write_text("[")), r"config\.json: expected a JSON object, found"),
        (lambda at: (at.mkdir(), (at / "__0_0.distcp").write_text("x")), "the saving of this checkpoint was not compl"),
        (lambda at: (at.mkdir(), os.mkfifo(at / "model.safetensors")), "expected a file, found something else"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, prepare, message):
    prepare(tmp_path / "thing")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "thing")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-3], "not fully covered"),
        (lambda data: data[:20], "found damage"),
        (lambda data: b"", "found damage"),
        (lambda data: b"\xff" * 100, "found damage"),
        (lambda data: data + b"more", "not fully covered"),
        (lambda data: data.replace(b'"F32"', b'"F99"'), "unknown variant `F99`"),
        (lambda data: data.replace(b"[12,5]", b"[13,5]"), "invalid shape"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    file = write(tmp_path / "model.safetensors")
    data = damage(file.read_bytes())
    assert data != file.read_bytes()
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"(?s)model\.safetensors: expected a safetensors file.*{message}"):
        open_checkpoint(file)


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        ({}, b"", "expected a floating-point weight of two axes, found no tensor at all"),
        (
            {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
            b"12345678",
            "found 1 of other than two axes",
        ),
        ({"a": {"dtype": "F32", "shape": [2, 0], "data_offsets": [0, 0]}}, b"", "found 1 empty"),
        (
            {"lm_head.weight": {"dtype": "U8", "shape": [2, 2], "data_offsets": [0, 4]}},
            b"1234",
            "found 1 of dtype U8, whose numbers are no weights as they stand",
        ),
    ],
)
def test_a_checkpoint_without_a_matrix_is_refused(tmp_path, entries, data, message):
    file = header_only(tmp_path / "model.safetensors", entries, data)
    with pytest.raises(CheckpointError, match=message):
        spectra_of(file, layers=["*"])


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "", "a\\b", "\0"]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    write(tmp_path / "secret.safetensors")
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match="expected names of files in its own folder, found "):
        open_checkpoint(index(tmp_path / "model", {"lm_head.weight": name}))


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(tmp_path):
    write(tmp_path / "secret.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model-00001-of-00001.safetensors").symlink_to("../secret.safetensors")
    with pytest.raises(CheckpointError, match="leads out of it"):
        open_checkpoint(index(tmp_path / "model", {"lm_head.weight": "model-00001-of-00001.safetensors"}))
    (tmp_path / "model" / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="leads out of it"):
        open_checkpoint(tmp_path / "model")


def test_a_link_that_the_user_names_is_followed(tmp_path):
    file = write(tmp_path / "real" / "model.safetensors")
    (tmp_path / "file.safetensors").symlink_to(file)
    (tmp_path / "folder").symlink_to(file.parent)
    assert spectra_of(tmp_path / "file.safetensors").weights[0].m == 12
    assert spectra_of(tmp_path / "folder").weights[0].m == 12


def test_a_snapshot_in_the_cache_of_the_hub_is_read(saved, tmp_path):
    folder = saved(llama(), max_shard_size="20KB")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"blob{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{i}")
    assert spectra_of(snapshot).weights[0].m == llama().config.vocab_size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a JSON object, found damage"),
        ("[]", "expected a JSON object, found list"),
        ("[" * 100_000, "expected a JSON object, found damage"),
        ('{"weight_map": {}}', "expected an object weight_map"),
        ('{"weight_map": {"a": 1}}', "expected an object weight_map"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "found nothing there; is the checkpoint complete"),
        ('{"weight_map": {"a": "one.safetensors"}}', "expected a in one.safetensors, found it not there"),
    ],
)
def test_a_damaged_index_or_missing_shards_are_refused(tmp_path, content, message):
    write(tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_shards_without_their_index_must_all_be_there(saved):
    folder = saved(llama(), max_shard_size="20KB")
    (folder / "model.safetensors.index.json").unlink()
    shards = sorted(folder.glob("*.safetensors"))
    assert len(open_checkpoint(folder).tensors) == len(llama().state_dict())
    shards[-1].unlink()
    with pytest.raises(CheckpointError, match=rf"expected {len(shards)} files like .* found {len(shards) - 1}"):
        open_checkpoint(folder)


def test_a_file_that_is_cut_off_after_it_was_opened(tmp_path):
    file = write(tmp_path / "model.safetensors")
    opened = open_checkpoint(file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"expected 60 numbers of lm_head.weight, found 58; it was cut off"):
        spectra_of(opened)
