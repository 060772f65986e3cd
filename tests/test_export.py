"""Export: many runs as one Parquet table, which polars, DuckDB and pandas read alike."""

import json
import math
import random

import duckdb
import pandas
import polars
import pyarrow.parquet as pq
import pytest

import logalign.runs.export
from logalign import Reading, open_run
from logalign.errors import InputError, MissingExtraError, RunError
from logalign.runs.export import export, found_runs
from logalign.runs.reading import REVISIT_FIELDS
from logalign.runs.writer import RunWriter
from tests.drifts import drifting


def write(path, *, readings=5, lr=0.1, sites=("unembedding",), **extra):
    writer = RunWriter(path, {"main": "unembedding", "settings": {"lr": lr, "opt": "adamw"}})
    for i in range(readings):
        for site in sites:
            writer.append(
                Reading(
                    step=10 * i,
                    site=site,
                    lar=None if i == 3 else 0.5 + 0.01 * i,
                    reason="a zero norm" if i == 3 else None,
                    energies={"weight": 1.0 + i, "input": 2.0, "output": None},
                    standard_errors=dict.fromkeys(logalign.runs.export.FORMS, 0.01) if i == 2 else None,
                    n=64,
                    tokens=100 if i else None,
                    extra=extra,
                )
            )
    writer.close()
    return path


def test_drift_is_in_the_table_with_its_types(tmp_path):
    readings = drifting([Reading(step=step, lar=0.5) for step in range(10)])
    writer = RunWriter(tmp_path / "run", {"main": "unembedding"})
    for reading in readings:
        writer.append(reading)
    writer.close()
    write(tmp_path / "without")
    table = pq.read_table(export([tmp_path / "run", tmp_path / "without"], tmp_path / "all.parquet").path)
    types = {name: str(table.schema.field(name).type) for name in REVISIT_FIELDS}
    assert types == dict.fromkeys(REVISIT_FIELDS, "double") | {"revisited": "int64", "drift_reason": "string"}
    for name in REVISIT_FIELDS:
        assert table[name].to_pylist() == [*(getattr(reading, name) for reading in readings), *[None] * 5], name
    assert polars.read_parquet(tmp_path / "all.parquet")["revisited"].dtype == polars.Int64


def test_every_field_reads_back_as_the_run_has_it(tmp_path):
    one = write(tmp_path / "one", sites=("unembedding", "layer"), val_loss=2.5)
    two = write(tmp_path / "two", lr=0.2, accuracy=0.9)
    done = export([one, two], tmp_path / "all.parquet")
    assert (done.path, done.runs, done.readings, done.skipped) == (tmp_path / "all.parquet", 2, 15, ())
    table = pq.read_table(done.path).to_pylist()
    for run in (one, two):
        rows = [row for row in table if row["run"] == str(run)]
        opened = open_run(run)
        assert len(rows) == len(opened.readings)
        for row, reading in zip(rows, opened.readings, strict=True):
            for name in logalign.runs.export.FIELDS:
                if name not in ("energies", "standard_errors"):
                    assert row[name] == getattr(reading, name), name
            assert {name: row[f"energy_{name}"] for name in ("weight", "input", "output")} == reading.energies
            errors = {form: row[f"{form}_error"] for form in logalign.runs.export.FORMS}
            assert errors == (reading.standard_errors or dict.fromkeys(errors))
            assert json.loads(row["settings"]) == opened.meta["settings"]
            assert (row["val_loss"], row["accuracy"]) == ((2.5, None) if run == one else (None, 0.9))


def test_polars_duckdb_and_pandas_agree(tmp_path):
    runs = [write(tmp_path / f"run-{lr}", lr=lr) for lr in (0.1, 0.2)]
    file = export(runs, tmp_path / "all.parquet").path
    read = polars.read_parquet(file)
    assert read.filter(polars.col("step") == 40)["lar"].to_list() == [0.54, 0.54]
    assert read["settings"].str.json_path_match("$.lr").unique().sort().to_list() == ["0.1", "0.2"]
    asked = f"""
        SELECT run, CAST(settings->>'$.lr' AS DOUBLE) AS lr, max(lar), count(lar), sum(tokens)
        FROM '{file}' GROUP BY ALL ORDER BY run
    """
    assert duckdb.sql(asked).fetchall() == [(str(runs[0]), 0.1, 0.54, 4, 400), (str(runs[1]), 0.2, 0.54, 4, 400)]
    frame = pandas.read_parquet(file)
    assert frame.groupby("run")["lar"].max().to_list() == [0.54, 0.54]
    assert frame["step"].dtype == "int64"
    assert frame["lar"].isna().sum() == 2


def test_folders_patterns_and_urls_are_found_and_none_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sweep/a/1", "sweep/a/2", "sweep/b", "sweep/a/1/spectra/not-a-run-of-its-own"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    runs = [write(tmp_path / "sweep" / name) for name in ("a/1", "a/2", "b")]
    write(tmp_path / "sweep/a/1/nested")
    (tmp_path / "log.jsonl").write_text('{"step": 0, "lar": 0.5}\n')
    assert found_runs("sweep") == ["sweep/a/1", "sweep/a/2", "sweep/b"]
    assert found_runs("sweep/*") == ["sweep/a/1", "sweep/a/2", "sweep/b"]
    assert found_runs("*.jsonl") == ["log.jsonl"]
    assert found_runs("sweep/b") == ["sweep/b"]
    assert found_runs("log.jsonl") == ["log.jsonl"]
    url = (tmp_path / "sweep").as_uri()
    assert found_runs(url) == [f"{url}/{each}" for each in ("a/1", "a/1/nested", "a/2", "b")]
    with pytest.raises(InputError, match=r"none-\*: expected a pattern that matches runs, found nothing"):
        found_runs("none-*")
    given = ["sweep", "sweep/b", open_run(runs[0]), "log.jsonl", "./log.jsonl"]
    done = export(given, "all.parquet")
    assert (done.runs, done.readings) == (4, 16)


def test_a_damaged_run_is_told_and_left_out(tmp_path):
    good = write(tmp_path / "good")
    for name, meta in (("future", '{"schema_version": 99}'), ("damaged", "{"), ("other", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(meta)
    empty = write(tmp_path / "empty", readings=0)
    torn = write(tmp_path / "torn")
    lines = (torn / "readings.jsonl").read_text().splitlines()
    (torn / "readings.jsonl").write_text("\n".join([lines[0], "nonsense", *lines[1:]]))
    huge = write(tmp_path / "huge")
    (huge / "readings.jsonl").write_text('{"step": 0, "lar": 0.5, "n": 1e30}\n')
    half = write(tmp_path / "half")
    with (half / "readings.jsonl").open("a") as log:
        log.write('{"step": 90, "la')
    told = []
    done = export([tmp_path, tmp_path / "gone"], tmp_path / "all.parquet", told=told.append)
    assert (done.runs, done.readings) == (3, 10)
    assert set(pq.read_table(done.path)["run"].to_pylist()) == {str(good), str(half)}
    assert list(done.skipped) == told
    assert [each.split(": expected")[0].removeprefix(f"{tmp_path}/") for each in told] == [
        "damaged/run.json",
        "future/run.json",
        "huge",
        "other/run.json",
        "torn/readings.jsonl, line 2",
        "gone",
    ]
    assert str(empty) not in " ".join(told)


def test_strict_stops_and_leaves_what_was_there(tmp_path):
    write(tmp_path / "runs/a")
    (tmp_path / "runs/b").mkdir()
    (tmp_path / "runs/b/run.json").write_text("{")
    out = tmp_path / "all.parquet"
    out.write_text("before")
    with pytest.raises(RunError, match=r"b/run\.json: expected a JSON object, found damage"):
        export([tmp_path / "runs"], out, strict=True)
    assert out.read_text() == "before"
    with pytest.raises(InputError, match="expected at least one run that can be read, found 1 that cannot, of which"):
        export([tmp_path / "runs/b"], out)
    with pytest.raises(InputError, match=r"expected at least one run that can be read, found 0 that cannot$"):
        export([], out)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["all.parquet", "runs"]
    export([tmp_path / "runs/a"], out)
    assert pq.read_table(out).num_rows == 5
    assert sorted(each.name for each in tmp_path.iterdir()) == ["all.parquet", "runs"]


def test_where_it_cannot_be_written_is_told(tmp_path):
    run = write(tmp_path / "run")
    with pytest.raises(RunError, match=r"found no folder .*/none$"):
        export([run], tmp_path / "none" / "all.parquet")
    with pytest.raises(RunError, match="found a folder of that name"):
        export([run], tmp_path)


def test_names_of_values_that_are_ours_or_odd(tmp_path):
    lines = [
        {"step": 0, "lar": 0.5, "run": 1.0, "energy_weight": 2.0, "lar_error": 3.0, "settings": 4.0, "a/b c": 5.0},
        {"step": 1, "lar": 0.5, "<script>": 6.0, "\ud800": 7.0, "site": "\udcff", "extra_run": 8.0},
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = pq.read_table(export([log], tmp_path / "all.parquet").path).to_pylist()
    assert first["run"] == str(log)
    assert (first["extra_energy_weight"], first["extra_lar_error"], first["extra_settings"]) == (2.0, 3.0, 4.0)
    assert (first["a/b c"], first["extra_extra_run"]) == (5.0, 1.0)
    assert (second["<script>"], second["?"], second["site"], second["extra_run"]) == (6.0, 7.0, "?", 8.0)
    assert first["energy_weight"] is None


def test_parts_join_in_order_whatever_columns_they_have(tmp_path, monkeypatch):
    monkeypatch.setattr(logalign.runs.export, "PART_ROWS", 7)
    generator = random.Random(0)
    expected = []
    for i in range(12):
        names = generator.sample(["alpha", "beta", "gamma", "delta"], generator.randrange(4))
        length = generator.randrange(1, 20)
        write(tmp_path / "runs" / f"{i:02d}", readings=length, **{name: float(i) for name in names})
        expected += [(i, step, frozenset(names)) for step in range(0, 10 * length, 10)]
    file = export([tmp_path / "runs"], tmp_path / "all.parquet").path
    assert pq.ParquetFile(file).num_row_groups > 5
    found = [
        (
            int(row["run"][-2:]),
            row["step"],
            frozenset(name for name in ("alpha", "beta", "gamma", "delta") if row.get(name) == int(row["run"][-2:])),
        )
        for row in pq.read_table(file).to_pylist()
    ]
    assert [each for each in found if each[0]] == [each for each in expected if each[0]]
    assert len(found) == len(expected)


def test_without_pyarrow_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r'logalign export needs pyarrow: pip install "logalign\[export\]"'):
        export([write(tmp_path / "run")], tmp_path / "all.parquet")


@pytest.mark.slow
def test_two_thousand_runs(tmp_path):
    one = write(tmp_path / "runs" / "0", readings=50, val_loss=1.0)
    for i in range(1, 2000):
        folder = tmp_path / "runs" / str(i)
        folder.mkdir()
        for name in ("run.json", "readings.jsonl", "events.jsonl"):
            (folder / name).hardlink_to(one / name)
    done = export([tmp_path / "runs"], tmp_path / "all.parquet")
    assert (done.runs, done.readings) == (2000, 100_000)
    mean = duckdb.sql(f"SELECT count(DISTINCT run), avg(lar) FROM '{done.path}'").fetchall()[0]
    assert mean[0] == 2000
    assert math.isclose(mean[1], polars.Series([r.lar for r in open_run(one).readings]).mean())
