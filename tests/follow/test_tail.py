"""The incremental reader against `open_run` on the same files, at every byte of their growth."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logalign.errors import RunError
from logalign.follow.tail import Tail
from logalign.runs.reading import Reading
from logalign.runs.run import open_run
from logalign.runs.writer import RunWriter


def start(folder):
    """A run folder without readings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"schema_version": 1, "main": "unembedding"}))


def line(step, **fields):
    return (json.dumps({"step": step, "lar": 0.5, **fields}) + "\n").encode()


def append(path, data):
    with path.open("ab") as file:
        file.write(data)


class Given:
    """All that a tail has given since its last restart."""

    def __init__(self, path):
        self.tail = Tail(path)
        self.readings = []
        self.restarts = 0
        self.error = None

    def look(self, most=1 << 20):
        try:
            found = self.tail.look(most)
        except RunError as error:
            self.error = str(error)
            return
        self.error = None
        if found.restarted:
            self.restarts += 1
            self.readings = []
        self.readings += found.readings
        self.last = found

    def all(self, most=1 << 20):
        """Look until nothing is left."""
        self.look(most)
        while self.error is None and self.last.behind:
            self.look(most)
        return self.readings


def same_as_open_run(given, folder, most=1 << 20):
    """Errors may name another line, where several are damaged in different ways."""
    readings, run = given.all(most), open_run(folder)
    if given.error is not None:
        assert str(folder) in given.error
        with pytest.raises(RunError, match="line"):
            _ = run.readings
    else:
        assert readings == run.readings


def script(folder):
    """What a training writes that is killed inside a line, resumed twice and warned, as (file, bytes) in order."""
    written = []
    readings, events = folder / "readings.jsonl", folder / "events.jsonl"
    size = 0

    def log(data):
        nonlocal size
        size += len(data)
        written.append((readings, data))

    def event(**entries):
        written.append((events, (json.dumps({"time": 1.0, **entries}) + "\n").encode()))

    event(event="start")
    log(line(0) + line(10) + line(20, site="other") + line(20)[:9])
    log(b"\n")
    event(event="resume", step=10, readings_offset=size)
    log(line(10, lar=0.6))
    event(event="warning", step=10, message="é \u2028 \x1b[31m")
    log(line(20, lar=None, reason="é"))
    written.append((events, b'{"event": "warn'))
    written.append(
        (events, b'\n{"event": "resume", "step": 21, "readings_offset": %d, "after_torn_line": true}\n' % size)
    )
    log(line(30) + b'{"step": 40, "lar": 0.5}')
    return written


@pytest.mark.parametrize("most", [1 << 20, 7])
def test_at_every_byte_a_growing_run_reads_as_open_run_reads_it(tmp_path, most):
    start(tmp_path)
    given, looks = Given(tmp_path), 0
    for path, data in script(tmp_path):
        for i in range(len(data)):
            append(path, data[i : i + 1])
            same_as_open_run(given, tmp_path, most)
            looks += 1
    assert given.restarts == 1  # the resume that superseded step 10; the one at 21 superseded nothing
    assert [reading.step for reading in given.readings] == [0, 10, 20, 30, 40]
    assert looks > 500


def test_a_tail_that_begins_late_reads_the_same_in_one_look(tmp_path):
    start(tmp_path)
    for path, data in script(tmp_path):
        append(path, data)
    given = Given(tmp_path)
    same_as_open_run(given, tmp_path)
    assert given.restarts == 0


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    pieces=st.lists(
        st.one_of(
            st.tuples(st.just("reading"), st.integers(0, 12)),
            st.tuples(st.just("torn"), st.integers(1, 20)),
            st.tuples(st.just("resume"), st.integers(0, 12)),
            st.tuples(
                st.just("damage"), st.sampled_from([b"\n", b"[1]\n", b"{\n", b'{"lar": 1}\n', b"\x00\x00\n", b"\xff"])
            ),
        ),
        max_size=12,
    ),
    most=st.sampled_from([3, 60, 1 << 20]),
    every=st.integers(1, 3),
)
def test_whatever_is_written_reads_as_open_run_reads_it(tmp_path_factory, pieces, most, every):
    folder = tmp_path_factory.mktemp("run")
    start(folder)
    log = folder / "readings.jsonl"
    log.touch()
    given = Given(folder)
    for i, (kind, value) in enumerate(pieces):
        if kind == "reading":
            append(log, line(value))
        elif kind == "torn":
            append(log, line(5)[:value])
        elif kind == "damage":
            append(log, value)
        else:
            data = log.read_bytes()
            if data and not data.endswith(b"\n"):
                append(log, b"\n")
            event = {"event": "resume", "step": value, "readings_offset": log.stat().st_size}
            append(folder / "events.jsonl", (json.dumps(event) + "\n").encode())
        if i % every == 0:
            same_as_open_run(given, folder, most)
    same_as_open_run(given, folder, most)


def test_a_file_is_read_from_where_the_look_before_stopped(tmp_path):
    start(tmp_path)
    log = tmp_path / "readings.jsonl"
    append(log, line(0) * 1000)
    given = Given(tmp_path)
    given.all()
    # What was read before is not looked at again, but for the last bytes.
    data = bytearray(log.read_bytes())
    data[:10] = b"x" * 10
    with log.open("r+b") as file:
        file.write(data)
    append(log, line(10))
    given.look()
    assert [reading.step for reading in given.last.readings] == [10]
    assert not given.last.restarted


@pytest.mark.parametrize("same_size", [True, False])
def test_a_file_that_is_written_anew_is_read_anew(tmp_path, same_size):
    start(tmp_path)
    log = tmp_path / "readings.jsonl"
    append(log, line(1) + line(2))
    given = Given(tmp_path)
    given.all()
    with log.open("r+b") as file:  # the same inode
        file.write(line(3) + line(4) + (b"" if same_size else line(5)))
    os.utime(log, ns=(1, 1))
    same_as_open_run(given, tmp_path)
    assert given.restarts == 1


def test_a_file_that_is_cut_and_one_that_is_replaced_are_read_anew(tmp_path):
    start(tmp_path)
    log = tmp_path / "readings.jsonl"
    append(log, line(1) + line(2))
    given = Given(tmp_path)
    given.all()
    log.write_bytes(line(1))
    same_as_open_run(given, tmp_path)
    draft = tmp_path / "draft"
    draft.write_bytes(line(1) + line(7))
    draft.replace(log)
    same_as_open_run(given, tmp_path)
    log.unlink()
    same_as_open_run(given, tmp_path)
    assert given.readings == []
    assert given.restarts == 3


def test_a_resume_that_is_seen_late_supersedes_all_the_same(tmp_path):
    """As where a shared disk shows one file's growth before another's."""
    start(tmp_path)
    log = tmp_path / "readings.jsonl"
    append(log, line(1) + line(2))
    offset = log.stat().st_size
    append(log, line(2, lar=0.7))
    given = Given(tmp_path)
    assert [reading.step for reading in given.all()] == [1, 2, 2]
    append(tmp_path / "events.jsonl", b'{"event": "resume", "step": 2, "readings_offset": %d}\n' % offset)
    same_as_open_run(given, tmp_path)
    assert [reading.lar for reading in given.readings] == [0.5, 0.7]


def test_a_run_is_waited_for_from_before_there_is_a_folder(tmp_path):
    folder = tmp_path / "later"
    given = Given(folder)
    given.look()
    assert given.last.waiting == "nothing is there yet"
    folder.mkdir()
    given.look()
    assert given.last.waiting == "the folder is empty yet, without run.json"
    with_writer = RunWriter(folder, {"main": "unembedding"})
    given.look()
    assert (given.last.waiting, given.last.readings) == (None, [])
    with_writer.append(Reading(step=0, lar=0.5))
    with_writer.close()
    assert [reading.step for reading in given.all()] == [0]
    assert given.tail.meta["main"] == "unembedding"
    (folder / "run.json").unlink()
    given.look()
    assert given.last.waiting == "its run.json is gone"


def test_after_an_error_of_the_disk_nothing_is_lost(tmp_path):
    start(tmp_path)
    log = tmp_path / "readings.jsonl"
    append(log, line(1))
    given = Given(tmp_path)
    given.all()
    away = tmp_path / "away"
    log.rename(away)
    log.mkdir()  # reading it is an OSError
    with pytest.raises(IsADirectoryError):
        given.look()
    log.rmdir()
    away.rename(log)
    append(log, line(2))
    assert [reading.step for reading in given.all()] == [1, 2]


def test_json_lines_grow_to_the_same_readings(tmp_path):
    path = tmp_path / "log.jsonl"
    given = Given(path)
    given.look()
    assert given.last.waiting == "nothing is there yet"
    path.touch()
    given.look()
    assert given.last.waiting == "the file is empty yet"
    data = line(1) + line(2, val_loss=1.5) + line(3)
    for i in range(len(data)):
        append(path, data[i : i + 1])
        given.all()
        if i >= len(line(1)):
            assert given.readings == open_run(path).readings


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_tables_grow_by_whole_lines(tmp_path, suffix, delimiter):
    path = tmp_path / f"log{suffix}"
    text = '\ufeffstep,lar,loss,reason\n1,0.5,2.25,\n2,,1.5,"two\nlines"\n30,0.75,,x\n'.replace(",", delimiter)
    data = text.encode()
    given = Given(path)
    for i in range(len(data)):
        append(path, data[i : i + 1])
        given.all(40)
    assert given.readings == open_run(path).readings
    append(path, f"40{delimiter}0.6".encode())
    assert [reading.step for reading in given.all()] == [1, 2, 30]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("run/run.json", "{", "expected a JSON object, found damage"),
        ("run/run.json", '{"schema_version": 99}', "expected schema version 1 or earlier, found 99; upgrade logalign"),
        ("run/notes.txt", "x", "expected a run folder, found no run.json in it, but notes.txt"),
        (
            "run/trainer_state.json",
            '{"log_history": [], "global_step": 1}',
            "in the Trainer's log history, found nothing",
        ),
        ("run", "not JSON\nnor this\n", "expected a JSON object, found damage"),
        (
            "run",
            '{"step": 1, "lar": 0.5}\n{"\\u001b[31mstep": 1}\n',
            "line 2: expected a field 'step', found ?[31mstep",
        ),
        ("run", '{"step": 1e400, "lar": 0.5}\n', "line 1: step: expected a whole number"),
        ("run", '{"step": 1, "lar": 1' + "0" * 400 + "}\n", "line 1: "),
        ("run", "[" * 100_000 + "\n[\n", "line 1: expected a JSON object"),
        ("run/run.csv", "", "found no run.json"),
    ],
)
def test_what_is_no_run_is_one_clear_error(tmp_path, name, content, expected):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    given = Given(tmp_path / "run")
    given.look()
    assert given.error is not None
    assert expected in given.error
    assert given.error.isprintable()


def test_a_damaged_run_can_be_mended_while_it_is_followed(tmp_path):
    start(tmp_path)
    log = tmp_path / "readings.jsonl"
    append(log, line(1) + b"\0\0\0\0\n" + line(2))  # as a shared disk may show for a moment
    given = Given(tmp_path)
    given.look()
    assert "line 2: expected a JSON object" in given.error
    log.write_bytes(line(1) + line(2) + line(3))
    assert [reading.step for reading in given.all()] == [1, 2, 3]
