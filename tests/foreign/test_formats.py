"""What W&B exports, what MLflow and the Trainer leave, and what is wrong with files: each one clear error."""

import csv
import json
import sqlite3
import struct
import zlib

import pytest
from typer.testing import CliRunner

from logalign import diagnose, open_run
from logalign.cli import app
from logalign.errors import RunError
from logalign.runs.foreign.wandb import MAGIC
from logalign.runs.reading import REVISIT_FIELDS
from tests.drifts import drifting


@pytest.fixture(scope="session")
def recorded(data):
    return drifting(open_run(data / "lm_repeat200k.jsonl").readings)


def columns(readings):
    names = ("step", "lar", "lar_centered", "lar_vocab_centered", "lar_token_centered", "loss", "epoch", "n", "m")
    names += REVISIT_FIELDS[:-1]  # no tool is given the reason why there is no drift
    return [tuple(getattr(each, name) for name in names) for each in readings]


def lines(readings, prefix="logalign/"):
    for reading in readings:
        fields = {name: value for name, value in reading.record().items() if value is not None and name != "site"}
        yield {prefix + name: value for name, value in fields.items()}


def table(path, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


NEITHER = (
    "{path}: expected 'logalign/lar', 'lar' or a loss such as 'loss', 'train/loss' or 'val_loss' in the {kind}, found "
    "{found}; record LAR with logalign.watch(trackers=...)"
)


def refusal(path):
    with pytest.raises(RunError) as caught:
        open_run(path)
    told = CliRunner().invoke(app, ["diagnose", str(path)])
    assert told.exit_code == 1
    return str(caught.value)


def test_an_export_of_a_wandb_history(recorded, tmp_path):
    rows = []
    for i, line in enumerate(lines(recorded)):
        rows += [{"_step": 2 * i, "_timestamp": 1.7e9 + i, "_runtime": i, **line}, {"_step": 2 * i + 1, "mine": 1.0}]
    path = table(tmp_path / "history.csv", rows)
    readings = open_run(path).readings
    assert columns(readings) == columns(recorded)
    assert readings[1].time == 1.7e9 + 1
    assert diagnose(path).record() == diagnose(recorded).record()


@pytest.mark.parametrize("x", ["Step", "logalign/step"])
def test_an_export_of_the_page_of_wandb(x, recorded, tmp_path):
    run = "warm-sun - 3"
    rows = [
        {x: each.step, f"{run} - logalign/lar": each.lar}
        | {f"{run} - logalign/lar__MIN": 0, f"{run} - logalign/lar__MAX": 1, f"{run} - _step": 7}
        for each in recorded
    ]
    readings = open_run(table(tmp_path / "export.csv", rows)).readings
    assert [(each.step, each.lar) for each in readings] == [(each.step, each.lar) for each in recorded]


def test_an_export_of_several_runs_names_them(tmp_path):
    path = table(tmp_path / "export.csv", [{"Step": 0, "a - logalign/lar": 0.5, "b - logalign/lar": 0.5}])
    assert refusal(path) == f"{path}: expected the columns of one run, found a, b; export one of them"


def test_an_export_without_a_step_or_without_lar_and_loss(tmp_path):
    path = table(tmp_path / "a.csv", [{"logalign/lar": 0.5, "x": 1}])
    assert refusal(path) == (
        f"{path}: expected a column 'logalign/step', 'step', '_step', 'Step' or 'epoch', found logalign/lar, x"
    )
    path = table(tmp_path / "b.csv", [{"_step": 0, "accuracy": 1.0}])
    assert refusal(path) == NEITHER.format(path=path, kind="table", found="accuracy")


def test_a_cell_that_is_code_is_text(tmp_path):
    path = table(tmp_path / "a.csv", [{"_step": 0, "logalign/lar": "__import__('os').getcwd()"}])
    assert "lar: expected a number or null, found \"__import__('os').getcwd()\"" in refusal(path)


def state(path, history):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"global_step": 1, "log_history": history}))
    return path


def test_the_log_history_of_a_trainer(recorded, tmp_path):
    history = []
    for reading, line in zip(recorded, lines(recorded), strict=True):
        own = {name: value for name, value in line.items() if name.split("/")[1] not in ("loss", "epoch", "val_loss")}
        history.append({"loss": reading.loss, "epoch": reading.epoch, "step": reading.step + 1, **own})
        if "val_loss" in reading.extra:
            history.append({"eval_loss": reading.extra["val_loss"], "epoch": reading.epoch, "step": reading.step + 1})
    history.append({"train_runtime": 3.0, "train_loss": 2.0, "epoch": 9.0, "step": 1500})
    out = tmp_path / "out"
    file = state(out / "checkpoint-1000" / "trainer_state.json", history)
    state(out / "checkpoint-90" / "trainer_state.json", history[:9])
    for path in (file, file.parent, out):
        readings = open_run(path).readings
        assert columns(readings) == columns(recorded)
        assert [dict(each.extra) for each in readings] == [dict(each.extra) for each in recorded]
    assert diagnose(out).record() == diagnose(recorded).record()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a JSON object, found damage: "),
        ("[" * 100_000, "expected a JSON object, found damage: "),
        ("[]", "expected a Trainer's state with a list 'log_history' of objects, found none"),
        ('{"log_history": [1]}', "expected a Trainer's state with a list 'log_history' of objects, found none"),
        (
            '{"log_history": [{"grad_norm": 1.0, "step": 3}]}',
            "in the Trainer's log history, found grad_norm; record LAR with",
        ),
        ('{"log_history": [{"lar": 0.5, "step": "x"}]}', "log_history entry 0: expected a whole number for the step"),
    ],
)
def test_a_state_that_is_none(text, message, tmp_path):
    path = tmp_path / "trainer_state.json"
    path.write_text(text)
    assert message in refusal(path)


def mlflow_run(folder, curves):
    folder.mkdir(parents=True)
    (folder / "meta.yaml").write_text("run_id: x\n")
    for name, points in curves.items():
        file = folder / "metrics" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{1000 * i} {value} {step}\n" for i, (step, value) in enumerate(points)))
    return folder


def test_an_mlflow_folder_without_mlflow(tmp_path):
    folder = mlflow_run(tmp_path / "mlruns" / "0" / "a", {"logalign/lar": [(0, 0.5), (10, 0.25)], "loss": [(5, 2.0)]})
    mlflow_run(tmp_path / "mlruns" / "0" / "b", {"accuracy": [(0, 0.5)]})
    for path in (folder, folder.parent, tmp_path / "mlruns"):
        assert [(each.step, each.lar, each.loss) for each in open_run(path).readings] == [
            (0, 0.5, None),
            (10, 0.25, 2.0),
        ]


def test_several_mlflow_runs_are_named_and_one_without_lar_says_what_it_has(tmp_path):
    for name in "ab":
        folder = mlflow_run(tmp_path / "0" / name, {"logalign/lar": [(0, 0.5)]})
    assert refusal(tmp_path) == (
        f"{tmp_path}: expected one MLflow run with 'logalign/lar', found 0/a, 0/b; give one of them"
    )
    folder = mlflow_run(tmp_path / "1" / "c", {"accuracy": [(0, 0.5)]})
    assert refusal(folder) == NEITHER.format(path=folder, kind="MLflow run", found="accuracy")


def test_damaged_mlflow_files(tmp_path):
    folder = mlflow_run(tmp_path / "a", {"lar": [(0, 0.5), (10, 0.5)]})
    file = folder / "metrics" / "lar"
    file.write_text("1000 0.5 0\n2000 0.")
    assert len(open_run(folder).readings) == 1
    file.write_bytes(b"1000 0.5 0\n\xff\x00\n2000 0.5 10\n")
    assert f"{file}, line 2: expected 'milliseconds value step', found " in refusal(folder)


def test_databases_that_are_not_of_mlflow_or_have_no_such_run(tmp_path):
    path = tmp_path / "a.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE other (a)")
    assert f"{path}: expected a database of MLflow with a table of metrics, found: " in refusal(path)
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE metrics (key, value, timestamp, run_uuid, step, is_nan)")
    assert f"{path}: expected one MLflow run with 'logalign/lar', found nothing; " in refusal(path)
    assert (
        refusal(f"{path}#x' OR '1'='1")
        == f"{path}#x' OR '1'='1: expected a run with metrics, found none of the id \"x' OR '1'='1\""
    )
    with sqlite3.connect(path) as database:
        for run in "ab":
            database.execute("INSERT INTO metrics VALUES ('logalign/lar', 0.5, 1000, ?, 0, 0)", run)
    assert (
        refusal(path)
        == f"{path}: expected one MLflow run with 'logalign/lar', found a, b; give one of them as a.db#RUN_ID"
    )
    assert len(open_run(f"{path}#b").readings) == 1
    database.close()
    path.write_bytes(path.read_bytes()[:2000])
    assert f"{path}: expected a database of MLflow" in refusal(path)


def framed(data, kind=1):
    return struct.pack("<IHB", zlib.crc32(bytes([kind]) + data), len(data), kind) + data


def wandb_record(**values):
    from wandb.proto import wandb_internal_pb2 as records

    record = records.Record()
    for name, value in values.items():
        record.history.item.add(nested_key=[name.replace("__", "/")], value_json=json.dumps(value))
    return record.SerializeToString()


def test_wandb_files_that_are_damaged_cut_off_or_of_another_version(tmp_path):
    path = tmp_path / "run-x.wandb"
    first, second = (framed(wandb_record(_step=step, logalign__lar=0.5)) for step in (0, 1))
    path.write_bytes(MAGIC + first + second[:-3])
    assert [each.step for each in open_run(path).readings] == [0]
    path.write_bytes(MAGIC + first + second + bytes(500))
    assert [each.step for each in open_run(path).readings] == [0, 1]
    path.write_bytes(MAGIC + first[:-2] + b"xx" + second)
    assert refusal(path).startswith(f"{path}, byte 7: expected a record of a W&B run, found damage")
    path.write_bytes(MAGIC + framed(b"\xff\xff\xff"))
    assert refusal(path).startswith(f"{path}, byte 7: expected a record of a W&B run, found damage")
    path.write_bytes(MAGIC[:-1] + b"\x01" + first)
    assert refusal(path).startswith(f"{path}: expected a W&B run of version 0 (it begins with b':W&B")
    path.write_bytes(b"")
    assert refusal(path).endswith("found nothing")
    path.write_bytes(MAGIC + framed(wandb_record(_step=0, accuracy=1.0)))
    assert refusal(path) == NEITHER.format(path=path, kind="W&B run", found="accuracy")


def test_a_wandb_row_with_an_undefined_number(tmp_path):
    path = tmp_path / "run-x.wandb"
    path.write_bytes(MAGIC + framed(wandb_record(_step=3, logalign__lar="NaN", note="__import__('os')")))
    assert [(each.step, each.lar) for each in open_run(path).readings] == [(3, None)]


def test_several_wandb_runs_are_named(tmp_path):
    for name in "ab":
        folder = tmp_path / "wandb" / f"offline-run-{name}"
        folder.mkdir(parents=True)
        (folder / f"run-{name}.wandb").write_bytes(MAGIC)
    (tmp_path / "wandb" / "latest-run").symlink_to(folder)
    assert refusal(tmp_path / "wandb") == (
        f"{tmp_path / 'wandb'}: expected one W&B run, found offline-run-a, offline-run-b; give one of them"
    )


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    assert refusal(tmp_path) == (
        f"{tmp_path}: expected a run folder, found no run.json in it, nor a log of TensorBoard, W&B, MLflow or "
        "Transformers' Trainer"
    )
