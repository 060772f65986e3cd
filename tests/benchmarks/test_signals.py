"""No signal may look ahead: what it says of a reading is the same however the run goes on."""

import numpy as np
import pytest

from benchmarks.generalization.signals import WITH_BASELINE, WITHOUT_BASELINE, Context, gap, log_slope, trailing_mean
from benchmarks.generalization.store import Made

ALL_SIGNALS = {**WITHOUT_BASELINE, **WITH_BASELINE}
CUTS = (1, 2, 4, 5, 9, 10, 11, 14, 15, 17, 20, 23, 30, 39, 59)


def kinds_of_run(make_run):
    """Runs of 60 readings: few passes and many, an unfinished first one, and one with undefined readings."""
    generator = np.random.default_rng(5)
    holes = {}
    for name in ("lar", "lar_centered", "train_loss", "rare_lar", "weight_norm"):
        holes[name] = np.where(generator.random(60) < 0.3, np.nan, 0.6 + 0.1 * generator.random(60))
    return [
        make_run(readings=60, epochs=epochs, seed=i, **columns)
        for i, (epochs, columns) in enumerate([(3.0, {}), (0.9, {}), (500.0, {}), (6.0, holes)])
    ]


def cut(run, readings):
    return Made(run.config, {name: values[:readings] for name, values in run.columns.items()}, run.facts)


def with_another_future(run, readings):
    """The same up to a reading; from there on all else but the steps is different."""
    columns = {}
    for name, values in run.columns.items():
        columns[name] = values.copy()
        if name != "step":
            columns[name][readings:] = 1000 - values[readings:] if name != "epoch" else 10 + 3 * values[readings:]
    return Made(run.config, columns, run.facts)


def looks_ahead(signal, make_run):
    """Whether the past of a signal changes with the future of its run."""
    baselines = tuple(make_run(readings=60, seed=seed) for seed in (100, 101))
    with np.errstate(invalid="ignore"):
        for run in kinds_of_run(make_run):
            whole = signal(Context(run, baselines))
            for readings in CUTS:
                for other in (cut(run, readings), with_another_future(run, readings)):
                    past = signal(Context(other, baselines))[:readings]
                    if not np.allclose(past, whole[:readings], rtol=1e-9, atol=1e-12, equal_nan=True):
                        return True
    return False


@pytest.mark.parametrize("name", ALL_SIGNALS)
def test_no_signal_looks_ahead(name, make_run):
    assert not looks_ahead(ALL_SIGNALS[name], make_run)


@pytest.mark.parametrize(
    "leak",
    [
        lambda c: c.column("lar") - np.nanmedian(c.column("lar")),
        lambda c: np.append(c.column("lar")[1:], np.nan),
        lambda c: np.full(len(c.column("lar")), float(c.column("epoch")[-1] < 1)),
        lambda c: np.convolve(c.column("lar"), np.ones(3) / 3, mode="same"),
    ],
)
def test_a_signal_that_looks_ahead_is_found_out(leak, make_run):
    assert looks_ahead(leak, make_run)


@pytest.mark.parametrize("name", ALL_SIGNALS)
def test_no_signal_knows_held_out_data(name, make_run):
    run = make_run(epochs=3)
    blind = {column: values for column, values in run.columns.items() if not column.startswith("val_")}
    baselines = (make_run(seed=100),)
    known = ALL_SIGNALS[name](Context(run, baselines))
    np.testing.assert_array_equal(known, ALL_SIGNALS[name](Context(Made(run.config, blind, {}), baselines)))


@pytest.mark.parametrize("name", WITH_BASELINE)
def test_without_a_baseline_there_is_no_deviation(name, make_run):
    assert np.isnan(WITH_BASELINE[name](Context(make_run()))).all()


def test_the_trailing_mean_is_of_defined_readings():
    found = trailing_mean(np.array([1.0, 3.0, np.nan, 5.0]), 2)
    np.testing.assert_allclose(found, [1, 2, 3, 5])
    assert np.isnan(trailing_mean(np.full(3, np.nan))).all()


def test_slopes_are_those_of_a_line(make_run):
    steps = 10.0 * np.arange(40)
    run = make_run(lar=0.9 - 0.002 * steps, lar_centered=0.9 - 0.03 * np.log(np.maximum(steps, 1)))
    found = WITHOUT_BASELINE["LAR, slope"](Context(run))
    np.testing.assert_allclose(found[14:], 0.2)
    assert np.isnan(found[:14]).all()
    np.testing.assert_allclose(log_slope(Context(run), "lar_centered")[10:], -0.03)


def test_the_fall_is_from_the_highest_value_so_far(make_run):
    lar = np.concatenate([np.linspace(0.5, 0.8, 20), np.full(20, 0.7)])
    found = WITHOUT_BASELINE["LAR, fall"](Context(make_run(lar=lar)))
    assert found[-1] == pytest.approx(trailing_mean(lar).max() - 0.7)
    assert np.isnan(found[:10]).all()


def test_drops_are_summed_over_the_ends_of_epochs(make_run):
    epoch = np.arange(40) / 10
    loss = 3.0 - 0.5 * np.floor(epoch)  # falls by a half where an epoch ends, and nowhere else
    found = WITHOUT_BASELINE["training loss, drops at epochs"](Context(make_run(epoch=epoch, train_loss=loss)))
    assert found[9] == 0
    assert found[12] == pytest.approx(0.5)
    assert found[-1] == pytest.approx(1.5)


def test_the_loss_is_held_against_what_its_first_epoch_leads_to(make_run):
    steps = 10.0 * np.arange(40)
    expected = 5.0 - 0.3 * np.log(np.maximum(steps, 1))
    epoch = steps / 200
    loss = np.where(epoch < 1, expected, expected - 0.4)
    found = WITHOUT_BASELINE["training loss, below its first epoch"](Context(make_run(epoch=epoch, train_loss=loss)))
    assert np.isnan(found[:20]).all()
    assert found[-1] == pytest.approx(0.4, abs=0.02)


def test_alpha_holds_until_it_is_taken_again(make_run):
    alpha = np.full(40, np.nan)
    alpha[[3, 30]] = 2.0, 4.0
    found = WITHOUT_BASELINE["WeightWatcher alpha, mean"](Context(make_run(alpha_mean=alpha)))
    assert np.isnan(found[:3]).all()
    np.testing.assert_array_equal(found[3:], -np.repeat([2.0, 4.0], [27, 10]))


def test_the_gap_is_held_out_less_training_loss(make_run):
    found = gap(make_run(val_loss=np.full(40, 5.0), train_loss=np.full(40, 3.5)))
    np.testing.assert_allclose(found, 1.5)
