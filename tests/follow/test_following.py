"""What a follower says, against what `diagnose` says of the same files; and the layout of it at every size."""

import json

import pytest

from logalign.diagnosis.detector import diagnose
from logalign.errors import RunError
from logalign.follow.following import Follower
from logalign.follow.screen import View, screen
from logalign.runs.run import open_run


class Clock:
    now = 1_700_000_100.0

    def __call__(self):
        return self.now


def followed(path, clock=None):
    clock = clock or Clock()
    return Follower(path, clock=clock, timer=clock)


def all_of(follower):
    told = follower.look()
    while follower.behind:
        told += follower.look()
    return told


def text(follower, width=80, height=24, choice=None):
    return "\n".join(row.plain for row in screen(follower, choice or View(), width=width, height=height))


def test_at_every_reading_it_says_what_diagnose_says(recorded):
    readings = open_run(recorded).readings
    told = all_of(followed(recorded))
    assert [reading for reading, _ in told] == readings
    for i in range(9, len(readings), 35):
        assert told[i][1] == diagnose(readings[: i + 1])
    assert {verdict.outcome for _, verdict in told} >= {"healthy", "overfitting"}


def test_after_a_resume_it_says_what_diagnose_says(write_run):
    run = write_run()
    follower = followed(run.path)
    all_of(follower)
    log = run.path / "readings.jsonl"
    event = {"event": "resume", "step": 50, "readings_offset": log.stat().st_size}
    with (run.path / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    all_of(follower)
    assert follower.verdict == diagnose(run.path)
    assert follower.last.step == 40
    assert len(follower.history) == 5


def test_the_main_layer_is_judged_though_another_is_read_first(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0, "lar": 0.1, "site": "first"}\n')
    follower = followed(path)
    all_of(follower)
    assert follower.site == "first"
    with path.open("a") as log:
        log.write('{"step": 0, "lar": 0.5}\n{"step": 1, "lar": 0.1, "site": "first"}\n{"step": 1, "lar": 0.6}\n')
    all_of(follower)
    assert follower.site == "unembedding"
    assert follower.history.column("lar").tolist() == [0.5, 0.6]
    assert "1 more recorded" in text(follower, width=100)


def test_a_stall_is_told_after_a_minute_or_five_intervals(write_run):
    clock = Clock()
    clock.now = 1_700_000_019.0  # of the last reading; they are a second apart
    follower = followed(write_run().path, clock)
    all_of(follower)
    assert (follower.state, follower.age) == ("running", 0.0)
    clock.now += 60
    assert follower.state == "running"
    clock.now += 245
    assert follower.state == "stalled"
    assert "no reading for 5 min, usually 1 s apart: is the training still running?" in text(follower)
    with (follower.path / "readings.jsonl").open("a") as log:
        log.write('{"step": 1000, "lar": 0.5, "time": 3.0}\n')  # by a clock of its own
    all_of(follower)
    assert (follower.state, follower.age) == ("running", 0.0)


def test_a_close_and_a_resume_after_it(write_run):
    run = write_run()
    follower = followed(run.path)
    with (run.path / "events.jsonl").open("a") as log:
        log.write('{"event": "close", "step": 200}\n')
    all_of(follower)
    assert follower.state == "closed"
    with (run.path / "events.jsonl").open("a") as log:
        log.write('{"event": "resume", "step": 200, "readings_offset": 99999}\n')
    all_of(follower)
    assert follower.state != "closed"


def test_readings_that_cannot_be_judged_together_are_told(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"step": 0, "lar": 0.5, "n": 8}\n{"step": 1, "lar": 0.5, "n": 16}\n{"step": 2, "lar": 0.6, "n": 16}\n'
    )
    follower = followed(path)
    all_of(follower)
    assert follower.verdict.reason.startswith("the readings cannot be judged together: ")
    assert len(follower.history) == 3


def test_the_disk_is_asked_again_after_an_error(write_run):
    run = write_run()
    follower = followed(run.path)
    all_of(follower)
    log = run.path / "readings.jsonl"
    data = log.read_bytes()
    log.unlink()
    log.mkdir()
    assert follower.look() == []
    assert follower.trouble == "cannot be read (Is a directory), trying again"
    assert "cannot be read (Is a directory)" in text(follower)
    log.rmdir()
    log.write_bytes(data + b'{"step": 500, "lar": 0.5}\n')
    all_of(follower)
    assert follower.trouble is None
    assert follower.last.step == 500


def test_damage_is_looked_at_three_times(write_run):
    run = write_run()
    follower = followed(run.path)
    all_of(follower)
    with (run.path / "readings.jsonl").open("a") as log:
        log.write('\0\0\n{"step": 500, "lar": 0.5}\n')
    for _ in range(2):
        follower.look()
        assert "line 21: expected a JSON object" in follower.trouble
    with pytest.raises(RunError, match="line 21: expected a JSON object"):
        follower.look()


@pytest.mark.parametrize("lars", [[], [0.5], [None], [0.5, None, 0.7] * 40])
def test_the_screen_fits_every_size(write_run, lars):
    follower = followed(write_run(lars=lars).path / "")
    all_of(follower)
    follower.warnings.append((5, "word " * 50))
    choices = [View(), View(curve="signal", zoomed=True), View(curve="k"), View(help=True)]
    for width in (1, 2, 9, 20, 39, 71, 72, 80, 201):
        for height in (1, 2, 5, 9, 13, 17, 24, 60):
            for choice in choices:
                rows = screen(follower, choice, width=width, height=height)
                assert len(rows) <= height
                assert all(row.cell_len <= width for row in rows)
                assert all(row.plain.isprintable() for row in rows)


def test_the_verdict_stays_when_there_is_room_for_little_else(recorded):
    follower = followed(recorded)
    all_of(follower)
    assert "OVERFITTING" in text(follower, width=24, height=3)
    assert "LAR ──" not in text(follower, width=24, height=3)
    assert "LAR ──" in text(follower, width=60, height=24)
    assert "k ──" not in text(follower, width=60, height=24)
