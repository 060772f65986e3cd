"""A demo's training: stopped anywhere, it ends with the same numbers; a damaged checkpoint is one clear error."""

from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from logalign import open_run
from logalign.demos.training import (
    CHECKPOINT,
    Training,
    check_device,
    check_steps,
    epoch_order,
    is_finished,
    threads,
)
from logalign.errors import InputError, RunError

STEPS = 23


class Stopped(Exception):
    """Stands for Ctrl-C at a step of our choice."""


def train(folder, *, stop_before=None, console=None):
    """A regression with dropout, so that the generator's state matters too."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    with Training(
        folder,
        model=model,
        optimizer=optimizer,
        steps=STEPS,
        title="tiny",
        settings={"seed": 3},
        every=2,
        checkpoint_every=5,
        console=console or Console(file=StringIO()),
    ) as training:
        for step in training.remaining():
            if step == stop_before:
                raise Stopped
            loss = model(data[epoch_order(3, step, 40)[:16]]).square().mean()
            extra = {"double": 2.0 * loss.item()} if training.is_monitored else {}
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            training.record(loss=loss, epoch=step * 16 / 40, **extra)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def numbers(folder):
    columns = open_run(folder).columns()
    return {name: values for name, values in columns.items() if name not in ("time", "site", "reason")}


@pytest.mark.parametrize("stop_before", [0, 3, 5, 6, 14, 22])
def test_a_stopped_training_ends_with_the_same_numbers(tmp_path, stop_before):
    whole = train(tmp_path / "whole")
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", stop_before=stop_before)
    resumed = train(tmp_path / "stopped")
    assert torch.equal(whole, resumed)
    expected, found = numbers(tmp_path / "whole"), numbers(tmp_path / "stopped")
    assert list(expected["step"]) == list(range(0, STEPS, 2))
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_a_finished_training_is_not_repeated(tmp_path):
    first = train(tmp_path / "run")
    log = (tmp_path / "run" / "readings.jsonl").read_bytes()
    screen = StringIO()
    assert torch.equal(train(tmp_path / "run", console=Console(file=screen)), first)
    assert (tmp_path / "run" / "readings.jsonl").read_bytes() == log
    assert "23 steps are done already" in screen.getvalue()
    assert is_finished(tmp_path / "run", STEPS)
    assert not is_finished(tmp_path / "run", STEPS + 1)
    assert not is_finished(tmp_path / "nothing", STEPS)


def test_train_loss_is_the_mean_since_the_last_reading(tmp_path):
    train(tmp_path / "run")
    columns = numbers(tmp_path / "run")
    assert columns["train_loss"][0] == columns["loss"][0]
    assert not np.allclose(columns["train_loss"][1:], columns["loss"][1:])
    np.testing.assert_allclose(columns["double"], 2 * columns["loss"], rtol=1e-12)


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    train(tmp_path / "run")
    path = tmp_path / "run" / CHECKPOINT
    path.write_bytes(path.read_bytes()[:300] if damage is None else damage)
    with pytest.raises(RunError, match=r"checkpoint\.pt: expected a checkpoint of this demo, found damage .*--fresh"):
        train(tmp_path / "run")
    assert not is_finished(tmp_path / "run", STEPS)


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    train(tmp_path / "run")
    state = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    state["model"] = nn.Linear(2, 2).state_dict()
    torch.save(state, tmp_path / "run" / CHECKPOINT)
    with pytest.raises(RunError, match="found damage"):
        train(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toaster", "expected a device of PyTorch such as cpu"),
        ("cuda:99", "expected a device that PyTorch can use here, found: "),
        ("meta", "expected a device that PyTorch can use here, found: "),
    ],
)
def test_refuses_a_device_that_cannot_compute(name, message):
    with pytest.raises(InputError, match=f"--device {name}: {message}"):
        check_device(name)
    assert check_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("steps", [0, -5])
def test_refuses_no_steps(steps):
    with pytest.raises(InputError, match=f"--steps: expected at least 1, found {steps}"):
        check_steps(steps)


def test_an_order_depends_on_seed_and_epoch_alone():
    assert torch.equal(epoch_order(0, 1, 50), epoch_order(0, 1, 50))
    assert sorted(epoch_order(0, 1, 50).tolist()) == list(range(50))
    assert not torch.equal(epoch_order(0, 1, 50), epoch_order(0, 2, 50))
    assert not torch.equal(epoch_order(0, 1, 50), epoch_order(1, 1, 50))


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
