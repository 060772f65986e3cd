import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks.generalization import score
from benchmarks.generalization.configs import all_configs
from benchmarks.generalization.score import alarm, contexts, partial_spearman, spearman
from benchmarks.generalization.signals import Context

CONFIGS = all_configs()
LEVELS = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, math.nan]), min_size=3, max_size=40)


def slow_alarm(values, threshold):
    for i in range(2, len(values)):
        if i - 2 >= score.WARM_UP_READINGS and all(values[j] > threshold for j in (i - 2, i - 1, i)):
            return i
    return None


@given(LEVELS, st.sampled_from([-2.0, 0.0, 0.4, 1.0, 2.0, math.nan]))
def test_an_alarm_takes_three_readings_in_a_row_after_the_first_ten(values, threshold):
    assert alarm(np.array(values), threshold) == slow_alarm(values, threshold)


def test_an_undefined_reading_ends_a_row():
    values = np.ones(20)
    values[12] = np.nan
    assert alarm(values, 0.5) == 15
    assert alarm(np.ones(20), 0.5) == 12
    assert alarm(np.ones(20), 1.0) is None


def test_spearman_leaves_undefined_rows_out():
    x, y = np.array([1.0, 2, 3, 4, np.nan, 5]), np.array([1.0, 3, 2, np.nan, 0, 9])
    assert spearman(x, y) == pytest.approx(stats.spearmanr([1, 2, 3, 5], [1, 3, 2, 9]).statistic)
    assert math.isnan(spearman(np.ones(5), np.arange(5.0)))
    assert math.isnan(spearman(x[:2], y[:2]))


def closed_form(x, y, z):
    r = np.corrcoef([stats.rankdata(each) for each in (x, y, z)])
    return (r[0, 1] - r[0, 2] * r[1, 2]) / math.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))


def test_a_partial_correlation_is_its_closed_form(rng):
    x, y, z, w = rng.integers(0, 8, (4, 30)) + np.linspace(0, 4, 30)
    assert partial_spearman(x, y, [z]) == pytest.approx(closed_form(x, y, z))
    # Two given: the recursion, over correlations that are partial already.
    xy, xw, yw = (partial_spearman(*pair, [z]) for pair in ((x, y), (x, w), (y, w)))
    expected = (xy - xw * yw) / math.sqrt((1 - xw**2) * (1 - yw**2))
    assert partial_spearman(x, y, [z, w]) == pytest.approx(expected)


def test_what_another_signal_explains_whole_has_no_partial_correlation(rng):
    x, y = rng.normal(size=(2, 20))
    assert math.isnan(partial_spearman(x, y, [np.exp(x)]))
    assert partial_spearman(x, y, [np.ones(20)]) == pytest.approx(spearman(x, y))
    assert math.isnan(partial_spearman(x[:3], y[:3], [np.arange(3.0)]))


def test_many_correlations_at_a_time_are_each_by_itself(rng):
    columns = rng.normal(size=(5, 4, 25)).round(1)
    columns[rng.random(columns.shape) < 0.1] = np.nan
    together = score._rank_correlation(columns)
    alone = [partial_spearman(each[0], each[1], each[2:]) for each in columns]
    np.testing.assert_allclose(together, alone)


def test_the_mean_of_a_group_is_of_its_defined_values():
    columns = np.array([[1.0, 3.0, np.nan, 10.0, 14.0]])
    found = score._without_group_means(columns, np.array([0, 0, 0, 1, 1]))
    np.testing.assert_array_equal(found, [[-1, 1, np.nan, -2, 2]])


def a_table(rng, runs=24):
    """Two seeds a configuration, three recipes; the signal follows the gap within recipes and not across them."""
    recipe = np.arange(runs) % 3
    gap = rng.normal(size=runs)
    signal = gap + 0.3 * rng.normal(size=runs) - 5.0 * recipe
    configuration = np.array([f"configuration {i // 2}" for i in range(runs)])
    loss, epoch = rng.normal(size=(2, runs))
    return score.Table(
        signal, gap + 4.0 * recipe, loss, epoch, np.array([f"recipe {r}" for r in recipe]), configuration
    )


def test_within_recipes_only_runs_that_compare_are_compared(rng):
    table = a_table(rng)
    assert score.across_runs(table, partial=False, within_recipe=False).value < 0
    within = score.across_runs(table, partial=False, within_recipe=True)
    assert within.value > 0.8
    assert within.low <= within.value <= within.high
    assert within.count == 24


def test_intervals_are_the_same_every_time(rng):
    table = a_table(rng)
    first, second = (score.across_runs(table, partial=True, within_recipe=True) for _ in range(2))
    assert first == second
    assert first.low < first.high


def test_of_few_runs_there_is_no_correlation(rng):
    assert math.isnan(score.across_runs(a_table(rng, 7), partial=False, within_recipe=True).value)


def test_the_bootstrap_draws_whole_configurations():
    clusters = np.array(["a", "b", "b", "c"])
    values = np.array([1.0, 2.0, 4.0, 8.0])
    seen = []

    def mean(rows):
        seen.append(rows)
        return np.nanmean(np.append(values, np.nan)[rows], axis=-1)

    low, high = score.bootstrap(np.arange(4), clusters, mean, repeats=500)
    (rows,) = seen
    assert rows.shape == (500, 6)
    assert ((rows == 1).sum(axis=1) == (rows == 2).sum(axis=1)).all(), "both seeds of b, or neither"
    assert (((rows == 0) | (rows == 3) | (rows == 1)).sum(axis=1) == 3).all(), "as many configurations as there are"
    assert 1.0 <= low < 3.75 < high <= 8.0


def baselines_of(configs, make_run, held_out):
    runs = [make_run(config, held_out=held_out.get(config.name)) for config in configs]
    return {context.run.name: context.baselines for context in contexts(runs)}


def test_no_run_is_its_own_baseline(make_run):
    for name, others in baselines_of(CONFIGS, make_run, {}).items():
        assert name not in [other.name for other in others]


def test_baselines_are_of_the_recipe_and_did_not_overfit(make_run, overfits):
    first = next(config for config in CONFIGS if config.family == "language")
    recipe = [config for config in CONFIGS if config.recipe == first.recipe]
    marked = [config for config in recipe if config.baseline]
    assert len(marked) == 2
    found = baselines_of(CONFIGS, make_run, {marked[0].name: overfits})
    judged = next(config for config in recipe if not config.baseline)
    assert [other.name for other in found[judged.name]] == [marked[1].name]
    for config in CONFIGS:
        assert all(other.config.recipe == config.recipe and other.config.baseline for other in found[config.name])


def test_correlation_within_a_run_is_after_its_first_readings(make_run):
    gap = np.concatenate([np.linspace(9, 1, 10), np.linspace(1, 3, 30)])
    run = make_run(val_loss=4 + gap, train_loss=np.full(40, 4.0))
    (found,) = score.within_runs([Context(run)], lambda context: context.run.columns["step"])
    assert found > 0.95


def test_ranking_is_within_groups_that_compare(make_run):
    configs = [config for config in CONFIGS if config.family == "language"][:6]
    finals = np.linspace(4, 5, 6)
    runs = [make_run(config, held_out=np.full(40, final)) for config, final in zip(configs, finals, strict=True)]
    last = dict(zip(runs, finals, strict=True))
    found = score.ranking([Context(run) for run in runs], lambda c: np.full(40, last[c.run]), lambda run: "all")
    assert found == {"all": pytest.approx(1.0)}


@pytest.fixture
def rng():
    return np.random.default_rng(3)
