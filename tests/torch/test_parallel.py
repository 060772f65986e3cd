"""Readings over real processes against those of one process that sees all tokens and the whole weight."""

from collections.abc import Iterator

import pytest
import torch

from logalign import open_run
from tests.torch import parallel_cases as cases
from tests.torch.workers import Workers

FORMS, SPECTRAL = cases.FORMS, cases.SPECTRAL


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


def assert_true(results, truth, *, rel=1e-5, but=()):
    """Every rank's readings are the truth's, and training was that of one process."""
    for result in results:
        assert not result["told"], result["told"]
        assert len(result["readings"]) == len(truth["readings"])
        for found, true in zip(result["readings"], truth["readings"], strict=True):
            assert found.keys() == true.keys()
            for site in true:
                for name in {*FORMS, "loss", "kept", *SPECTRAL} - set(but):
                    expected = true[site][name]
                    expected = expected if expected is None else pytest.approx(expected, rel=rel, abs=rel)
                    assert found[site][name] == expected, (site, name)
                for name in ("tokens", "tokens_seen", "nonfinite", "reason", "m", "n"):
                    assert found[site][name] == true[site][name], (site, name)
        assert result["readings"] == results[0]["readings"], "all ranks get the same values"


def assert_same_weights(watched, unwatched):
    for one, other in zip(watched, unwatched, strict=True):
        assert one["weights"].keys() == other["weights"].keys()
        for name, weight in one["weights"].items():
            assert torch.equal(weight, other["weights"][name]), name


@pytest.mark.parametrize(
    "case",
    [
        cases.ddp,
        cases.ddp_accumulating,
        cases.fsdp,
        cases.fsdp_whole,
        cases.fsdp_kept,
        cases.fsdp_accumulating,
        cases.fsdp_offloaded,
    ],
)
def test_data_parallel(two, case):
    watched = two.run(case, True)
    assert_true(watched, cases.alone())
    assert_same_weights(watched, two.run(case, False))


@pytest.mark.parametrize("case", [cases.ddp_compiled, cases.fsdp_compiled, cases.tensor_parallel_compiled])
def test_compiled(two, case):
    watched = two.run(case, True)
    layers = list(watched[0]["readings"][0])
    assert_true(watched, cases.alone(layers=layers))
    assert_same_weights(watched, two.run(case, False))


@pytest.mark.parametrize("whole", [True, False], ids=["engine", "module"])
def test_zero_3(two, whole):
    pytest.importorskip("deepspeed")
    watched = two.run(cases.zero3, True, whole)
    assert_same_weights(watched, two.run(cases.zero3, False, whole))
    # With or without a monitor DeepSpeed's weights depart from those of plain SGD in the second step, by 1e-3.
    before = [{**result, "readings": result["readings"][:2]} for result in watched]
    assert_true(before, {"readings": cases.alone()["readings"][:2]})


def test_a_model_that_nothing_is_known_of_is_measured_alone(two):
    for rank, result in enumerate(two.run(cases.unwrapped)):
        assert len(result["told"]) == 1
        assert "readings are of this rank's tokens alone; pass watch(mesh=...)" in result["told"][0]
        ids, _ = cases.rows_of(rank, 2)[0]
        assert result["tokens_offered"] == ids.numel()


def test_a_tied_head_that_is_sharded(two):
    watched = two.run(cases.fsdp_tied, True)
    assert_true(watched, cases.alone_tied())
    assert_same_weights(watched, two.run(cases.fsdp_tied, False))


@pytest.mark.parametrize(("how", "monitored"), [("data", 1), ("tensor", 2)])
def test_collectives_of_a_step(two, how, monitored):
    """One all-reduce over all sites, one more where the head's rows are split; the first step also agrees on sites."""
    for first, *rest in two.run(cases.collectives, how):
        assert rest == [0, monitored, 0]
        assert first >= monitored


@pytest.mark.parametrize("how", ["gathered", "dtensor", "local", "sequence"])
def test_tensor_parallel(two, how):
    watched = two.run(cases.tensor_parallel, True, how)
    assert_true(watched, cases.alone())
    assert_same_weights(watched, two.run(cases.tensor_parallel, False, how))


@pytest.mark.parametrize(
    "case", [cases.hsdp, cases.fsdp_and_tensor_parallel, cases.data_and_tensor_parallel, cases.context_parallel]
)
def test_two_by_two(four, case):
    watched = four.run(case, True)
    assert_true(watched, cases.alone())
    assert_same_weights(watched, four.run(case, False))


def test_hidden_layers(two):
    """Column- and row-parallel layers beside the head; no rank has what a row-parallel layer's spectra take."""
    watched = two.run(cases.hidden, True)
    truth = cases.alone(layers=["unembedding", "blocks.*"], spectra=True)
    for step in truth["readings"]:
        for site in ("blocks.0.down", "blocks.1.down"):
            step[site].update(dict.fromkeys(SPECTRAL))
    assert_true(watched, truth)
    assert_same_weights(watched, two.run(cases.hidden, False))


def test_a_bias_is_split_like_the_rows(two):
    assert_true(two.run(cases.with_bias, True), cases.alone(bias=True))


def test_padding_of_the_vocabulary_is_left_out(four):
    """The last rank has nothing but padding; the truth is of the first rows of the same padded head."""
    truth = cases.alone(bias=True, padding=11, vocabulary=cases.VOCABULARY)
    assert truth["readings"][0]["unembedding"]["m"] == cases.VOCABULARY
    assert_true(four.run(cases.padded, True), truth)


def test_a_rank_without_a_token_that_counts_takes_part(four):
    """The second of four ranks has only masked tokens."""
    assert_true(four.run(cases.ddp, True), cases.alone())


def test_bfloat16_parameters(two):
    """Against one process that sees all tokens, in the same mixed precision."""
    single = Workers(1)
    (truth,) = single.run(cases.fsdp_bfloat16, True)
    single.stop()
    watched = two.run(cases.fsdp_bfloat16, True)
    assert_true(watched, truth, rel=1e-3)
    assert_same_weights(watched, two.run(cases.fsdp_bfloat16, False))


def test_the_tensor_parallel_plan_of_transformers(two, tmp_path):
    cases.save_llama(tmp_path)
    truth = cases.transformers_plan(0, 1, tmp_path, False)
    for found in two.run(cases.transformers_plan, tmp_path, True):
        assert found["split"]
        assert_true([{"told": [], "readings": [found["readings"]]}], {"readings": [truth["readings"]]})


def test_pipeline(two):
    """The stage without the head has no reading, and waits for nobody."""
    first, last = two.run(cases.pipeline, True)
    assert first["readings"] == []
    assert not first["told"]
    assert_true([last], cases.alone(), but=("loss", "kept"))
    assert_same_weights([first, last], two.run(cases.pipeline, False))


def test_the_lowest_rank_writes_the_run(two, tmp_path):
    two.run(cases.ddp, True, tmp_path / "run")
    recorded = open_run(tmp_path / "run").readings
    truth = cases.alone()["readings"]
    assert [each.step for each in recorded] == list(range(cases.STEPS))
    for found, true in zip(recorded, truth, strict=True):
        assert found.lar == pytest.approx(true["unembedding"]["lar"], rel=1e-5)
    with pytest.raises(AssertionError, match="resume=True") as raised:
        two.run(cases.ddp, True, tmp_path / "run")
    assert str(raised.value).count("RunError") >= 2, "every rank is told"


def test_a_resumed_run_goes_on_at_every_rank(two, tmp_path):
    for result in two.run(cases.resumed, tmp_path / "run"):
        assert result["steps"] == list(range(cases.STEPS))
        assert result["tokens_seen"] == cases.STEPS * cases.BATCH * cases.LENGTH
        assert result["restored"] == result["state"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (cases.group_after_watch, "expected the process group to be there when watch"),
        (cases.other_layers, "expected all ranks to measure the same layers"),
        (cases.overlapping_mesh, "among both; pass watch"),
        (cases.shards_unknown_at_watch, "parallelize the model before watch"),
        (cases.wrong_mesh, "expected a torch.distributed.device_mesh.DeviceMesh or a ProcessGroup"),
        (cases.split_inputs, "as many tokens"),
    ],
)
def test_what_cannot_be_added_up_is_refused_at_every_rank(two, case, words):
    for kind, text in two.outcomes(case):
        assert kind == "raised"
        assert words in text, text
