"""Logs without LAR: what the real packages write, the forms of those that are not installed here, and what is wrong."""

import csv
import json

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.tensorboard import SummaryWriter

from logalign import diagnose, open_run
from logalign.errors import RunError
from logalign.runs.foreign.names import meaning_of
from logalign.runs.reading import EPOCHS_AS_STEPS, NO_LAR, ROWS_AS_STEPS

# What MLflow does with SQLAlchemy is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")


def refusal(path):
    with pytest.raises(RunError) as caught:
        open_run(path)
    return str(caught.value)


def table(path, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


def losses(path):
    return [(each.step, each.epoch, each.loss, each.extra.get("val_loss")) for each in open_run(path).readings]


def reasons(path):
    return {(each.lar, each.reason) for each in open_run(path).readings}


@pytest.mark.parametrize(
    ("meaning", "names"),
    [
        (
            "loss",
            "loss train_loss train/loss Loss/train training_loss trainLoss train_loss_step train_loss_epoch epoch_loss "
            "Train/Loss logalign/loss lm_loss train/CrossEntropyLoss running_loss batch_loss nll_loss",
        ),
        (
            "val_loss",
            "val_loss eval_loss eval/loss validation_loss Loss/val valid_loss val/loss test_loss Loss/test "
            "val_loss_epoch validation/epoch_loss dev_loss",
        ),
        ("epoch", "epoch Epoch train/epoch trainer/epoch"),
        ("step", "step _step Step global_step train/global_step trainer/global_step iter iteration num_updates_step"),
        ("lr", "lr learning_rate train/learning_rate lr-AdamW lr-AdamW/pg1 train/lr"),
        ("tokens_seen", "tokens_seen num_input_tokens_seen train/num_input_tokens_seen"),
        (
            None,
            "accuracy train/box_loss best_val_loss val_loss_step grad_norm val_accuracy train_runtime loss_scale "
            "evaluation_loss_vs_iterations epoch_accuracy total_flos",
        ),
    ],
)
def test_what_a_name_says(meaning, names):
    found = {name: meaning_of(name) for name in names.split() if name != "num_updates_step"}
    assert found == dict.fromkeys(found, meaning)


def test_the_state_of_a_trainer(data, tmp_path):
    path = data / "without_lar" / "trainer_state.json"
    readings = open_run(path).readings
    assert [each.step for each in readings] == list(range(10, 2001, 10))
    assert reasons(path) == {(None, NO_LAR)}
    assert readings[0].lr == 4.980769230769231e-05
    assert [each.step for each in readings if "val_loss" in each.extra] == list(range(200, 2001, 200))
    history = json.loads(path.read_text())["log_history"]
    assert losses(path)[19] == (200, 1.0, 1.1896, 0.808)
    summary = {"epoch": 10.0, "step": 2000, "train_loss": 9.0, "train_runtime": 3.0, "total_flos": 1.0}
    for name, content in (("history.json", history), ("trainer_state.json", {"log_history": [*history, summary]})):
        copy = tmp_path / name
        copy.write_text(json.dumps(content))
        assert open_run(copy).readings == readings


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, index):
        loss = self.layer(batch[0]).square().mean()
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_the_metrics_of_lightning(tmp_path):
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(40, 4)), batch_size=4)
    trainer = Trainer(
        max_epochs=3,
        logger=CSVLogger(str(tmp_path), name="log", version=0),
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    trainer.fit(Line(), data, data)
    path = tmp_path / "log" / "version_0" / "metrics.csv"
    readings = open_run(path).readings
    assert [each.step for each in readings] == list(range(1, 30, 2))
    assert [each.epoch for each in readings] == [0.0] * 5 + [1.0] * 5 + [2.0] * 5
    assert all(each.loss is not None for each in readings)
    assert [each.step for each in readings if "val_loss" in each.extra] == [9, 19, 29]
    assert reasons(path) == {(None, NO_LAR)}


@pytest.mark.parametrize(
    ("train", "val"), [("train/loss", "val/loss"), ("Loss/train", "Loss/val"), ("loss", "eval_loss")]
)
def test_scalars_of_tensorboard(tmp_path, train, val):
    with SummaryWriter(str(tmp_path / "log")) as writer:
        for step in range(0, 100, 10):
            writer.add_scalar(train, 3.0 - step / 100, step)
            writer.add_scalar("epoch", step / 50, step)
            writer.add_scalar("grad_norm", 1.0, step)
        writer.add_scalar(val, 2.5, 90)
    found = losses(tmp_path / "log")
    assert [step for step, *_ in found] == list(range(0, 100, 10))
    assert found[-1] == pytest.approx((90, 1.8, 2.1, 2.5))
    (events,) = (tmp_path / "log").iterdir()
    assert losses(events) == found


def test_folders_of_one_training_in_tensorboard(tmp_path):
    """Keras's callback and `add_scalars` write training and validation into two folders."""
    for folder, tag in (("train", "epoch_loss"), ("validation", "epoch_loss")):
        with SummaryWriter(str(tmp_path / "log" / folder)) as writer:
            for step in range(3):
                writer.add_scalar(tag, 2.0, step)
    assert losses(tmp_path / "log") == [(step, None, 2.0, 2.0) for step in range(3)]
    for run in "ab":
        with SummaryWriter(str(tmp_path / "two" / run)) as writer:
            writer.add_scalar("loss", 2.0, 0)
    assert refusal(tmp_path / "two") == (
        f"{tmp_path / 'two'}: expected one folder with TensorBoard event files, found a, b; give one of them"
    )


def test_the_folder_with_lar_stands(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("logalign/lar", 0.5, 0)
        writer.add_hparams({"lr": 0.1}, {"hparam/loss": 1.0})
    assert [(each.step, each.lar) for each in open_run(tmp_path).readings] == [(0, 0.5)]


def test_a_real_offline_run_of_wandb(monkeypatch, tmp_path):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(mode="offline", dir=str(tmp_path)) as run:
        for step in range(10):
            run.log({"train/loss": 2.0 - step / 10, "epoch": step / 5, "train/global_step": 10 * step})
        run.log({"eval/loss": 2.5, "train/global_step": 90})
    wandb.teardown()
    found = losses(tmp_path / "wandb")
    assert [step for step, *_ in found] == list(range(0, 100, 10))
    assert found[-1] == pytest.approx((90, 1.8, 1.1, 2.5))


def test_a_history_and_a_summary_of_wandb(tmp_path):
    rows = [{"_step": i, "_timestamp": 1.7e9 + i, "train/loss": 2.0, "note": "x"} for i in range(3)]
    expected = [(i, None, 2.0, None) for i in range(3)]
    lines, whole = tmp_path / "history.jsonl", tmp_path / "history.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole.write_text(json.dumps(rows, indent=1))
    for path in (lines, whole, table(tmp_path / "history.csv", rows)):
        assert losses(path) == expected
        assert open_run(path).readings[1].time == 1.7e9 + 1
    summary = tmp_path / "wandb-summary.json"
    summary.write_text(json.dumps({"_step": 9, "_wandb": {"runtime": 3}, "train/loss": 2.0}))
    assert refusal(summary).startswith(f"{summary}: expected the history of a W&B run, found its summary, which holds")


def test_a_real_store_of_mlflow(monkeypatch, tmp_path):
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    with mlflow.start_run():
        for step in range(5):
            mlflow.log_metrics({"train_loss": 2.0, "epoch": step / 2}, step=step)
        mlflow.log_metric("val_loss", 2.5, step=4)
    assert losses(tmp_path / "mlflow.db") == [(step, step / 2, 2.0, 2.5 if step == 4 else None) for step in range(5)]


def test_the_files_of_mlflow(tmp_path):
    for run, metric in (("a", "loss"), ("b", "accuracy")):
        metrics = tmp_path / "1" / run / "metrics"
        metrics.mkdir(parents=True)
        (metrics.parent / "meta.yaml").write_text("run_id: x\n")
        (metrics / metric).write_text("1000 2.0 0\n2000 1.5 10\n")
    assert losses(tmp_path) == losses(tmp_path / "1" / "a") == [(0, None, 2.0, None), (10, None, 1.5, None)]
    (tmp_path / "1" / "b" / "metrics" / "loss").write_text("1000 2.0 0\n")
    assert refusal(tmp_path) == (
        f"{tmp_path}: expected one MLflow run with 'logalign/lar', found 1/a, 1/b, none of which has LAR; "
        "give one of them"
    )


def test_what_keras_writes(tmp_path):
    """`CSVLogger`, and `History.history` by `json.dump`: the index of a value is its epoch."""
    rows = [{"epoch": i, "accuracy": 0.5, "loss": 2.0, "val_accuracy": 0.5, "val_loss": 2.5} for i in range(3)]
    path = table(tmp_path / "training.log.csv", rows)
    assert losses(path) == [(i, float(i), 2.0, 2.5) for i in range(3)]
    assert reasons(path) == {(None, EPOCHS_AS_STEPS)}
    history = tmp_path / "history.json"
    history.write_text(json.dumps({"loss": [2.0, 1.5], "accuracy": [0.5, 0.5], "val_loss": [2.5, 2.25]}))
    assert losses(history) == [(0, None, 2.0, 2.5), (1, None, 1.5, 2.25)]
    history.write_text(json.dumps({"loss": [2.0, 1.5], "val_loss": [2.5]}))
    assert refusal(history) == (
        f"{history}: expected columns of one length, found loss with 2, val_loss with 1; write one object a row instead"
    )


def test_epochs_that_are_fractions_and_stand_alone(tmp_path):
    path = table(tmp_path / "log.csv", [{"Epoch": 0.5 * i, "Training Loss": 2.0} for i in range(4)])
    assert losses(path) == [(i, 0.5 * i, 2.0, None) for i in range(4)]
    assert reasons(path) == {(None, ROWS_AS_STEPS)}


def test_columns_of_pandas(tmp_path):
    path = tmp_path / "frame.json"
    path.write_text(
        json.dumps({"step": {"0": 0, "1": 10}, "loss": {"0": 2.0, "1": None}, "note": {"0": "x", "1": "y"}})
    )
    assert losses(path) == [(0, None, 2.0, None)]


def test_held_out_losses_alone_and_before_the_first_training_loss(tmp_path):
    rows = [
        {"step": 0, "val_loss": 9.0},
        {"step": 10, "loss": 2.0},
        {"step": 20, "val_loss": 3.0},
        {"step": 30, "val_loss": 4.0},
    ]
    assert losses(table(tmp_path / "log.csv", rows)) == [
        (0, None, None, 9.0),
        (10, None, 2.0, 3.0),
        (30, None, None, 4.0),
    ]


def test_a_resumed_log_supersedes(tmp_path):
    rows = [{"step": step, "loss": loss} for step, loss in ((0, 3.0), (10, 2.0), (20, 1.0), (10, 2.5))]
    assert losses(table(tmp_path / "log.csv", rows)) == [(0, None, 3.0, None), (10, None, 2.5, None)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"loss": 1.0, "accuracy": 0.5}],
            "expected a column 'logalign/step', 'step', '_step', 'Step' or 'epoch', found",
        ),
        ([{"step": "x", "loss": 1.0}], "line 2: expected a whole number from 0 on for the step, found 'x'"),
        ([{"step": 0.5, "loss": 1.0}], "line 2: expected a whole number for the step, found 0.5"),
        ([{"step": 0, "loss": "x"}], "line 2: loss: expected a number or null, found 'x'"),
    ],
)
def test_what_is_wrong_is_one_clear_error(tmp_path, rows, message):
    path = table(tmp_path / "log.csv", rows)
    assert refusal(path).startswith(f"{path}")
    assert message in refusal(path)


def test_lists_and_lines_that_are_none(tmp_path):
    path = tmp_path / "log.json"
    path.write_text("[1, 2]")
    assert refusal(path) == f"{path}: expected a list of objects, one for each row, found other things in it"
    path = tmp_path / "log.jsonl"
    path.write_text('{"epoch": 0, "loss": 2.0}\n{"epoch": 1, "lo\n{"epoch": 2, "loss": 1.0}\n')
    assert refusal(path) == f"{path}, line 2: expected a JSON object, found damage; repair or remove that line"
    path.write_text('{"epoch": 0, "loss": 2.0}\n{"epoch": 1, "lo')
    assert losses(path) == [(0, 0.0, 2.0, None)]


def test_a_table_with_padded_cells_and_lar(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("   step,    lar,   loss\n      0,    0.5,      \n     10,   0.25,    2.0\n")
    assert [(each.step, each.lar, each.loss) for each in open_run(path).readings] == [(0, 0.5, None), (10, 0.25, 2.0)]


def test_a_list_and_columns_with_lar(data, tmp_path):
    lines = [json.loads(line) for line in (data / "lm_fresh.jsonl").read_text().splitlines()]
    names = ("step", "lar", "lar_vocab_centered", "loss", "epoch", "n", "m")
    records = [{name: line[name] for name in names if name in line} for line in lines]
    (tmp_path / "list.json").write_text(json.dumps(records))
    (tmp_path / "columns.json").write_text(
        json.dumps({name: [row.get(name) for row in records] for name in records[0]})
    )
    for path in (tmp_path / "list.json", tmp_path / "columns.json"):
        assert [each.lar for each in open_run(path).readings] == [line["lar"] for line in lines]
        assert diagnose(path).regime != "loss"
