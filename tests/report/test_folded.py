from pathlib import Path

import numpy as np
import pytest

from logalign import Baseline, diagnose, open_run
from logalign.errors import InputError
from logalign.report.folded import _readings, fold
from logalign.runs.columns import site_columns
from logalign.runs.reading import REVISIT_FIELDS
from tests.drifts import write_log

DATA = Path(__file__).parent.parent / "data"


def columns(name: str):
    return site_columns(open_run(DATA / name))["unembedding"]


@pytest.mark.parametrize("name", ["lm_repeat200k.jsonl", "modadd59_wd1.jsonl"])
def test_verdict_of_a_short_run_is_that_of_diagnose(name):
    folded = fold(columns(name), "unembedding")
    assert folded.verdict == diagnose(DATA / name)
    assert not folded.thinned


def test_verdict_with_a_baseline_is_that_of_diagnose_and_signals_are_its_evidence():
    baseline = Baseline.from_run(DATA / "lm_fresh.jsonl")
    folded = fold(columns("lm_repeat200k.jsonl"), "unembedding", baseline=baseline)
    verdict = diagnose(DATA / "lm_repeat200k.jsonl", baseline=baseline)
    assert folded.verdict == verdict
    for name in ("deviation", "loss_below", "strain", "band"):
        assert folded.signals[name][-1] == verdict.evidence[name]
    # The deviation is the baseline's median LAR less the run's, in the form that is judged.
    assert folded.signals["deviation"][-1] > 0.05
    assert folded.baseline is baseline


def test_outcomes_hold_every_change():
    folded = fold(columns("lm_repeat200k.jsonl"), "unembedding", recorded=5)
    every = fold(columns("lm_repeat200k.jsonl"), "unembedding")
    assert len(folded.rows) < len(every.rows)

    def changes(each):
        steps = columns("lm_repeat200k.jsonl")["step"][each.rows].tolist()
        return [
            (step, now)
            for step, before, now in zip(steps[1:], each.outcomes, each.outcomes[1:], strict=False)
            if now != before
        ]

    assert changes(folded) == changes(every) != []
    assert changes(every)[-1] == (folded.verdict.since_step, folded.verdict.outcome)


def test_a_long_run_is_thinned_evenly_and_says_so():
    data = columns("lm_repeat200k.jsonl")
    folded = fold(data, "unembedding", all_up_to=149, thinned_to=50)
    assert folded.thinned
    assert (folded.folded, folded.of) == (50, 150)
    assert folded.rows[[0, -1]].tolist() == [0, 149]
    # The signals are those of a run that was recorded three times more rarely.
    assert folded.verdict.outcome == "overfitting"


def test_losses_of_a_thinned_run_are_means_since_the_reading_before():
    from logalign.report.folded import _means_between

    values = np.array([4.0, np.nan, 2.0, 1.0, 3.0, np.nan])
    np.testing.assert_array_equal(_means_between(values, np.array([0, 2, 4, 5])), [4.0, 2.0, 2.0, np.nan])


def test_a_detector_is_given_drift_as_it_was_recorded(tmp_path):
    log = open_run(write_log(tmp_path / "run.jsonl", gaps=[40]))
    rows = np.array([0, 3, 20, 40, 59])
    found = _readings(site_columns(log)["unembedding"], "unembedding", rows)
    for name in REVISIT_FIELDS:
        assert [getattr(each, name) for each in found] == [getattr(log.readings[row], name) for row in rows], name


def test_readings_that_cannot_be_judged_together_have_no_verdict_and_are_no_error(write_run):
    data = dict(columns("lm_repeat200k.jsonl"))
    data["n"] = np.where(np.arange(150) < 75, 128, 64)
    folded = fold(data, "unembedding")
    assert folded.verdict.outcome == "undecidable"
    assert "found n = 64" in folded.verdict.reason
    assert folded.rows[-1] == 75


def test_a_baseline_of_another_shape_is_an_error():
    with pytest.raises(InputError, match="baseline's shape"):
        fold(columns("modadd59_wd1.jsonl"), "unembedding", baseline=Baseline.from_run(DATA / "lm_fresh.jsonl"))
