"""Baselines, on recorded runs of a small GPT (fresh against repeated text) and on runs written by hand."""

from pathlib import Path

import numpy as np
import pytest

from logalign import Baseline, Reading, open_run
from logalign.errors import InputError, RunError

DATA = Path(__file__).parents[1] / "data"
FRESH, REPEATED = DATA / "lm_fresh.jsonl", DATA / "lm_repeat200k.jsonl"


def test_deviation_of_a_run_that_overfits():
    steps, deviation = Baseline.from_run(FRESH).deviation(REPEATED)
    by_step = dict(zip(steps.tolist(), deviation.tolist(), strict=True))
    expected = {300: 0.031, 600: 0.032, 900: 0.044, 1100: 0.063}
    assert {step: by_step[step] for step in expected} == pytest.approx(expected, abs=1e-3)
    assert deviation.dtype == np.float64


@pytest.mark.parametrize("form", ["lar", "lar_vocab_centered", "lar_token_centered", "lar_centered"])
def test_every_form(form):
    baseline = Baseline.from_run(open_run(FRESH))
    steps, deviation = baseline.deviation(open_run(REPEATED), form=form)
    mine, theirs = open_run(FRESH).columns(), open_run(REPEATED).columns()
    shared = np.intersect1d(mine["step"], theirs["step"])
    expected = mine[form][np.isin(mine["step"], shared)] - theirs[form][np.isin(theirs["step"], shared)]
    found = deviation[np.isin(steps, shared)]
    assert found == pytest.approx(expected, abs=1e-12)


def test_no_deviation_from_itself():
    steps, deviation = Baseline.from_run(FRESH).deviation(FRESH)
    assert steps.tolist() == open_run(FRESH).columns()["step"].tolist()
    assert np.all(deviation == 0)


def test_between_its_own_steps_the_baseline_is_interpolated_and_beyond_them_there_is_none(write_run):
    baseline = Baseline.from_run(write_run("baseline", lars=[0.5, 0.7, 0.6]))  # steps 0, 10, 20
    path = write_run("run", lars=[0.4] * 3).path / "readings.jsonl"
    path.write_text("".join(f'{{"step": {step}, "lar": 0.4}}\n' for step in (4, 15, 20, 21, 40)))
    steps, deviation = baseline.deviation(path)
    assert steps.tolist() == [4, 15, 20]
    assert deviation == pytest.approx([0.5 + 0.2 * 0.4 - 0.4, 0.65 - 0.4, 0.2])


def test_undefined_readings_are_left_out(write_run):
    baseline = Baseline.from_run(write_run("baseline", lars=[0.5, None, 0.7]))
    steps, deviation = baseline.deviation(write_run("run", lars=[0.5, 0.5, None]))
    assert steps.tolist() == [0, 10]
    assert deviation == pytest.approx([0, 0.1])


def test_another_site(write_run):
    baseline = Baseline.from_run(write_run("baseline", sites=("unembedding", "body")), site="body")
    steps, deviation = baseline.deviation(write_run("run", sites=("unembedding", "body")))
    assert steps.size == 20
    assert np.all(deviation == 0)


def test_what_cannot_be_compared(write_run, tmp_path):
    run = write_run("run")
    baseline = Baseline.from_run(run)
    with pytest.raises(InputError) as caught:
        baseline.deviation(run, form="lar_middle")
    assert str(caught.value) == (
        "form: expected one of lar, lar_vocab_centered, lar_token_centered, lar_centered, loss, found 'lar_middle'"
    )
    with pytest.raises(InputError, match=r"of the baseline's shape \(m, n\) = \(512, 64\), found \(512, 128\)"):
        baseline.deviation(write_run("wider", n=128))
    late = tmp_path / "late.jsonl"
    late.write_text('{"step": 5000, "lar": 0.5}\n')
    with pytest.raises(InputError, match=r"expected steps that the baseline .* has, too, found none"):
        baseline.deviation(late)
    with pytest.raises(InputError, match=r"expected steps that the baseline .* has, too, found none"):
        Baseline.from_run(late).deviation(late, form="lar_centered")
    with pytest.raises(InputError, match="expected readings of 'body' with a defined LAR, found none"):
        Baseline.from_run(run, site="body")
    with pytest.raises(InputError, match="with a defined LAR, found none"):
        Baseline.from_run(write_run("undefined", lars=[None, None]))
    with pytest.raises(RunError, match="found nothing there"):
        Baseline.from_run(tmp_path / "nowhere")


# Several runs, bands, axes -----------------------------------------------------------------------------------------


def test_several_runs_give_their_mean_and_how_far_they_lie_apart(write_run):
    runs = [write_run(f"seed-{i}", lars=[0.5 + 0.1 * i] * 20) for i in range(3)]
    for baseline in (Baseline.from_run(*runs), Baseline.from_run(runs), Baseline.from_run(runs[0].path, *runs[1:])):
        band = baseline.band([0, 55, 190, 200])
        assert band.center == pytest.approx([0.6, 0.6, 0.6, np.nan], nan_ok=True)
        assert band.between[:3] == pytest.approx(0.1 * np.sqrt(4 / 3))
        assert baseline.deviation(runs[0])[1] == pytest.approx(0.1)
    assert np.isnan(Baseline.from_run(runs[0]).band([0]).between).all()
    assert str(runs[2].path) in Baseline.from_run(runs).describe()


def test_the_loss_has_a_curve_and_a_deviation_too():
    baseline = Baseline.from_run(FRESH)
    steps, deviation = baseline.deviation(REPEATED, form="loss")
    mine, theirs = open_run(FRESH).columns(), open_run(REPEATED).columns()
    assert deviation == pytest.approx(mine["loss"] - theirs["loss"])
    assert baseline.band([0, 1490], form="loss").center == pytest.approx([mine["loss"][0], mine["loss"][-1]])
    assert steps.size == 150


def test_along_tokens_where_both_recorded_them(write_run):
    baseline = Baseline.from_run(write_run("baseline"))  # 128 tokens a step
    assert baseline.axis_for(tokens=True) == "tokens"
    assert baseline.axis_for(tokens=False) == "step"
    assert baseline.band([128 * 15 + 128], axis="tokens").center == pytest.approx([0.515])
    without = Baseline.from_run(write_run("without", tokens_seen=None))
    assert without.axis_for(tokens=True) == "step"
    assert Baseline.from_run(write_run("by-step"), axis="step").axis_for(tokens=True) == "step"
    with pytest.raises(InputError, match="expected readings with tokens_seen to compare along tokens, found none"):
        Baseline.from_run(write_run("none", tokens_seen=None), axis="tokens")
    with pytest.raises(
        InputError, match="expected readings with tokens_seen, for it compares along tokens, found none"
    ):
        Baseline.from_run(write_run("tokens"), axis="tokens").axis_for(tokens=False)
    with pytest.raises(InputError, match='axis: expected "step", "tokens" or "auto", found \'epoch\''):
        Baseline.from_run(write_run("other"), axis="epoch")


def test_runs_that_make_no_baseline_together(write_run, tmp_path):
    run = write_run("run")
    with pytest.raises(InputError, match=r"expected a layer of the first run's shape \(m, n\) = \(512, 64\), found"):
        Baseline.from_run(run, write_run("wider", n=128))
    late = tmp_path / "late.jsonl"
    late.write_text('{"step": 5000, "lar": 0.5}\n')
    with pytest.raises(InputError, match="expected runs with steps in common, found none"):
        Baseline.from_run(run, late)
    with pytest.raises(InputError, match="baseline: expected at least one run, found none"):
        Baseline.from_run([])
    with pytest.raises(InputError, match="expected a curve of 'lar_centered' by step, found none recorded"):
        Baseline.from_run(late).band([0], form="lar_centered")
    with pytest.raises(InputError, match=r"form: expected one of lar, .*, loss, found 'lr'"):
        Baseline.from_run(late).band([0], form="lr")
    with pytest.raises(InputError, match="expected readings of one layer with a defined LAR, found 0 layers"):
        Baseline.from_readings([Reading(step=0, lar=None)])
    one = [Reading(step=0, lar=0.5)]
    for nothing in ([], [Reading(step=0, lar=None, site="body")]):
        with pytest.raises(InputError, match="baseline 2: expected readings of 'unembedding', found none"):
            Baseline.from_readings(one, nothing)
    assert Baseline.from_readings(one, [Reading(step=0, lar=0.7)]).band([0]).center == pytest.approx([0.6])


def test_a_schedule_that_differs_is_said_in_words(write_run):
    baseline = Baseline.from_run(write_run("baseline"))
    x = np.arange(0.0, 100, 10)

    def difference(lr, tokens=128.0):
        return baseline.schedule_difference(x, np.full(x.shape, lr), axis="step", tokens_per_step=tokens)

    assert difference(1e-3) is None
    assert difference(1.04e-3, None) is None
    assert difference(2e-3) == "the learning rate is 2 times the baseline's"
    assert difference(np.nan, 256.0) == "a step has 2 times the baseline's tokens"
    assert difference(np.nan, None) is None
    unknown = Baseline.from_run(write_run("unknown", lr=None, tokens_seen=None))
    assert unknown.schedule_difference(x, x, axis="step", tokens_per_step=5.0) is None


def test_a_resumed_log_in_the_baseline_counts_its_last_version(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("".join(f'{{"step": {step}, "lar": {lar}}}\n' for step, lar in [(0, 0.5), (10, 0.9), (10, 0.6)]))
    assert Baseline.from_run(path).band([0, 5, 10]).center == pytest.approx([0.5, 0.55, 0.6])
