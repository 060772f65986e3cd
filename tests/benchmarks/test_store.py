import json

import numpy as np
import pytest

from benchmarks.generalization.configs import all_configs
from benchmarks.generalization.store import collect, file_of, is_made, load, load_work

CONFIGS = all_configs()
CHOSEN = [next(config for config in CONFIGS if config.family == family) for family in ("vision", "language")]


def keep(run, work):
    """Write a run as `train_one` does."""
    target = file_of(run.config, work)
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(target.with_suffix(".npz"), **run.columns)
    target.write_text(json.dumps(run.facts))


def assert_same(found, run):
    assert found.config == run.config
    assert found.facts == run.facts
    assert found.columns.keys() == run.columns.keys()
    for name, values in run.columns.items():
        assert found.columns[name].dtype == np.float64
        np.testing.assert_array_equal(found.columns[name], values.astype(np.float32), err_msg=name)


@pytest.fixture
def runs(make_run):
    """Of different lengths, with different columns."""
    return [
        make_run(CHOSEN[0], seed=1, readings=30, facts={"per_epoch": 5}),
        make_run(CHOSEN[1], seed=2, common_loss=np.linspace(1, 2, 40)),
    ]


def test_what_was_collected_is_read_back_in_the_order_of_the_list(tmp_path, runs, capsys):
    for run in runs:
        keep(run, tmp_path)
        assert is_made(run.config, tmp_path)
    assert collect(tmp_path, tmp_path / "runs.parquet") == 2
    assert "2 runs, 70 readings" in capsys.readouterr().out
    vision, language = runs
    found = load(tmp_path / "runs.parquet")
    assert [run.name for run in found] == [language.name, vision.name]
    assert_same(found[0], language)
    assert_same(found[1], vision)


def test_collecting_keeps_stored_runs_and_renews_those_at_hand(tmp_path, runs, make_run):
    stored = tmp_path / "runs.parquet"
    for run in runs:
        keep(run, tmp_path / "first")
    collect(tmp_path / "first", stored)
    renewed = make_run(CHOSEN[0], seed=9)
    keep(renewed, tmp_path / "second")
    assert collect(tmp_path / "second", stored) == 2
    language, vision = load(stored)
    assert_same(language, runs[1])
    assert_same(vision, renewed)


def test_a_run_is_whole_only_with_its_facts(tmp_path, runs):
    keep(runs[0], tmp_path)
    file_of(CHOSEN[0], tmp_path).unlink()
    assert not is_made(CHOSEN[0], tmp_path)
    assert load_work(tmp_path) == []
