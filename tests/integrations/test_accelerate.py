"""A plain loop under Accelerate against the same loop without it, alone and on two processes."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from logalign import open_run, watch
from logalign.errors import InputError, LogAlignWarning
from logalign.trackers.accelerate import wrap
from logalign.trackers.tracker import Tracker, open_trackers
from tests.torch.workers import Workers

STEPS, BATCH, MICRO = 6, 16, 2


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Accelerate keeps its state in classes."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def two() -> Iterator[Workers]:
    workers = Workers(2)
    yield workers
    workers.stop()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS * BATCH, 8, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 5, (STEPS * BATCH,), generator=generator))


def plain_loop():
    """All samples of a step at once, without Accelerate."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, every=2) as monitor:
        for inputs, labels in DataLoader(data(), batch_size=BATCH):
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss, lr=0.1)
    return model, [readings.main for readings in monitor.readings]


def accelerated(accelerator: Accelerator, *, watching=True, micro=MICRO, stop_after=None, folder=None, **options):
    """The same under Accelerate, each step in micro-batches; `folder` holds a checkpoint to go on from."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    per_rank = BATCH // micro // accelerator.num_processes
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data(), batch_size=per_rank))
    monitor = watch(model, every=2, **options) if watching else None
    done = 0
    if monitor is not None:
        accelerator.register_for_checkpointing(monitor)
    if folder is not None and folder.exists():
        accelerator.load_state(folder)
        loader, done = accelerator.skip_first_batches(loader, stop_after * micro), stop_after
    losses = []
    for inputs, labels in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(inputs), labels)
            losses.append(loss.detach())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            if monitor is not None:
                monitor.step(loss=torch.stack(losses).mean(), lr=0.1)
            losses, done = [], done + 1
            if done == stop_after and not folder.exists():
                accelerator.save_state(folder)
                break
    if monitor is not None:
        monitor.close()
    return accelerator.unwrap_model(model), [] if monitor is None else [readings.main for readings in monitor.readings]


def numbers(readings) -> list[dict]:
    return [{name: getattr(each, name) for name in ("step", "lar", "lar_centered", "loss", "lr")} for each in readings]


def assert_same_series(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == {name: pytest.approx(value, rel=1e-5) for name, value in theirs.items()}


def test_readings_are_those_of_the_plain_loop():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    _, found = accelerated(accelerator)
    assert [reading.step for reading in found] == [0, 2, 4]
    assert_same_series(numbers(found), numbers(plain_loop()[1]))


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_weights_are_bit_identical_with_and_without(mixed_precision):
    trained = []
    for watching in (True, False):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO, mixed_precision=mixed_precision)
        trained.append(accelerated(accelerator, watching=watching)[0].state_dict())
        AcceleratorState._reset_state(reset_partial_state=True)
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name])


def test_under_autocast_the_inputs_are_those_of_the_layer():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    _, found = accelerated(accelerator, micro=1)
    for mine, theirs in zip(found, plain_loop()[1], strict=True):
        assert mine.lar == pytest.approx(theirs.lar, abs=2e-3)


def test_a_checkpoint_of_accelerate_goes_on(tmp_path):
    whole = accelerated(Accelerator(cpu=True, gradient_accumulation_steps=MICRO))[1]
    for _ in range(2):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
        accelerated(accelerator, stop_after=3, folder=tmp_path / "state", run=tmp_path / "run", resume=True)
    run = open_run(tmp_path / "run")
    assert numbers(run.readings) == numbers(whole)
    assert [reading.loss_mean for reading in run.readings] == [reading.loss_mean for reading in whole]
    assert [event["step"] for event in run.events if event["event"] == "resume"] == [3]


def test_its_trackers_get_every_reading(tmp_path):
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("digits")
    _, readings = accelerated(accelerator, micro=1, trackers=accelerator)
    accelerator.log({"still": 1.0}, step=9)  # closing the monitor leaves the user's trackers open
    accelerator.end_training()
    log = EventAccumulator(str(tmp_path / "digits")).Reload()
    for name in ("lar", "effective_dim", "loss"):
        logged = [(event.step, event.value) for event in log.Scalars(f"logalign/{name}")]
        assert logged == [(each.step, pytest.approx(getattr(each, name))) for each in readings]
    assert [event.value for event in log.Scalars("logalign/verdict")] == [-1, -1, -1]  # no epoch, no baseline
    assert [event.step for event in log.Scalars("still")] == [9]


def test_an_accelerator_without_trackers_is_refused(tmp_path):
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    with pytest.raises(InputError, match=r'trackers have begun, found none: .*init_trackers\("project"\)'):
        watch(network(), trackers=accelerator)


def test_what_is_no_accelerator_is_left_to_others():
    assert wrap(object()) is None
    assert wrap("accelerate") is None


def test_an_accelerator_is_found_among_other_objects(tmp_path):
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("digits")
    (found,) = open_trackers(accelerator, folder=None)
    assert isinstance(found, Tracker)
    assert type(found).__name__ == "AcceleratorTracker"
    accelerator.end_training()


def test_a_tracker_that_fails_stops_no_training(tmp_path):
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("digits")
    accelerator.trackers[0].writer.close()
    accelerator.trackers[0].writer.add_scalar = None  # what it was closed for
    with pytest.warns(LogAlignWarning, match="AcceleratorTracker failed and gets no more readings"):
        _, readings = accelerated(accelerator, micro=1, trackers=accelerator)
    assert len(readings) == 3


def test_wrapping_imports_nothing():
    code = (
        "import sys; from logalign.trackers.accelerate import wrap; wrap(object()); print('accelerate' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def rank_case(rank: int, world: int, port: int, folder: Path):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=MICRO, log_with="tensorboard", project_dir=folder / f"rank{rank}"
    )
    assert accelerator.num_processes == world
    assert accelerator.is_main_process == (rank == 0)
    accelerator.init_trackers("digits")
    model, readings = accelerated(accelerator, trackers=accelerator, run=folder / "run")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for tracker in accelerator.trackers:
        tracker.finish()
    return weights, numbers(readings), type(model).__name__


def test_two_processes_measure_together_and_the_main_one_logs(two, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = two.run(rank_case, port, tmp_path)
    true_model, true_readings = plain_loop()
    for weights, readings, _ in found:
        assert_same_series(readings, numbers(true_readings))
        for name, value in weights.items():
            torch.testing.assert_close(value, true_model.state_dict()[name])
    assert_same_series(numbers(open_run(tmp_path / "run").readings), numbers(true_readings))
    log = EventAccumulator(str(tmp_path / "rank0" / "digits")).Reload()
    logged = [event.value for event in log.Scalars("logalign/lar")]
    assert logged == [pytest.approx(reading.lar, rel=1e-5) for reading in true_readings]
    assert list((tmp_path / "rank1").rglob("events*")) == []
