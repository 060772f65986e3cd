"""A series of checkpoints becomes a run, which everything that reads runs takes."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import logalign
from logalign.checkpoints import spectra_of
from logalign.checkpoints.series import NO_INPUTS, SeriesWriter, steps_of
from logalign.errors import InputError, RunError
from logalign.report.run_report import write_run_report
from tests.checkpoints.conftest import llama


@pytest.fixture
def series(saved):
    """Three checkpoints of a model whose head gets one common direction; the second also a NaN in a layer."""
    model = llama()
    folders = []
    for step in (200, 1000, 3000):
        with torch.no_grad():
            model.lm_head.weight[:, 0] += 0.05
        if step == 1000:
            model.model.layers[0].mlp.up_proj.weight.data[2, 1] = float("nan")
        folders.append(saved(model, f"checkpoint-{step}"))
        if step == 1000:
            model.model.layers[0].mlp.up_proj.weight.data[2, 1] = 0
    return folders


def written(out, folders, layers):
    with SeriesWriter(out, {"layers": layers}) as writer:
        for folder, step in steps_of(folders).items():
            writer.add(step, spectra_of(folder, layers=layers))
    return logalign.open_run(out)


def test_a_run_of_weights(series, tmp_path):
    run = written(tmp_path / "run", series, ["*"])
    sites = list(dict.fromkeys(reading.site for reading in run.readings))
    assert (sites[0], run.meta["main"], len(sites)) == ("unembedding", "unembedding", 16)
    assert run.meta["sites"]["unembedding"] == {
        "module": "lm_head",
        "how": "the well-known name 'lm_head'",
        "softmax": True,
        "m": 290,
        "n": 16,
        "dtype": "F32",
    }
    heads = [reading for reading in run.readings if reading.site == "unembedding"]
    assert [reading.step for reading in heads] == [200, 1000, 3000]
    for reading, folder in zip(heads, series, strict=True):
        (head,) = spectra_of(folder).weights
        assert (reading.lar, reading.reason, reading.m, reading.n) == (None, NO_INPUTS, 290, 16)
        assert reading.weight_participation == head.participation
        assert reading.energies == {"weight": pytest.approx(head.norm**2), "input": None, "output": None}
        assert reading.extra == {
            "lar_bound": head.lar_bound,
            "stable_rank": head.stable_rank,
            "weight_norm": head.norm,
        }
        vectors = load_file(run.path / "spectra" / f"step-{reading.step:08d}.safetensors")
        np.testing.assert_array_equal(vectors["unembedding.p"], head.p)
    participation = run.columns("unembedding")["weight_participation"]
    assert (np.diff(participation) < 0).all(), "one direction grows"


def test_a_weight_that_is_not_finite_is_a_gap(series, tmp_path):
    run = written(tmp_path / "run", series, ["*.up_proj"])
    columns = run.columns("model.layers.0.mlp.up_proj")
    np.testing.assert_array_equal(np.isnan(columns["lar_bound"]), [False, True, False])
    assert columns["nonfinite"].tolist() == [0, 1, 0]
    assert columns["reason"][1] == "1 stored rows of the weight hold a NaN or an infinity"


def test_the_report_draws_it(series, tmp_path):
    run = written(tmp_path / "run", series, "unembedding")
    page = write_run_report([run.path], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "lm_head" in page


def test_the_verdict_is_that_nothing_can_be_said(series, tmp_path):
    assert logalign.diagnose(written(tmp_path / "run", series, "unembedding").path).outcome == "undecidable"


def test_weights_of_another_shape_are_not_of_one_training(series, tmp_path):
    save_file({"lm_head.weight": np.eye(5)}, tmp_path / "step_9.safetensors")
    with pytest.raises(InputError, match=r"expected lm_head.weight of shape \(5, 5\) as in .* found \(290, 16\)"):
        written(tmp_path / "run", [tmp_path / "step_9.safetensors", *series], "unembedding")


def test_a_folder_that_holds_a_run_is_left_alone(series, tmp_path):
    written(tmp_path / "run", series[:1], "unembedding")
    with pytest.raises(RunError, match="expected a new or empty folder, found a run"):
        written(tmp_path / "run", series, "unembedding")


def test_steps_are_sorted_and_those_without_are_numbered(tmp_path):
    paths = [tmp_path / name for name in ("step-30", "step-4")]
    assert list(steps_of(paths).items()) == [(paths[1], 4), (paths[0], 30)]
    unnamed = [tmp_path / name for name in ("late", "early")]
    assert list(steps_of(unnamed).items()) == [(unnamed[0], 0), (unnamed[1], 1)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["step-3", "final"],
            "final: expected a step in the name of each checkpoint .* found one in 1 of 2; rename it",
        ),
        (
            ["a/step-3", "b/step-3"],
            "expected a step of its own for each checkpoint, found 3 in .*a/step-3 and .*b/step-3",
        ),
        (["a", "a"], "found one given twice"),
    ],
)
def test_steps_that_cannot_be_told(tmp_path, names, message):
    with pytest.raises(InputError, match=message):
        steps_of([tmp_path / name for name in names])
