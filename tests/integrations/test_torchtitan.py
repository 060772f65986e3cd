"""Readings in torchtitan's own Trainer, over real gloo processes, against one process and the public `lar()`."""

import socket
from collections.abc import Iterator

import pytest
import torch

from logalign import open_run
from tests.integrations import torchtitan_cases as cases
from tests.torch.workers import Workers

FORMS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered", "kept", "loss")


@pytest.fixture(scope="module")
def one() -> Iterator[Workers]:
    workers = Workers(1)
    yield workers
    workers.stop()


@pytest.fixture(scope="module")
def two() -> Iterator[Workers]:
    workers = Workers(2)
    yield workers
    workers.stop()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run(workers, folder, watched=True, **settings):
    return workers.run(cases.train, free_port(), folder, watched, settings)


def assert_true(results, truth):
    """Readings are those of one process, and nothing was told."""
    assert len(truth["readings"]) == cases.STEPS
    for result in results:
        assert not result["told"], result["told"]
        assert len(result["readings"]) == cases.STEPS
        for found, true in zip(result["readings"], truth["readings"], strict=True):
            for name in FORMS:
                assert found[name] == pytest.approx(true[name], rel=1e-4), name
            for name in ("tokens", "tokens_seen", "m", "n", "nonfinite", "reason", "step"):
                assert found[name] == true[name], name


def assert_same_weights(watched, unwatched):
    for found, other in zip(watched, unwatched, strict=True):
        assert found["weights"].keys() == other["weights"].keys()
        for name, weight in found["weights"].items():
            assert torch.equal(weight, other["weights"][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
def test_one_process_gives_what_lar_gives(one, tmp_path, chunked):
    watched = run(one, tmp_path / "watched", chunked=chunked)
    assert_true(watched, watched[0])
    assert [each["lar"] for each in watched[0]["readings"]] == pytest.approx(watched[0]["truths"], rel=1e-6)
    site = watched[0]["sites"]["unembedding"]
    assert (site["module"], site["mask"]) == ("lm_head", "monitor.mask()")
    assert watched[0]["readings"][0]["kept"] == pytest.approx(float((cases.data(0)[1] != -100).float().mean()))
    assert_same_weights(watched, run(one, tmp_path / "plain", False, chunked=chunked))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"fsdp": 2}, {"tp": 2}], ids=["fsdp", "tensor"])
def test_two_ranks(one, two, tmp_path, settings):
    watched = run(two, tmp_path / "watched", **settings)
    assert_true(watched, run(one, tmp_path / "one")[0])
    assert_same_weights(watched, run(two, tmp_path / "plain", False, **settings))


@pytest.mark.slow
def test_accumulated_batches_are_pooled(one, tmp_path):
    assert_true(run(one, tmp_path / "two", accumulate=2), run(one, tmp_path / "one")[0])


@pytest.mark.slow
def test_curves_are_in_torchtitans_own_logs_and_the_run_beside_them(one, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    readings = run(one, tmp_path)[0]["readings"]
    (events,) = tmp_path.glob("tb/*")
    log = EventAccumulator(str(events))
    log.Reload()
    curve = log.Scalars("logalign/lar")
    assert [each.step for each in curve] == [1, 2, 3]
    assert [each.value for each in curve] == pytest.approx([each["lar"] for each in readings])
    loss = [each.value for each in log.Scalars("loss_metrics/global_avg_loss")]
    assert [each["loss"] for each in readings] == pytest.approx(loss)
    assert [each.lar for each in open_run(tmp_path / "logalign").readings] == [each["lar"] for each in readings]


@pytest.mark.slow
def test_a_training_goes_on_from_torchtitans_checkpoint(one, tmp_path):
    whole = run(one, tmp_path / "whole", steps=4)[0]["readings"]
    run(one, tmp_path / "cut", steps=2, checkpoint=True)
    rest = run(one, tmp_path / "cut", steps=4, checkpoint=True)[0]["readings"]
    assert [each["step"] for each in rest] == [2, 3]
    for name in ("lar", "loss", "tokens_seen"):
        assert [each[name] for each in rest] == pytest.approx([each[name] for each in whole[2:]], rel=1e-4)
    assert [each.step for each in open_run(tmp_path / "cut/logalign").readings] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("graphs", "training.disable_cuda_graphs: expected True, found False"),
        ("backend", 'parallelism.spmd_backend: expected "partial_dtensor" under tensor parallelism'),
        ("config", "config: expected a torchtitan.trainer.Trainer.Config, found torchtitan.config"),
    ],
)
def test_a_wrong_set_up_is_told(one, tmp_path, what, expected):
    (error,) = one.run(cases.refused, free_port(), tmp_path, what)
    assert expected in error
