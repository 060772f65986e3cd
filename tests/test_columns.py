"""The reader of long logs gives what `Run.columns` gives, and leaves to it what it cannot read."""

import json

import numpy as np
import pytest

from logalign.errors import RunError
from logalign.runs.columns import site_columns
from logalign.runs.reading import REVISIT_FIELDS, Reading
from logalign.runs.run import open_run
from logalign.runs.writer import RunWriter
from tests.drifts import NO_DRIFT_YET, drifting

SHORT = 10**9


def same(run) -> None:
    found, expected = site_columns(run, long=0), site_columns(open_run(run.path), long=SHORT)
    assert list(found) == list(expected)
    for site in expected:
        # Other values than val_loss are left out, and a column is there even where nothing was recorded in it.
        assert set(expected[site]) - set(found[site]) <= {"accuracy"}
        for name in set(found[site]) & set(expected[site]):
            assert found[site][name].dtype.kind == expected[site][name].dtype.kind, name
            np.testing.assert_array_equal(found[site][name], expected[site][name], err_msg=name)


def append(run, text: str):
    with (run.path / "readings.jsonl").open("a") as file:
        file.write(text)
    return open_run(run.path)


def test_every_column_is_that_of_the_slow_reader(write_run):
    same(write_run("plain", val_loss=3.0))
    same(write_run("undefined", lars=[0.5, None, 0.123456789012345678, 1e-300, None]))
    same(write_run("sites", sites=("blocks.0", "unembedding")))
    errors = {"lar": 0.1, "lar_vocab_centered": None, "lar_token_centered": 0.2, "lar_centered": 0.3}
    same(write_run("sampled", standard_errors=errors, accuracy=0.5))


def drifting_run(path):
    """A run of two layers, of which the main one has drift from its fifth reading on."""
    sites = ("unembedding", "other")
    readings = drifting([Reading(step=step, site=site, lar=0.5) for step in range(20) for site in sites])
    writer = RunWriter(path, {"main": "unembedding"})
    for reading in readings:
        writer.append(reading)
    writer.close()
    return open_run(path), readings


def test_drift_is_that_of_the_slow_reader_with_its_reasons_and_gaps(tmp_path):
    run, readings = drifting_run(tmp_path / "run")
    assert run.readings == readings
    same(run)
    found = site_columns(run, long=0)
    main = [reading for reading in readings if reading.site == "unembedding"]
    for name in REVISIT_FIELDS:
        values = [getattr(reading, name) for reading in main]
        expected = [value or "" for value in values] if name == "drift_reason" else np.array(values, dtype=np.float64)
        np.testing.assert_array_equal(found["unembedding"][name], expected, err_msg=name)
        assert found["unembedding"][name].dtype.kind == {"revisited": "i", "drift_reason": "U"}.get(name, "f"), name
    assert found["unembedding"]["drift_reason"][[0, -1]].tolist() == [NO_DRIFT_YET, ""]
    assert np.isnan(found["other"]["drift"]).all()


def test_whole_numbers_stay_exact(write_run):
    run = write_run(tokens_seen=2**53 - 1)
    assert site_columns(run, long=0)["unembedding"]["tokens_seen"].tolist() == [2**53 - 1] * 20


def test_superseded_readings_are_hidden_and_torn_ones_dropped(write_run):
    run = write_run()
    size = append(run, '{"step": 200, "lar": 0.1').path.joinpath("readings.jsonl").stat().st_size
    append(run, "\n")
    with (run.path / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "resume", "time": 1.0, "step": 50, "readings_offset": size + 1}) + "\n")
    run = append(run, '{"step": 50, "lar": 0.25}\n{"step": 60, "lar": 0.')
    assert site_columns(run, long=0)["unembedding"]["step"].tolist() == [0, 10, 20, 30, 40, 50]
    same(run)


@pytest.mark.parametrize("line", ["not json", '{"lar": 0.5}', '{"step": 5, "lar": "high"}', "[1, 2]"])
def test_damage_is_named_as_the_slow_reader_names_it(write_run, line):
    run = append(write_run(), f"{line}\n" + '{"step": 210, "lar": 0.5}\n')
    with pytest.raises(RunError, match="line 21"):
        site_columns(run, long=0)


def test_an_empty_log_has_no_site(write_run):
    assert site_columns(write_run(lars=[]), long=0) == {}
