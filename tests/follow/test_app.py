"""Without a terminal: one line a reading, the state of now, and one line for every mistake."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from logalign import Reading
from logalign.diagnosis.detector import Detector
from logalign.follow.app import line_of
from tests.drifts import NO_DRIFT_YET, write_log

FOLLOW = [sys.executable, "-m", "logalign.cli", "follow"]


def follow(*arguments, **options):
    return subprocess.run(
        [*FOLLOW, *map(str, arguments)], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, **options
    )


def test_once_prints_what_there_is_now(recorded):
    result = follow("--once", recorded)
    assert (result.returncode, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    for expected in ("OVERFITTING", "since step 550", "why", "do", "LAR ──", "k ──", "150 readings", "strain of LAR"):
        assert expected in result.stdout


def test_once_without_utf_8_is_ascii(recorded):
    result = follow("--once", recorded, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0
    assert result.stdout.isascii()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (None, None, "nothing is there yet"),
        ("x.jsonl", "", "the file is empty yet"),
        ("x.jsonl", "oops\n{}\n", "x.jsonl, line 1: expected a JSON object, found damage"),
        ("x.csv", "a,b\n1,2\n", "x.csv: expected a column 'logalign/step', 'step'"),
        ("run.json", '{"schema_version": 2}', "expected schema version 1 or earlier, found 2; upgrade logalign"),
        ("notes", "x", "expected a run folder, found no run.json in it, but notes"),
    ],
)
def test_once_tells_what_is_no_run_in_one_line(tmp_path, name, content, expected):
    path = tmp_path / "run"
    if name is not None:
        path.mkdir()
        (path / name).write_text(content)
        path = path / name if name.startswith("x") else path
    result = follow("--once", path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr


def test_into_a_pipe_it_prints_a_line_a_reading_as_they_come(write_run):
    run = write_run(lars=[0.5, 0.51])
    with subprocess.Popen([*FOLLOW, run.path], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:
        first = [process.stdout.readline() for _ in range(2)]
        with (run.path / "readings.jsonl").open("a") as log:
            log.write('{"step": 20, "lar": 0.75, "n": 64, "m": 512, "loss": 1.5, "val_loss": 2.5}\n')
        last = process.stdout.readline()
        process.kill()
    assert first[0] == "step=0 lar=0.5 lar_centered=0.5 k=64 loss=4 verdict=healthy since=0\n"
    assert first[1].startswith("step=10 lar=0.51 ")
    assert last.startswith("step=20 lar=0.75 lar_centered=- k=8 loss=1.5 val_loss=2.5 verdict=")


def test_once_tells_drift_with_its_error_and_why_there_is_none(tmp_path):
    log = write_log(tmp_path / "run.jsonl", of=60)
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines) + '{"step": 600, "lar": 0.5, "drift": 0.03127, "drift_error": 0.01024}\n')
    shown = " drift 0.031 {} 0.010 nats a pass: other samples raise a sample's loss\n"
    assert shown.format("±") in follow("--once", log).stdout
    assert shown.format("+-") in follow("--once", log, env={**os.environ, "PYTHONIOENCODING": "ascii"}).stdout
    log.write_text("".join(lines[:9]))
    early = follow("--once", log).stdout
    assert f" no drift: {NO_DRIFT_YET}\n" in early
    assert "1.36 passes over the data" in early
    assert "nats a pass" not in early


def test_once_says_nothing_of_drift_where_a_run_does_not(recorded):
    assert "drift" not in follow("--once", recorded).stdout


def test_into_a_pipe_drift_stands_where_there_is_one():
    reading = Reading(step=120, lar=0.5, n=64, loss=2.25, drift=-0.125, drift_error=0.0625)
    verdict = Detector().verdict
    assert " loss=2.25 drift=-0.125 drift_error=0.0625 verdict=" in line_of(reading, verdict)
    assert "drift" not in line_of(replace(reading, drift=None, drift_error=None), verdict)


def test_it_ends_when_nobody_reads_any_more(recorded):
    with subprocess.Popen([*FOLLOW, recorded], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == ""


def test_a_url_is_not_waited_for(tmp_path):
    result = follow("s3://bucket/run", cwd=tmp_path)
    assert result.returncode == 1
    assert "expected a path on a disk of this machine" in result.stderr
