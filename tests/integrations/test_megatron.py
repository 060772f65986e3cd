"""Readings of Megatron-core's own model over real gloo processes, against one process and the public `lar()`."""

from collections.abc import Iterator

import pytest
import torch

from logalign.torch.masks import TokenMask
from tests.integrations import megatron_cases as cases
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


@pytest.fixture(scope="module")
def four() -> Iterator[Workers]:
    workers = Workers(4)
    yield workers
    workers.stop()


def run(workers, watched=True, **settings):
    return workers.run(cases.train_with, watched, settings)


def assert_true(results, truth):
    """Readings are those of one process, at every rank that has the layer, and nothing was told."""
    assert len(truth["readings"]) == cases.STEPS
    for result in results:
        assert not result["told"], result["told"]
        assert len(result["readings"]) == cases.STEPS
        for found, true in zip(result["readings"], truth["readings"], strict=True):
            for name in FORMS:
                assert found[name] == pytest.approx(true[name], rel=1e-5), name
            for name in ("tokens", "tokens_seen", "m", "n", "nonfinite", "reason"):
                assert found[name] == true[name], name


def assert_same_weights(watched, unwatched):
    for found, other in zip(watched, unwatched, strict=True):
        assert found["weights"].keys() == other["weights"].keys()
        for name, weight in found["weights"].items():
            assert torch.equal(weight, other["weights"][name]), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_one_process_gives_what_lar_gives(one, tied):
    watched = run(one, tied=tied)
    assert_true(watched, watched[0])
    readings, site = watched[0]["readings"], watched[0]["sites"]["unembedding"]
    assert [each["lar"] for each in readings] == pytest.approx(watched[0]["truths"], rel=1e-6)
    assert (readings[0]["m"], site["m"]) == (cases.VOCABULARY, cases.PADDED)
    assert site["tied_to"] == (["embedding.word_embeddings.weight"] if tied else [])
    assert site["mask"] == "forward argument 'loss_mask' != 0"
    assert readings[0]["kept"] == pytest.approx(float(cases.data(0)[2].mean()))
    assert_same_weights(watched, run(one, False, tied=tied))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"cp": 2}, {"tp": 2}, {"tp": 2, "sequence_parallel": True}],
    ids=["data", "context", "tensor", "sequence"],
)
def test_two_ranks(one, two, settings, tied):
    watched = run(two, tied=tied, **settings)
    assert_true(watched, run(one, tied=tied)[0])
    assert_same_weights(watched, run(two, False, tied=tied, **settings))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"tp": 2}, {"tp": 2, "cp": 2, "sequence_parallel": True}, {"tp": 2, "pp": 2}, {"pp": 2}],
    ids=["tensor x data", "sequence x context", "tensor x pipeline", "pipeline x data"],
)
def test_two_by_two(one, four, settings):
    watched = run(four, micro=2, **settings)
    assert_same_weights(watched, run(four, False, micro=2, **settings))
    have = [result for result in watched if result["readings"]]
    assert len(have) == 4 // settings.get("pp", 1)
    truth = run(one, micro=2)[0]
    # The loss that a rank hands over is that of its last micro-batch.
    assert_true(have, truth)


def test_the_last_stage_of_a_pipeline_measures_and_the_first_does_nothing(one, two):
    first, last = run(two, pp=2)
    assert first["readings"] == first["told"] == []
    assert_true([last], run(one)[0])
    assert_same_weights([first, last], run(two, False, pp=2))


def test_whole_logits_at_every_rank(one, two):
    for result in run(two, tp=2, gather=True):
        # The loss of Megatron is of split logits: from the second step on the training is another.
        assert result["readings"][0]["lar"] == pytest.approx(run(one)[0]["readings"][0]["lar"], rel=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_main_call_counts_where_further_tokens_are_predicted(one, tied):
    result = run(one, mtp=1, tied=tied)[0]
    assert not result["told"]
    # The layer that predicts the token after the next one is called first.
    assert [each["lar"] for each in result["readings"]] == pytest.approx(result["truths"][1::2], rel=1e-6)


@pytest.mark.parametrize("settings", [{"mask": "monitor"}, {"wrapped": True}], ids=["monitor.mask", "wrapped"])
def test_a_mask_by_hand_and_a_wrapped_model(one, settings):
    assert_true(run(one, **settings), run(one)[0])


def test_without_a_loss_mask_every_label_counts(one):
    reading = run(one, mask="none")[0]["readings"][0]
    assert (reading["tokens"], reading["kept"]) == (cases.BATCH * cases.LENGTH, 1.0)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("no output layer", "one of which has an output_layer"),
        ("two", "found 2 with one"),
        ("row-parallel", "found RowParallelLinear, whose columns are"),
        ("vocabulary", "vocabulary=65: expected at most the rows of layer 'output_layer', found (64, 16)"),
        ("tokens", "pass watch(mesh=...) the data-parallel axes alone"),
        ("mask", "mask: expected one value for each of the tokens (4, 8)"),
    ],
)
def test_a_wrong_set_up_is_told(two, what, expected):
    for error in two.run(cases.refused, what):
        assert expected in error


def test_a_mask_whose_axes_are_turned_is_not_reshaped():
    mask = TokenMask(torch.nn.Linear(2, 2), ignore_index=-100, shift_labels=None)
    mask.give(torch.ones(3, 5, dtype=torch.bool))
    assert mask.part(torch.Size([5, 3])) is None
    assert mask.part(torch.Size([15])) is not None
