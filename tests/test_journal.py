"""The journal: readings are written, judged, shown, and what is wrong with them is told once."""

import json

import pytest

import logalign
from logalign import Reading, Readings, open_run
from logalign.errors import InputError, LogAlignWarning, RunError
from logalign.recording.journal import open_journal


def readings_of(step, *, lar=0.6, site="unembedding"):
    return Readings({site: Reading(step=step, site=site, lar=lar, n=8, m=16, loss=1.0)}, main=site)


def opened(folder=None, **given):
    return open_journal(folder, {"main": "unembedding"}, main="unembedding", **given)


def fill(journal, steps):
    for step in steps:
        seen = journal.count("unembedding", step=step, tokens=10)
        reading = Reading(step=step, lar=0.6 - step / 1000, n=8, m=16, loss=1.0, epoch=step / 20, tokens_seen=seen)
        journal.take(Readings({"unembedding": reading}, main="unembedding"))
    return journal


def test_readings_are_written_kept_and_judged(tmp_path):
    journal = fill(opened(tmp_path / "run"), range(50))
    assert [reading.lar for reading in open_run(tmp_path / "run").readings] == [0.6 - i / 1000 for i in range(50)]
    assert [readings.step for readings in journal.readings] == list(range(50))
    assert journal.verdict == logalign.diagnose(tmp_path / "run")
    journal.close(step=50)
    journal.close(step=50)
    assert [event["event"] for event in open_run(tmp_path / "run").events] == ["start", "close"]


def test_only_so_many_are_kept_in_memory():
    journal = fill(opened(history=3), range(5))
    assert [readings.step for readings in journal.readings] == [2, 3, 4]


def test_tokens_between_monitored_steps_are_counted_as_the_later_one_has_them():
    journal = opened()
    assert [journal.count("head", step=step, tokens=tokens) for step, tokens in ((0, 5), (10, 7))] == [5, 75]


def test_sites_are_described_once_and_when_they_change(tmp_path):
    journal = opened(tmp_path / "run")
    for m in (16, 16, 24):
        journal.describe({"unembedding": {"m": m, "n": 8}}, step=0)
    run = open_run(tmp_path / "run")
    assert run.meta["sites"] == {"unembedding": {"m": 24, "n": 8}}
    assert [event["event"] for event in run.events] == ["start", "sites", "sites"]


def test_a_warning_is_told_once_after_the_reading_is_written(tmp_path):
    journal = opened(tmp_path / "run")

    def take(steps):
        for step in steps:
            journal.warn_later("key", "odd")
            journal.take(readings_of(step))

    with pytest.warns(LogAlignWarning, match="logalign: odd") as told:
        take(range(3))
    assert len(told) == 1
    run = open_run(tmp_path / "run")
    assert [(event["message"], event["step"]) for event in run.events if event["event"] == "warning"] == [("odd", 0)]


def test_a_warning_that_is_an_error_loses_no_reading(tmp_path):
    journal = opened(tmp_path / "run")
    journal.warn_later("key", "odd")
    with pytest.raises(LogAlignWarning):  # as pytest here makes errors of warnings
        journal.take(readings_of(0))
    assert len(open_run(tmp_path / "run").readings) == len(journal.readings) == 1


def test_a_run_is_gone_on_with_after_its_last_reading(tmp_path):
    fill(opened(tmp_path / "run"), range(20)).close(step=20)
    journal = opened(tmp_path / "run", resume=True)
    assert journal.first_step == 20
    fill(journal, range(20, 50))
    whole = fill(opened(tmp_path / "whole"), range(50))
    assert journal.verdict == whole.verdict
    assert open_run(tmp_path / "run").readings == open_run(tmp_path / "whole").readings


@pytest.mark.parametrize("folder", [True, False])
def test_a_checkpoint_supersedes_what_came_after_it(tmp_path, folder):
    journal = fill(opened(tmp_path / "run" if folder else None), range(20))
    state = json.loads(json.dumps(journal.state_dict()))
    verdict = fill(journal, range(20, 40)).verdict
    journal.load_state_dict(state, step=20)
    assert fill(journal, range(20, 40)).verdict == verdict
    if folder:
        assert [reading.step for reading in open_run(tmp_path / "run").readings] == list(range(40))
        assert open_run(tmp_path / "run").readings[-1].tokens_seen == 400


def test_a_torn_line_is_left_behind_by_a_resume(tmp_path):
    fill(opened(tmp_path / "run"), range(3)).close(step=3)
    with (tmp_path / "run" / "readings.jsonl").open("a") as file:
        file.write('{"step": 3, "la')
    fill(opened(tmp_path / "run", resume=True), range(3, 5))
    assert [reading.step for reading in open_run(tmp_path / "run").readings] == list(range(5))


def test_other_processes_judge_the_same_and_write_nothing(tmp_path):
    first = fill(opened(tmp_path / "run"), range(30))
    first.close(step=30)
    other = opened(tmp_path / "run", resume=True, is_first=False, trackers="csv")
    assert other.first_step == 30
    assert other.verdict == first.verdict
    before = sorted((path.name, path.stat().st_size) for path in (tmp_path / "run").iterdir())
    fill(other, range(30, 35)).close(step=35)
    assert sorted((path.name, path.stat().st_size) for path in (tmp_path / "run").iterdir()) == before


def test_what_is_wrong_is_told_at_once(tmp_path):
    with pytest.raises(InputError, match="regime"):
        opened(tmp_path / "run", regime="memory")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="trackers"):
        opened(tmp_path / "run", trackers="paper")
    fill(opened(tmp_path / "there"), range(2))
    with pytest.raises(RunError, match="resume=True"):
        opened(tmp_path / "there")
