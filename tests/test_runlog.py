"""The run log: what is written reads back, whatever happened to the process that wrote it."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import polars
import pytest

from logalign import Reading, open_run
from logalign.errors import InputError, RunError
from logalign.runs.reading import REVISIT_FIELDS
from logalign.runs.writer import RunWriter
from tests.drifts import drifting

DATA = Path(__file__).parent / "data"


def reading(step, site="unembedding", lar=0.5, **fields):
    return Reading(step=step, site=site, lar=lar, **fields)


def write(path, steps, *, resume_at=None, lar=0.5):
    writer = RunWriter(path, {"main": "unembedding"}, resume=resume_at is not None)
    if resume_at is not None:
        writer.resume_at(resume_at)
    for step in steps:
        writer.append(reading(step, lar=lar))
    writer.close()


def steps_of(path):
    return [each.step for each in open_run(path).readings]


def refusal(path):
    with pytest.raises(RunError) as caught:
        open_run(path).readings  # noqa: B018
    return str(caught.value)


# Writing and reading ---------------------------------------------------------------------------------------------


def test_what_is_written_reads_back(tmp_path):
    written = [
        reading(0, time=1.5, n=4, m=7, energies={"weight": 1.0, "input": 2.0, "output": None}, extra={"val_loss": 2.5}),
        reading(0, "body", lar=None, reason="the mask keeps none — 0 of 24", nonfinite=0),
        reading(10, coherence=0.5, weight_participation=2.0, input_participation=3.0),
    ]
    writer = RunWriter(tmp_path / "deep" / "run", {"main": "unembedding", "settings": {"name": "ünïcode"}})
    for each in written:
        writer.append(each)
    writer.event("note", text="a line\nbreak")
    writer.describe(sites={"unembedding": {"m": 7}})
    writer.close()
    writer.close()
    run = open_run(tmp_path / "deep" / "run")
    assert run.readings == written
    assert [event["event"] for event in run.events] == ["start", "note"]
    assert run.events[1]["text"] == "a line\nbreak"
    assert run.meta["settings"] == {"name": "ünïcode"}
    assert run.meta["sites"] == {"unembedding": {"m": 7}}
    assert {path.name for path in run.path.iterdir()} == {"run.json", "readings.jsonl", "events.jsonl"}


def test_every_reading_is_one_write(tmp_path, monkeypatch):
    writer = RunWriter(tmp_path / "run", {})
    writes = []
    plain = os.write
    monkeypatch.setattr(os, "write", lambda file, data: writes.append(data) or plain(file, data))
    writer.append(reading(0))
    writer.append(reading(1))
    monkeypatch.undo()
    writer.close()
    assert len(writes) == 2
    assert all(data.endswith(b"\n") for data in writes)


def test_an_empty_run(tmp_path):
    RunWriter(tmp_path / "run", {}).close()
    run = open_run(tmp_path / "run")
    assert run.readings == []
    assert {name: column.size for name, column in run.columns().items()} == dict.fromkeys(run.columns(), 0)
    (tmp_path / "run" / "readings.jsonl").unlink()
    (tmp_path / "run" / "events.jsonl").unlink()
    assert open_run(tmp_path / "run").readings == []
    assert open_run(tmp_path / "run").events == []


@pytest.mark.parametrize("frame", [pandas.DataFrame, polars.DataFrame])
def test_columns_go_into_data_frames(tmp_path, frame):
    writer = RunWriter(tmp_path / "run", {})
    energies = {"weight": 1.0, "input": 2.0, "output": None}
    writer.append(reading(0, lar=None, reason="none kept", n=4, tokens=3, energies=energies, extra={"val_loss": 1.5}))
    writer.append(reading(10, n=4, extra={"other": None}))
    writer.append(reading(10, "body", n=6, tokens=3))
    writer.close()
    columns = open_run(tmp_path / "run").columns()
    found = frame(columns)
    assert found.shape == (3, len(columns))
    assert list(found["step"]) == [0, 10, 10]
    assert list(found["site"]) == ["unembedding", "unembedding", "body"]
    assert list(found["reason"]) == ["none kept", "", ""]
    assert columns["step"].dtype == columns["n"].dtype == np.int64
    for name, expected in {
        "lar": [np.nan, 0.5, 0.5],
        "tokens": [3, np.nan, 3],
        "energy_weight": [1, np.nan, np.nan],
        "energy_output": [np.nan] * 3,
        "val_loss": [1.5, np.nan, np.nan],
        "other": [np.nan] * 3,
    }.items():
        assert columns[name].dtype == np.float64
        np.testing.assert_array_equal(columns[name], expected)
    assert open_run(tmp_path / "run").columns("body")["step"].tolist() == [10]


# Kills and resuming ----------------------------------------------------------------------------------------------


def test_a_log_that_is_cut_anywhere_loses_at_most_the_last_line(tmp_path):
    path = tmp_path / "run"
    write(path, range(3))
    whole = (path / "readings.jsonl").read_bytes()
    for length in range(len(whole) + 1):
        (path / "readings.jsonl").write_bytes(whole[:length])
        lines = whole[:length].count(b"\n")
        assert steps_of(path) in (list(range(lines)), list(range(lines + 1)))
        if whole[:length].endswith(b"}"):
            assert steps_of(path) == list(range(lines + 1))


@pytest.mark.parametrize("lost", [1, 20, 120])
def test_resuming_ends_a_torn_line_and_nothing_is_truncated(tmp_path, lost):
    path = tmp_path / "run"
    write(path, range(5))
    torn = (path / "readings.jsonl").read_bytes()[:-lost]
    (path / "readings.jsonl").write_bytes(torn)
    kept = steps_of(path)
    write(path, range(4, 8), resume_at=4, lar=0.25)
    assert (path / "readings.jsonl").read_bytes().startswith(torn)
    assert steps_of(path) == list(range(8))
    assert [each.lar for each in open_run(path).readings] == [0.5] * 4 + [0.25] * 4
    assert kept in ([0, 1, 2, 3], [0, 1, 2, 3, 4])


def test_a_resume_that_was_killed_before_its_event(tmp_path):
    path = tmp_path / "run"
    write(path, range(3))
    with (path / "readings.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "la')
    RunWriter(path, {}, resume=True).close()  # nothing read after it was opened
    assert steps_of(path) == [0, 1, 2]
    write(path, range(3, 5), resume_at=3)
    assert steps_of(path) == [0, 1, 2, 3, 4]


def test_resuming_again_and_again(tmp_path):
    path = tmp_path / "run"
    write(path, range(6), lar=0.1)
    write(path, range(3, 9), resume_at=3, lar=0.2)
    write(path, range(7, 8), resume_at=7, lar=0.3)
    write(path, range(1, 4), resume_at=1, lar=0.4)
    assert [(each.step, each.lar) for each in open_run(path).readings] == [(0, 0.1), (1, 0.4), (2, 0.4), (3, 0.4)]
    assert (path / "readings.jsonl").read_text().count("\n") == 16


@pytest.mark.parametrize("cut", [5, 40, -1])
def test_a_torn_event_hides_no_other(tmp_path, cut):
    path = tmp_path / "run"
    write(path, range(3))
    write(path, range(2, 4), resume_at=2, lar=0.25)
    events = path / "events.jsonl"
    lines = events.read_bytes().splitlines(keepends=True)
    torn = lines[-1][:cut]
    events.write_bytes(b"".join(lines[:-1]) + torn)
    (path / "readings.jsonl").write_bytes(
        b"".join((path / "readings.jsonl").read_bytes().splitlines(keepends=True)[:3])
    )
    write(path, range(2, 5), resume_at=2, lar=0.75)
    assert events.read_bytes().startswith(b"".join(lines[:-1]) + torn)
    assert [each.lar for each in open_run(path).readings] == [0.5, 0.5, 0.75, 0.75, 0.75]
    assert [event["event"] for event in open_run(path).events][-1] == "resume"
    writer = RunWriter(path, {}, resume=True)
    writer.event("close")
    writer.close()
    assert open_run(path).events[-1]["event"] == "close"


TRAINING = '''
import json, os, random, select, signal, sys
import torch
from logalign import watch

torch.set_num_threads(1)

def train(folder, report):
    """Train for ever; say on a pipe which step is done; keep a checkpoint every seven steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = watch(model, every=1, run=folder, resume=True)
    saved = folder + ".checkpoint"
    step = 0
    if os.path.exists(saved):
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        monitor.load_state_dict(state["monitor"])
        step = state["step"]
    else:
        monitor.load_state_dict({"version": 2, "step": 0, "tokens_seen": "{}"})
    while True:
        loss = model(torch.randn(16, 4)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step(loss=loss)
        os.write(report, b"%d\\n" % step)
        step += 1
        if step % 7 == 0:
            torch.save({"model": model.state_dict(), "monitor": monitor.state_dict(), "step": step}, saved + ".new")
            os.replace(saved + ".new", saved)

chance = random.Random(0)
for kill in range(int(sys.argv[2])):
    folder = f"{sys.argv[1]}/run-{kill % 4}"
    log = folder + "/readings.jsonl"
    before = open(log, "rb").read() if os.path.exists(log) else b""
    read, report = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        try:
            train(folder, report)
        finally:
            os._exit(1)
    os.close(report)
    enough, said = chance.randrange(1, 60), b""
    while said.count(b"\\n") < enough and (part := os.read(read, 4096)):
        said += part
    for _ in range(chance.randrange(200_000)):  # a moment within a step
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while part := os.read(read, 4096):
        said += part
    os.close(read)
    steps = [int(each) for each in said.split(b"\\n")[:-1]]
    unchanged = open(log, "rb").read().startswith(before)
    print(json.dumps({"folder": folder, "done": steps, "unchanged": unchanged}), flush=True)
    sys.stdin.readline()
'''


def test_training_killed_at_twenty_random_moments(tmp_path):
    kills = 20
    nursery = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path), str(kills)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    resumed = 0
    with nursery:
        for _ in range(kills):
            said = json.loads(nursery.stdout.readline())
            run = open_run(said["folder"])
            steps = [each.step for each in run.readings]
            assert steps == list(range(len(steps)))
            done = said["done"]
            assert done == list(range(done[0], done[-1] + 1))
            assert steps[-1] in (done[-1], done[-1] + 1)
            assert said["unchanged"]
            assert all(each.loss is not None and each.lar is not None for each in run.readings)
            for line in (run.path / "readings.jsonl").read_bytes().splitlines()[:-1]:
                json.loads(line, parse_constant=pytest.fail)
            resumed += sum(event["event"] == "resume" for event in run.events) > 1
            nursery.stdin.write("\n")
            nursery.stdin.flush()
    assert nursery.returncode == 0
    assert resumed > 10


# What cannot be written ------------------------------------------------------------------------------------------


def test_a_run_that_is_there(tmp_path):
    path = tmp_path / "run"
    write(path, range(2))
    with pytest.raises(RunError) as caught:
        RunWriter(path, {})
    assert str(caught.value) == (
        f"{path}: expected a new or empty folder, found a run (run.json, readings.jsonl, events.jsonl); "
        "name another folder, or continue that run with resume=True"
    )
    (path / "run.json").unlink()
    with pytest.raises(RunError, match=r"expected run\.json to resume from, found only readings\.jsonl, events\.jsonl"):
        RunWriter(path, {}, resume=True)
    assert (path / "readings.jsonl").read_text().count("\n") == 2


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/logalign-run")):
        with pytest.raises(RunError, match="expected a folder that can be written, found: "):
            RunWriter(path, {})
    assert (tmp_path / "file").read_text() == "kept"
    read_only = tmp_path / "read-only"
    read_only.mkdir()
    read_only.chmod(0o500)
    if not os.access(read_only, os.W_OK):  # root may write anywhere
        with pytest.raises(RunError, match="expected a folder that can be written, found: "):
            RunWriter(read_only / "run", {})


@pytest.mark.parametrize("settings", [{"lr": float("nan")}, {"model": object()}, {("a", "b"): 1}, {"lrs": {1, 2}}])
def test_settings_that_json_cannot_hold(tmp_path, settings):
    with pytest.raises(RunError, match="expected settings that strict JSON can hold, found: "):
        RunWriter(tmp_path / "run", {"settings": settings})
    write(tmp_path / "run", range(2))  # the folder is free to be used
    assert steps_of(tmp_path / "run") == [0, 1]


# What cannot be read ---------------------------------------------------------------------------------------------


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "run"
    write(path, range(5))
    lines = (path / "readings.jsonl").read_text().splitlines(keepends=True)
    for damage, text in (
        ("{}\n", "line 3: expected a field 'step', found nothing"),
        ('{"step": 2}\n', "line 3: expected a field 'lar', found step"),
        ('{"step": 2, "lar": "high"}\n', "line 3: lar: expected a number or null, found 'high'"),
    ):
        (path / "readings.jsonl").write_text("".join([*lines[:2], damage, *lines[3:]]))
        assert refusal(path) == f"{path / 'readings.jsonl'}, {text}"
    for damage in ('{"step": 2, "la\n', "[1, 2]\n", "\n", "\x00\x00\n"):
        (path / "readings.jsonl").write_text("".join([*lines[:2], damage, *lines[3:]]))
        assert refusal(path).startswith(f"{path / 'readings.jsonl'}, line 3: expected a JSON object, found damage (")
        assert refusal(path).endswith("; repair or remove that line")


def test_damage_after_a_resume_is_named_by_its_line(tmp_path):
    path = tmp_path / "run"
    write(path, range(3))
    write(path, range(3, 6), resume_at=3)
    lines = (path / "readings.jsonl").read_bytes().splitlines(keepends=True)
    lines[4] = b"x" * (len(lines[4]) - 1) + b"\n"
    (path / "readings.jsonl").write_bytes(b"".join(lines))
    assert f"{path / 'readings.jsonl'}, line 5: expected a JSON object" in refusal(path)


def test_damaged_events_are_named(tmp_path):
    path = tmp_path / "run"
    write(path, range(3))
    good = (path / "events.jsonl").read_text()
    (path / "events.jsonl").write_text("damage\n" + good)
    assert f"{path / 'events.jsonl'}, line 1: expected a JSON object, found damage" in refusal(path)
    for event in ('{"event": "resume"}', '{"event": "resume", "step": 2, "readings_offset": "far"}'):
        (path / "events.jsonl").write_text(good + event + "\n" + good)
        assert f"{path / 'events.jsonl'}: expected" in refusal(path)


def test_run_json_that_is_missing_damaged_or_newer(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    assert refusal(path) == (
        f"{path}: expected a run folder, found no run.json in it, nor a log of TensorBoard, W&B, MLflow or "
        "Transformers' Trainer"
    )
    for content, text in (
        ('{"schema', f"{path / 'run.json'}: expected a JSON object, found damage: "),
        ("[]", f"{path / 'run.json'}: expected an object with a whole number schema_version, found None"),
        ('{"schema_version": "1"}', "expected an object with a whole number schema_version, found '1'"),
        ('{"schema_version": 2}', "expected schema version 1 or earlier, found 2; upgrade logalign"),
    ):
        (path / "run.json").write_text(content)
        assert text in refusal(path)
    with pytest.raises(RunError, match="upgrade logalign"):
        RunWriter(path, {}, resume=True)
    (path / "run.json").write_bytes(b"\xff\xfe\x00")
    assert "expected a JSON object, found damage" in refusal(path)


def test_a_damaged_run_is_not_resumed(tmp_path):
    path = tmp_path / "run"
    write(path, range(3))
    damaged = "damage\n" + (path / "readings.jsonl").read_text()
    (path / "readings.jsonl").write_text(damaged)
    with pytest.raises(RunError, match=r"readings\.jsonl, line 1: expected a JSON object"):
        RunWriter(path, {}, resume=True)
    assert (path / "readings.jsonl").read_text() == damaged


def test_nothing_there(tmp_path):
    path = tmp_path / "nothing"
    assert refusal(path) == f"{path}: expected a run folder, a JSONL or a CSV file, found nothing there"


# Logs of other programs ------------------------------------------------------------------------------------------


def test_a_jsonl_file_of_another_program():
    run = open_run(DATA / "lm_fresh.jsonl")
    assert (run.meta, run.events) == ({}, [])
    first = run.readings[0]
    assert (first.step, first.lar, first.n, first.m, first.site) == (0, 0.4998771, 128, 2048, "unembedding")
    assert first.extra == {"val_loss": 7.6465203}
    lines = (DATA / "lm_fresh.jsonl").read_text().splitlines()
    assert len(run.readings) == len(lines)
    assert run.columns()["loss"].tolist() == [json.loads(line)["loss"] for line in lines]


def test_drift_reads_back_from_a_csv_file_of_another_program(tmp_path):
    readings = drifting([reading(step) for step in range(20)])
    path = tmp_path / "log.csv"
    names = ("step", "lar", *REVISIT_FIELDS)
    pandas.DataFrame([{name: getattr(each, name) for name in names} for each in readings]).to_csv(path, index=False)
    assert open_run(path).readings == readings
    assert isinstance(open_run(path).readings[-1].revisited, int)


def test_a_csv_file_of_another_program(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(
        "step,lar,val_loss,note,site\r\n0,0.5,2.5,first,\r\n10,,,second,body\r\n20,nan,1.5,,\r\n", encoding="utf-8-sig"
    )
    readings = open_run(path).readings
    assert [(each.step, each.lar, each.site) for each in readings] == [
        (0, 0.5, "unembedding"),
        (10, None, "body"),
        (20, None, "unembedding"),
    ]
    assert readings[0].extra == {"val_loss": 2.5}
    (tmp_path / "log.tsv").write_text("step\tlar\n0\t0.5\n")
    assert steps_of(tmp_path / "log.tsv") == [0]
    frame = pandas.DataFrame({"step": range(20), "lar": random.Random(0).choices([0.5, None], k=20)})
    frame.to_csv(path, index=False)
    assert steps_of(path) == list(range(20))
    frame.to_json(tmp_path / "log.jsonl", orient="records", lines=True)
    assert steps_of(tmp_path / "log.jsonl") == list(range(20))


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.csv", b"step,accuracy\n0,1.5\n", "expected 'logalign/lar', 'lar' or a loss such as"),
        ("a.csv", b"step,lar\nzero,1.5\n", "line 2: step: expected a number or null, found 'zero'"),
        ("a.csv", b"", "expected readings with columns 'step' and 'lar', found none"),
        ("a.csv", b"step,lar\n", "expected readings with columns 'step' and 'lar', found none"),
        ("a.csv", b"\xff\xfes\x00t\x00", "expected text in JSONL or CSV form, found: "),
        ("a.jsonl", b"", "expected readings with columns 'step' and 'lar', found none"),
        ("a.jsonl", b"\x80\x00\x01" * 10, "expected readings with columns 'step' and 'lar', found none"),
        ("a.jsonl", b"not\nat\nall\n", "line 1: expected a JSON object, found damage"),
        ("a.jsonl", b'{"loss": 1}\n{"loss": 2}\n', "expected a step or an epoch beside the losses, found only loss"),
    ],
)
def test_files_that_are_no_logs(tmp_path, name, content, text):
    path = tmp_path / name
    path.write_bytes(content)
    assert str(path) in refusal(path)
    assert text in refusal(path)


def test_the_main_layer(write_run):
    assert write_run("one", sites=("body",)).main == "body"
    both = ("unembedding", "body")
    assert write_run("both", sites=both).main == "unembedding"
    assert write_run("named", sites=both, meta={"main": "body"}).main == "body"
    two = write_run("two", sites=("a", "b"))
    with pytest.raises(InputError, match="expected readings of one layer or of 'unembedding', found a, b"):
        _ = two.main
