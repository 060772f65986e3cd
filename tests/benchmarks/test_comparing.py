"""The scores of compare on runs whose estimates, LARs and held-out losses are made by hand."""

import numpy as np
import pytest

from benchmarks.generalization import comparing
from benchmarks.generalization.configs import all_configs
from logalign.diagnosis.ranking import CLOSE, ESTIMATE, HIGH, LOSS_AND_LAR

READINGS = 60


def language(make_run, gaps, held_out):
    """Runs of one text whose training loss drops by `gap` at each of four passes, and what they end at."""
    configs = [config for config in all_configs() if config.family == "language"][: len(gaps)]
    epochs = 4.0 * np.arange(READINGS) / READINGS
    return [
        make_run(
            config, readings=READINGS, held_out=np.full(READINGS, end), train_loss=3.0 - gap * np.floor(epochs), seed=i
        )
        for i, (config, gap, end) in enumerate(zip(configs, gaps, held_out, strict=True))
    ]


def group(_):
    return "all"


def test_an_order_is_scored_against_the_held_out_losses(make_run):
    runs = language(make_run, [0.0, 0.1, 0.2, 0.3, 0.4], [3.0, 3.1, 3.2, 3.3, 3.4])
    for run in runs:
        run.columns["train_loss"] = run.columns["train_loss"] + 0.5 * np.floor(run.columns["epoch"])[-1]
    [found] = comparing.comparisons(runs, group)
    assert found.quantity == ESTIMATE
    assert len(found.ranked) == len(runs)
    [row] = comparing.table(runs, group)
    assert (row["runs"], row["ordered by"]) == ("5", ESTIMATE)
    assert row["of the first pass and drift"] == "–"


@pytest.mark.parametrize(("excess", "holds"), [(1.0, True), (HIGH * 1.0 + CLOSE + 0.1, False), (-0.1, False)])
def test_an_interval_holds_where_the_true_difference_is_in_it(make_run, excess, holds):
    runs = language(make_run, [0.0, 0.0], [3.0, 3.0 + excess])
    runs[1].columns["train_loss"] = runs[1].columns["train_loss"] + 1.0
    [found] = comparing.comparisons(runs, group)
    assert comparing.held_intervals(found) == [holds]
    assert comparing.sure(found) == [excess > 0]


def test_classifiers_with_short_passes_are_ordered_by_loss_and_lar(make_run):
    configs = [config for config in all_configs() if config.family == "vision"][:2]
    runs = [
        make_run(config, epochs=100.0, m=np.full(40, 10.0), lar=np.full(40, lar), train_loss=np.full(40, 0.1))
        for config, lar in zip(configs, (0.6, 0.7), strict=True)
    ]
    [found] = comparing.comparisons(runs, group)
    assert found.quantity == LOSS_AND_LAR
    assert [each.run for each in found.ranked] == [runs[1].name, runs[0].name]
    assert comparing.held_intervals(found) == []


def test_a_fit_gives_every_constant_with_its_score_in_recipes_left_out(make_run):
    runs = language(make_run, np.linspace(0, 0.5, 24), np.linspace(3, 5, 24))
    rows = comparing.fit(runs, group)
    assert [row["constant"] for row in rows] == ["LOW", "HIGH", "CLOSE", "MARGIN"]


def test_a_run_that_diverged_is_no_part_of_a_comparison(make_run):
    runs = language(make_run, [0.0, 0.1, 0.2], [3.0, 3.1, 3.2])
    runs[1].columns["train_loss"] = np.where(np.arange(READINGS) < 30, runs[1].columns["train_loss"], np.nan)
    [found] = comparing.comparisons(runs, group)
    assert {each.run for each in found.ranked} == {runs[0].name, runs[2].name}
    assert list(comparing.comparisons(runs[:2], group)) == []


def test_drift_is_summed_from_the_end_of_the_first_pass():
    epochs = np.linspace(0, 4, 41)
    columns = {
        "step": np.arange(41.0),
        "epoch": epochs,
        "loss": np.where(epochs < 1, 3.0, 1.0),
        "drift": np.where(epochs > 2, 0.1, np.nan),
    }
    assert comparing.drifted(columns) == pytest.approx(3.3)
    assert np.isnan(comparing.drifted({**columns, "drift": np.full(41, np.nan)}))
