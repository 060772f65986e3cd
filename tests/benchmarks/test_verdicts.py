import dataclasses

import numpy as np

from benchmarks.generalization import verdicts
from benchmarks.generalization.signals import Context
from benchmarks.generalization.store import Made
from logalign.diagnosis.detector import Detector

SENTINEL = 7654321.0


def test_nothing_of_the_truth_is_in_the_readings(make_run):
    run = make_run()
    told = make_run(val_loss=np.full(40, SENTINEL), val_acc=np.full(40, SENTINEL), train_acc=np.full(40, SENTINEL))
    told.facts["truth"] = {"rise": SENTINEL}
    assert verdicts.readings_of(told) == verdicts.readings_of(run)
    for reading in verdicts.readings_of(told):
        assert str(SENTINEL) not in repr(dataclasses.asdict(reading))


def test_readings_are_those_of_the_run(make_run):
    lar = np.linspace(0.5, 0.8, 40)
    lar[3] = np.nan
    found = verdicts.readings_of(make_run(lar=lar))
    assert [reading.step for reading in found] == list(range(0, 400, 10))
    assert found[5].lar == lar[5]
    assert found[3].lar is None


def test_a_run_is_judged_reading_by_reading(make_run):
    run = make_run(readings=60, epochs=6.0)
    said = verdicts.outcomes(Context(run), with_baseline=False)
    detector = Detector()
    assert list(said) == [detector.update(reading).outcome for reading in verdicts.readings_of(run)]
    past = Made(run.config, {name: values[:25] for name, values in run.columns.items()}, run.facts)
    assert verdicts.outcomes(Context(past), with_baseline=False) == said[:25]


def test_a_baseline_is_asked_only_where_it_is_given(make_run):
    run, other = make_run(epochs=6.0), make_run(seed=3, epochs=0.9)
    context = Context(run, (other,))
    without = verdicts.outcomes(context, with_baseline=False)
    assert without == verdicts.outcomes(Context(run), with_baseline=True)
    assert verdicts.baseline_of(context) is not None
    assert verdicts.baseline_of(Context(run)) is None
    assert verdicts.outcomes(context, with_baseline=True) is verdicts.outcomes(context, with_baseline=True)


def test_the_first_alarm_and_what_follows_it():
    said = ("undecidable",) * 10 + ("healthy",) * 8 + ("approaching",) * 2 + ("overfitting",) * 20
    assert verdicts.first_of(said) == 18
    assert verdicts.first_of(said, ("overfitting",)) == 20
    assert verdicts.first_of(said, ("generalizing",)) is None
    assert verdicts.changes_back(said) == 0
    assert verdicts.changes_back((*said, "healthy", "approaching", "undecidable")) == 2


def test_without_a_kind_of_evidence_the_rest_speaks(make_run):
    steps = np.arange(60)
    given = {"drift": np.where(steps < 20, np.nan, 0.1), "drift_error": np.full(60, 0.01)}
    given |= {"gain": 0.3 + 0.01 * (steps // 10), "gain_error": np.full(60, 0.01), "passes": steps / 10}
    run = make_run(readings=60, epochs=6.0, **given)
    everything = verdicts.varied(run, verdicts.Variant())
    assert everything == verdicts.outcomes(Context(run), with_baseline=False)
    assert "overfitting" in everything
    without = verdicts.varied(run, verdicts.VARIANTS["without revisits"])
    bare = {name: values for name, values in run.columns.items() if name not in given or name == "passes"}
    assert without == verdicts.varied(Made(run.config, bare, run.facts), verdicts.Variant())
