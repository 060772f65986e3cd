"""The CSV tracker: a table that grows, survives and reads as a run."""

import csv
import os
from pathlib import Path

import pandas
import polars
import pytest

from logalign import diagnose, open_run
from logalign.errors import RunError
from logalign.trackers.csv import CsvTracker, open_tracker


def test_a_table_reads_as_the_run_that_it_shows(recorded, tools, tmp_path):
    show, check_same = tools
    show("csv", recorded, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    check_same(open_run(tmp_path / "metrics.csv").readings, recorded)
    shown, own = diagnose(tmp_path / "metrics.csv"), diagnose(recorded)
    assert own.outcome == "overfitting"
    assert shown.record() == own.record()


def test_it_is_a_plain_table(recorded, tools, tmp_path):
    show, _ = tools
    show("csv", recorded, folder=tmp_path)
    for table in (pandas.read_csv(tmp_path / "metrics.csv"), polars.read_csv(tmp_path / "metrics.csv")):
        assert list(table["step"]) == [reading.step for reading in recorded]
        assert list(table["logalign/lar"]) == [reading.lar for reading in recorded]
    assert list(table.columns[:3]) == ["step", "time", "logalign/lar"]


def test_a_name_that_comes_up_later_is_a_column(tmp_path):
    tracker = CsvTracker(tmp_path / "a.csv")
    tracker.log({"logalign/lar": 0.5}, step=0)
    tracker.log({"logalign/lar": 0.25, 'logalign/odd, "name"': 1.5}, step=10)
    tracker.log({'logalign/odd, "name"': 2.5}, step=20)
    tracker.close()
    with (tmp_path / "a.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "time", "logalign/lar", 'logalign/odd, "name"']
    assert [[row[0], *row[2:]] for row in rows] == [["0", "0.5", ""], ["10", "0.25", "1.5"], ["20", "", "2.5"]]
    assert os.listdir(tmp_path) == ["a.csv"]


def test_a_reading_is_in_the_file_when_log_returns(tmp_path):
    tracker = CsvTracker(tmp_path / "a.csv")
    tracker.log({"logalign/lar": 0.5}, step=0)
    tracker.log({"logalign/lar": 0.5}, step=10)
    assert (tmp_path / "a.csv").read_text().count("\n") == 3
    tracker.close()


def test_a_resumed_training_goes_on_in_the_file_and_supersedes(tmp_path):
    for steps, lar in (((0, 10, 20, 30), 0.5), ((20, 30), 0.75)):
        tracker = open_tracker(tmp_path)
        for step in steps:
            tracker.log({"logalign/lar": lar}, step=step)
        tracker.close()
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 7
    readings = open_run(tmp_path / "metrics.csv").readings
    assert [(each.step, each.lar) for each in readings] == [(0, 0.5), (10, 0.5), (20, 0.75), (30, 0.75)]


def test_a_line_that_was_left_unfinished_is_not_read_and_goes_with_the_next_training(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,time,logalign/lar\n0,1.0,0.5\n10,2.0,0.4")
    assert [each.step for each in open_run(path).readings] == [0]
    tracker = open_tracker(tmp_path)
    tracker.log({"logalign/lar": 0.25}, step=10)
    tracker.close()
    assert [(each.step, each.lar) for each in open_run(path).readings] == [(0, 0.5), (10, 0.25)]


def test_another_table_is_left_alone(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,accuracy\n1,0.5\n")
    with pytest.raises(RunError) as caught:
        open_tracker(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'metrics.csv'}: expected a table that begins with step, time, found epoch, accuracy; move it away"
    )


def test_without_a_run_folder_it_writes_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tracker = open_tracker(None)
    tracker.log({"logalign/lar": 0.5}, step=0)
    tracker.close()
    assert len(open_run("logalign-metrics.csv").readings) == 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(RunError, match=r"metrics\.csv: expected a file that can be written, found: "):
        open_tracker(tmp_path / "run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_told_of_once(recorded, tools, tmp_path):
    show, check_same = tools
    (tmp_path / "metrics.csv").symlink_to("/dev/full")
    told = []
    show(["csv", "tensorboard"], recorded[:9], folder=tmp_path, warn=lambda key, message: told.append(message))
    assert told == [
        "CsvTracker failed and gets no more readings (OSError: [Errno 28] No space left on device); training goes on"
    ]
    check_same(open_run(tmp_path / "tensorboard").readings, recorded[:9], rel=1e-6)
