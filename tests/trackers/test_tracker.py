"""Trackers beside a real training: several at once, failures, weights, resumes; and what the real Trainer logs."""

import warnings

import mlflow
import pytest
import torch
import wandb
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

import logalign
from logalign import diagnose, open_run
from logalign.errors import InputError, LogAlignWarning
from logalign.trackers.tracker import open_trackers

STEPS = 41


def train(monitored, **watching):
    """Train on digits; the weights at the end, and the monitor."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images[:256] / 16, dtype=torch.float32), torch.tensor(labels[:256])
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = logalign.watch(model, layers=["unembedding", "0"], every=2, **watching) if monitored else None
    for step in range(STEPS):
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if wandb.run is not None:
            wandb.log({"mine": step})
        if monitor is not None:
            monitor.step(loss=loss, epoch=step + 1, lr=1e-2, accuracy=0.5)
    if monitor is not None:
        monitor.close()
    return [each.detach().clone() for each in model.parameters()], monitor


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
def test_all_trackers_at_once_show_one_training_and_change_nothing(tools, tmp_path):
    _, check_same = tools
    bare, _ = train(False)
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with (
        SummaryWriter(str(tmp_path / "mine")) as writer,
        wandb.init(project="test", dir=tmp_path),
        mlflow.start_run(),
    ):
        watched, monitor = train(True, run=tmp_path / "run", trackers=["tensorboard", writer, "wandb", "mlflow", "csv"])
    wandb.teardown()
    assert all(torch.equal(one, other) for one, other in zip(bare, watched, strict=True))
    native = open_run(tmp_path / "run")
    assert [each.step for each in native.readings if each.site == "unembedding"] == list(range(0, STEPS, 2))
    for path, rel in {
        tmp_path / "run" / "tensorboard": 1e-6,
        tmp_path / "mine": 1e-6,
        tmp_path / "wandb": 0.0,
        tmp_path / "mlruns": 0.0,
        tmp_path / "run" / "metrics.csv": 0.0,
    }.items():
        found = open_run(path).readings
        for site in ("unembedding", "0"):
            own = [each for each in native.readings if each.site == site]
            shown = [each for each in found if each.site == site]
            assert len(shown) == len(own) == 21
            assert [each.lar for each in shown] == pytest.approx([each.lar for each in own], rel=rel or 1e-15)
            assert [each.energies["weight"] for each in shown] == pytest.approx(
                [each.energies["weight"] for each in own], rel=rel or 1e-12
            )
        main = [[each for each in readings if each.site == "unembedding"] for readings in (found, native.readings)]
        check_same(*main, rel=rel)
        assert diagnose(path).outcome == monitor.verdict.outcome


def test_a_tracker_that_fails_is_one_warning_and_the_training_is_the_same(tmp_path):
    class Broken:
        def log(self, values, *, step):
            raise ValueError("no")

        tell = close = log

    bare, _ = train(False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        watched, _ = train(True, run=tmp_path / "run", trackers=[Broken(), "csv"])
    (warning,) = [each for each in told if issubclass(each.category, LogAlignWarning)]
    assert str(warning.message) == (
        "logalign: Broken failed and gets no more readings (ValueError: no); training goes on"
    )
    assert all(torch.equal(one, other) for one, other in zip(bare, watched, strict=True))
    assert len(open_run(tmp_path / "run" / "metrics.csv").readings) == 21 * 2
    (event,) = [each for each in open_run(tmp_path / "run").events if each["event"] == "warning"]
    assert event["message"].startswith("Broken failed")


def test_a_resumed_training_goes_on_in_its_trackers(tmp_path):
    for resume in (False, True):
        train(True, run=tmp_path / "run", resume=resume, trackers=["csv", "tensorboard"])
    steps = sorted({each.step for each in open_run(tmp_path / "run").readings})
    assert steps[-1] > 2 * STEPS - 4
    for path in ("metrics.csv", "tensorboard"):
        assert sorted({each.step for each in open_run(tmp_path / "run" / path).readings}) == steps


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tensorbord", "trackers: expected one of tensorboard, wandb, mlflow, csv or an object, found 'tensorbord'"),
        (7, "trackers: expected a name (tensorboard, wandb, mlflow, csv), a SummaryWriter, "),
        (["csv", None], "trackers: expected a name (tensorboard, wandb, mlflow, csv), a SummaryWriter, "),
    ],
)
def test_what_is_no_tracker(given, message, tmp_path):
    with pytest.raises(InputError) as caught:
        open_trackers(given, folder=tmp_path)
    assert str(caught.value).startswith(message)
