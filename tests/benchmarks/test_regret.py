"""What following a verdict costs, on runs whose held-out loss is known."""

import numpy as np
import pytest

from benchmarks.generalization import fit, regret, score
from benchmarks.generalization.signals import Context
from benchmarks.generalization.truth import outcome
from logalign.diagnosis.overfit_rule import OverfitThresholds


def test_regret_is_the_held_out_loss_that_is_kept_less_the_lowest(make_run, overfits):
    run = make_run(held_out=overfits)
    smooth = np.array([overfits[max(0, i - 2) : i + 3].mean() for i in range(40)])
    for reading in (3, 20, 33):
        found = regret.cost(run, reading)
        assert found.regret == pytest.approx(smooth[reading] - smooth.min())
        assert found.saved == pytest.approx(1 - reading / 39)
        assert found.alarmed
    at_the_end = regret.cost(run, None)
    assert (at_the_end.saved, at_the_end.alarmed) == (0, False)
    assert at_the_end.regret == pytest.approx(smooth[-1] - smooth.min())


def test_a_checkpoint_that_has_diverged_costs_everything(make_run, overfits):
    held_out = overfits.copy()
    held_out[30:] = np.nan
    run = make_run(held_out=held_out)
    run.facts["truth"]["diverged_step"] = 300
    assert regret.cost(run, 35).regret == np.inf
    assert regret.cost(run, None).regret == np.inf
    assert regret.cost(run, 20).regret == pytest.approx(0)
    assert outcome(run) == "diverged"


def test_fixed_passes_and_early_stopping(make_run):
    apart = np.concatenate([np.linspace(5, 4, 20), np.full(3, 4.1), [3.0], np.full(16, 4.1)])
    run = make_run(epochs=4.0, val1_loss=apart)
    assert regret.after_passes(run, 2) == 20
    assert regret.after_passes(run, 9) is None
    assert regret.by_holding_out(run, "val1_loss") == 19  # after three higher ones nobody waits for the lowest
    assert regret.by_holding_out(run, "val1_loss", patience=4) == 23
    assert regret.by_holding_out(run, "val5_loss") is None


def a_family(make_run, overfits, seed):
    """Six runs and a signal of each that rises more in those that overfit."""
    generator = np.random.default_rng(seed)
    runs, series = [], {}
    for i in range(6):
        run = make_run(held_out=overfits if i % 2 else None, epochs=8.0, seed=i)
        values = generator.normal(size=40).cumsum() * 0.3 + (i % 2) * 0.1 * np.arange(40)
        values[generator.random(40) < 0.05] = np.nan
        runs.append(run)
        series[run] = values
    return [Context(run) for run in runs], lambda context: series[context.run]


@pytest.mark.parametrize("seed", range(5))
def test_of_a_signal_no_threshold_costs_less_than_the_fitted_one(make_run, overfits, seed):
    found, signal = a_family(make_run, overfits, seed)

    def mean(threshold):
        return np.mean([min(each.regret, regret.MOST) for each in regret.by_signal(found, signal, threshold)])

    fitted = regret.fit_threshold(found, signal)
    assert mean(fitted) <= min(mean(at) for at in [*np.linspace(-5, 8, 300), np.inf]) + 0.02


def test_a_signal_that_is_undefined_gives_no_alarm(make_run):
    found = [Context(make_run())]
    threshold = regret.fit_threshold(found, lambda context: np.full(40, np.nan))
    assert threshold == np.inf
    assert not regret.by_signal(found, lambda context: np.ones(40), threshold)[0].alarmed


def revisiting(make_run, held_out, *, stalls_at):
    """A run that memorizes, and whose drift no longer lowers the loss from one pass on."""
    passes = np.arange(80) / 8
    whole = np.floor(passes)
    drift = np.where(whole >= stalls_at, 0.1, -0.5)
    given = {"drift": np.where(whole < 2, np.nan, drift), "drift_error": np.full(80, 0.01)}
    given |= {"gain": 0.2 + 1e-3 * whole, "gain_error": np.full(80, 0.01), "passes": passes}
    return make_run(readings=80, epochs=10.0, held_out=held_out, train_loss=np.full(80, 2.0), **given)


def test_the_rule_is_fitted_by_what_its_alarms_cost(make_run):
    held_out = np.abs(np.arange(80.0) - 48) / 20 + 4  # lowest where the sixth pass ends
    given = fit.cases(
        [revisiting(make_run, held_out, stalls_at=6), revisiting(make_run, np.linspace(5, 4, 80), stalls_at=99)]
    )
    assert len(given) == 2
    found = fit.fit(given)
    assert fit.mean_regret(given, found) <= fit.mean_regret(given, OverfitThresholds())
    assert [case.cost(OverfitThresholds()).alarmed for case in given] == [True, False]
    assert given[0].cost(OverfitThresholds()).regret < 0.1
    assert fit.alarmed(given, found) == (0, 1)
    rows = fit.summary(given)
    assert [row[""] for row in rows[:2]] == ["fitted", "in the rule"]


def test_runs_whose_samples_were_not_followed_are_not_fitted_on(make_run):
    assert fit.cases([make_run()]) == []


def test_patience_counts_evaluations_alone(make_run):
    apart = np.full(40, np.nan)
    apart[::4] = [5, 4, 4.5, 4.4, 4.3, 3, 3, 3, 3, 3]
    run = make_run(val5_loss=apart)
    assert regret.by_holding_out(run, "val5_loss") == 4


def test_three_readings_in_a_row_make_an_alarm_of_a_signal(make_run, overfits):
    run = make_run(held_out=overfits)
    values = np.zeros(40)
    values[[20, 21, 23, 24, 25]] = 1
    (found,) = regret.by_signal([Context(run)], lambda context: values, 0.5)
    assert found == regret.cost(run, 25)
    assert score.alarm(values, 0.5) == 25
