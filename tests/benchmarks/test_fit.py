"""Thresholds leave room above healthy runs, find what they can on time, and are those that stand in the rule."""

import math

import numpy as np
import pytest

from benchmarks.generalization import configs, fit, score, verdicts
from benchmarks.generalization.levels import FITTED
from benchmarks.generalization.store import PARQUET, load
from benchmarks.generalization.tables import SCORED
from logalign.diagnosis.overfit_rule import OverfitThresholds


def case(run, *, rises_from, to):
    """A level that is 0 and rises by equal steps from one reading on."""
    length = len(run.columns["step"])
    return fit.Case(run, to * np.clip((np.arange(length) - rises_from) / (length - rises_from - 1), 0, 1))


def test_a_threshold_lies_a_tenth_above_healthy_runs_and_finds_what_it_can_on_time(make_run, overfits):
    ill, well = make_run(held_out=overfits), make_run()
    found = fit.best([case(ill, rises_from=10, to=3.0), case(well, rises_from=10, to=0.5)])
    assert found >= 1.1 * 0.5
    assert score.judge(ill, fit.first_above(case(ill, rises_from=10, to=3.0), found)).verdict == "on time"
    barely = fit.best([case(ill, rises_from=10, to=3.0), case(well, rises_from=10, to=2.8)])
    assert barely == pytest.approx(1.1 * 2.8)
    assert fit.first_above(case(ill, rises_from=10, to=3.0), barely) is None


def test_where_no_overfit_run_has_a_level_there_is_no_alarm(make_run):
    assert fit.best([]) == math.inf
    assert fit.best([case(make_run(), rises_from=10, to=1.0)]) == math.inf


def stored(every):
    runs = [context for context in score.contexts(load(PARQUET)) if context.run.config.family in SCORED]
    return runs[::every]


def first_alarms_agree(found):
    thresholds = {name: getattr(OverfitThresholds(), name) for name in FITTED}
    return [
        fit.detection(found, thresholds, with_baseline=wanted) == verdicts.detection(found, with_baseline=wanted)
        for wanted in (False, True)
    ]


def test_levels_above_the_rules_thresholds_alarm_where_its_verdicts_do():
    found = stored(every=25)
    assert len(found) > 6
    assert all(first_alarms_agree(found))


@pytest.mark.slow
def test_the_thresholds_of_the_rule_are_those_that_the_fitting_half_gives():
    found = stored(every=1)
    verdicts.prepare(found, jobs=2)
    assert all(first_alarms_agree(found))
    fitted = fit.fit([context for context in found if configs.is_for_fitting(context.run.config)])
    for name, threshold in fitted.items():
        assert getattr(OverfitThresholds(), name) == pytest.approx(threshold, rel=0.02), name
