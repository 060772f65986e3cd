"""The callback under a real Trainer against the same training written as a plain loop."""

import csv
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from logalign import open_run, watch
from logalign.errors import InputError, LogAlignWarning, RunError, SiteError
from logalign.integrations.lightning import LogAlignCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:Be aware that when using `ckpt_path`:UserWarning",  # resumed without the callback that saved
)
BATCH, BATCHES, EVERY, RATE = 32, 6, 2, 0.05


def digits(samples: int = BATCH * BATCHES, *, noise: float = 0.0) -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images[:samples] / 16, dtype=torch.float32)
    labels = torch.tensor(labels[:samples])
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(samples, generator=generator) < noise
    labels[random] = torch.randint(0, 10, (int(random.sum()),), generator=generator)
    return TensorDataset(images, labels)


class Classifier(pl.LightningModule):
    """What a user of Lightning has."""

    def __init__(self, *, width: int = 16, optimizer=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 10)
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=RATE))

    def forward(self, images):
        return self.head(self.body(images))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self(images), labels))

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def trainer(folder: Path, *callbacks, **options) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "default_root_dir": folder,
            "callbacks": list(callbacks),
            **quiet,
            **options,
        }
    )


def loader(data: TensorDataset | None = None, batch_size: int = BATCH, **options) -> DataLoader:
    return DataLoader(data or digits(), batch_size=batch_size, **options)


def fit(folder: Path, callback, *, model=None, micro: int = 1, **options):
    model = model or Classifier()
    fitted = trainer(folder, callback, accumulate_grad_batches=micro, **options)
    fitted.fit(model, loader(batch_size=BATCH // micro), loader())
    return model, fitted


def plain_loop():
    """The same training without Lightning, all samples of a step at once."""
    model = Classifier()
    (optimizer,), (schedule,) = model.configure_optimizers()
    with watch(model, every=EVERY) as monitor:
        for epoch in range(2):
            for index, (images, labels) in enumerate(loader()):
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                rate = optimizer.param_groups[0]["lr"]
                optimizer.step()
                schedule["scheduler"].step()
                monitor.step(loss=loss, lr=rate, epoch=epoch + index / BATCHES)
    return model, [readings.main for readings in monitor.readings]


def mains(callback) -> list:
    return [readings.main for readings in callback.monitor.readings]


COMPARED = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered", "loss", "loss_mean", "lr", "epoch")


def assert_same_series(found, expected, *, rel: float = 1e-5) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.step, mine.tokens, mine.tokens_seen) == (theirs.step, theirs.tokens, theirs.tokens_seen)
        for name in COMPARED:
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=rel), (mine.step, name)


# What is read.


@pytest.mark.parametrize("micro", [1, 4])
def test_readings_are_those_of_the_plain_loop(tmp_path, micro):
    callback = LogAlignCallback(every=EVERY)
    fit(tmp_path, callback, micro=micro)  # with validation before and between
    assert len(mains(callback)) == BATCHES * 2 // EVERY
    assert_same_series(mains(callback), plain_loop()[1])


@pytest.mark.parametrize("micro", [1, 2])
def test_weights_are_bit_identical_with_and_without(tmp_path, micro):
    trained = []
    for callback in (LogAlignCallback(every=1, spectra_every=2), Callback()):
        torch.manual_seed(3)
        trained.append(fit(tmp_path, callback, micro=micro)[0].state_dict())
        trained.append({"rng": torch.get_rng_state()})
    for name in trained[0]:
        assert torch.equal(trained[0][name], trained[2][name])
    assert torch.equal(trained[1]["rng"], trained[3]["rng"])


def test_a_last_group_of_fewer_micro_batches(tmp_path):
    """Of six batches four are one step and the last two another, whose losses Lightning divides by four, too."""
    callback = LogAlignCallback(every=1)
    model = Classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    trainer(tmp_path, callback, max_epochs=1, accumulate_grad_batches=4).fit(model, loader())
    images, labels = digits().tensors
    with torch.no_grad():
        losses = [float(F.cross_entropy(model(images[part]), labels[part])) for part in (slice(128), slice(128, None))]
    assert [reading.loss for reading in mains(callback)] == [pytest.approx(loss, rel=1e-5) for loss in losses]
    assert [reading.tokens for reading in mains(callback)] == [128, 64]
    assert [reading.epoch for reading in mains(callback)] == [0.0, pytest.approx(4 / 6)]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo looks at it
def test_a_compiled_network_is_measured(tmp_path):
    model = Classifier()
    model.body = torch.compile(model.body, backend="eager")
    model.head = torch.compile(model.head, backend="eager")
    callback = LogAlignCallback(every=EVERY)
    fit(tmp_path, callback, model=model)
    assert_same_series(mains(callback), plain_loop()[1])


@pytest.mark.parametrize(("steps", "interval"), [(3, 1), (1000, 2), (2600, 5), (60_000, 10), (-1, 10), (math.inf, 10)])
def test_the_interval_follows_the_length_of_the_training(steps, interval):
    from logalign.integrations.lightning import _interval

    assert _interval(steps, 0) == interval
    assert _interval(steps, 8) in (1, 2, 4, 8)


def test_without_an_interval_a_short_training_is_read_at_every_step(tmp_path):
    callback = LogAlignCallback()
    fit(tmp_path, callback)
    assert [reading.step for reading in mains(callback)] == list(range(BATCHES * 2))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(digits())


def test_data_without_a_length(tmp_path):
    callback = LogAlignCallback()
    trainer(tmp_path, callback).fit(Classifier(), DataLoader(Stream(), batch_size=BATCH))
    assert [(reading.step, reading.epoch) for reading in mains(callback)] == [(0, 0.0), (10, 1.0)]


class Alternating(Classifier):
    """Manual optimization by two optimizers."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return {"loss": loss, "logits": None}

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=RATE) for part in (self.body, self.head)]


def test_manual_optimization_is_one_step_a_batch(tmp_path):
    callback = LogAlignCallback(every=EVERY)
    fitted = trainer(tmp_path, callback)
    fitted.fit(Alternating(), loader())
    assert fitted.global_step == BATCHES * 2 * 2
    readings = mains(callback)
    assert [reading.step for reading in readings] == list(range(0, BATCHES * 2, EVERY))
    assert readings[0].lar == pytest.approx(plain_loop()[1][0].lar, rel=1e-5)
    assert readings[0].loss == pytest.approx(plain_loop()[1][0].loss, rel=1e-5)
    assert {reading.lr for reading in readings} == {RATE}


class Masked(pl.LightningModule):
    """A network whose own forward gets the labels, as Transformers has it."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 10)

        def forward(self, images, labels):
            return F.cross_entropy(self.head(images), labels)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = self.Network()

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return self.network(images, labels=torch.where(labels < 5, labels, -100))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


def test_labels_that_a_submodule_gets_say_which_tokens_count(tmp_path):
    callback = LogAlignCallback(every=1, module="network")
    trainer(tmp_path, callback, max_epochs=1).fit(Masked(), loader())
    counted = [int((labels < 5).sum()) for _, labels in loader()]
    assert [reading.tokens for reading in mains(callback)] == counted
    assert counted[0] < BATCH


def test_a_submodule_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"module='net'\): expected the name of a submodule of Masked, .* network"):
        trainer(tmp_path, LogAlignCallback(module="net")).fit(Masked(), loader())


# Where it appears.


def test_loggers_hold_every_reading(tmp_path):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    callback = LogAlignCallback(every=4)  # the second epoch begins between two readings
    fit(tmp_path, callback, logger=loggers, log_every_n_steps=1)
    with open(Path(loggers[0].log_dir) / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["logalign/lar"]]
    expected = {reading.step: reading for reading in mains(callback)}
    assert [int(row["step"]) for row in rows] == list(range(BATCHES * 2))
    for row in rows:  # between readings the latest stands
        reading = expected[int(row["step"]) // 4 * 4]
        for name in ("lar", "effective_dim", "loss", "epoch", "lr"):
            assert float(row[f"logalign/{name}"]) == getattr(reading, name)
    log = EventAccumulator(loggers[1].log_dir).Reload()
    logged = {event.step: event.value for event in log.Scalars("logalign/lar")}
    assert logged == {step: pytest.approx(expected[step // 4 * 4].lar) for step in range(BATCHES * 2)}
    assert {event.value for event in log.Scalars("logalign/verdict")} == {1, -1}


def test_loggers_are_written_as_often_as_the_trainer_says(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = LogAlignCallback(every=EVERY)
    fit(tmp_path, callback, logger=logger, log_every_n_steps=5)
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["logalign/lar"]]
    lars = {reading.step: reading.lar for reading in mains(callback)}
    assert [(int(row["step"]), float(row["logalign/lar"])) for row in rows] == [(4, lars[4]), (9, lars[8])]


def test_other_callbacks_find_it_among_the_metrics(tmp_path):
    callback = LogAlignCallback(every=EVERY)
    _, fitted = fit(tmp_path, callback)
    assert float(fitted.callback_metrics["logalign/lar"]) == mains(callback)[-1].lar
    best = ModelCheckpoint(tmp_path, monitor="logalign/lar", mode="max")
    fitted = trainer(tmp_path, LogAlignCallback(every=EVERY), best, enable_checkpointing=True, max_epochs=1)
    fitted.fit(Classifier(), loader())
    assert best.best_model_path


class Poison(Callback):
    """Makes one step's inputs NaN, without harm to the weights."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            batch[0].fill_(math.nan)


def test_what_is_undefined_is_not_shown_as_it_was(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = LogAlignCallback(every=2)
    model = Classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    fitted = trainer(tmp_path, callback, Poison(), logger=logger, log_every_n_steps=1, max_epochs=1)
    with pytest.warns(LogAlignWarning, match="step 2, unembedding: no LAR"):
        fitted.fit(model, loader())
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        shown = [float(row["logalign/lar"]) for row in csv.DictReader(file) if row["logalign/lar"]]
    assert [math.isnan(value) for value in shown] == [False, False, True, True, True, True]


@pytest.mark.parametrize("options", [{"barebones": True, "enable_checkpointing": None, "logger": None}, {}])
def test_without_loggers(tmp_path, options):
    callback = LogAlignCallback(every=EVERY)
    bare = {"enable_progress_bar": None, "enable_model_summary": None} if options else {}
    trainer(tmp_path, callback, **options, **bare).fit(Silent(), loader())
    assert len(mains(callback)) == BATCHES


class Silent(Classifier):
    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self(images), labels)


# Stop, save, resume.


def noisy(tmp_path, callback, **options):
    """Digits with 60 % random labels: LAR falls while the network learns them by heart."""
    model = Classifier(width=128, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-3))
    model.configure_optimizers = lambda: model.make_optimizer(model.parameters())
    fitted = trainer(tmp_path, callback, max_epochs=80, **options)
    torch.manual_seed(0)
    fitted.fit(model, loader(digits(256, noise=0.6), 64, shuffle=True))
    return fitted


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    callback = LogAlignCallback(every=2, stop=True, save=True, run=folder / "run")
    return noisy(folder, callback), callback, folder


def test_an_alarm_ends_the_training(stopped):
    fitted, callback, folder = stopped
    assert callback.monitor.verdict.is_alarm
    assert fitted.should_stop
    assert fitted.global_step == mains(callback)[-1].step + 1 < 320
    assert len(open_run(folder / "run").readings) == len(mains(callback))


def test_a_checkpoint_is_saved_where_the_outcome_turns(stopped):
    fitted, callback, folder = stopped
    saved = sorted(folder.rglob("logalign-*.ckpt"))
    last = f"logalign-{callback.monitor.verdict.outcome}-step={fitted.global_step}.ckpt"
    assert last in [path.name for path in saved]
    assert {path.name.split("-")[1] for path in saved} <= {"approaching", "overfitting", "memorizing"}
    path = next(path for path in saved if path.name == last)
    state = torch.load(path, weights_only=True)  # as Lightning itself loads it
    assert state["callbacks"]["LogAlignCallback"]["monitor"]["step"] == fitted.global_step
    assert state["global_step"] == fitted.global_step


def test_checkpoints_stand_beside_those_of_the_trainer(tmp_path):
    beside = ModelCheckpoint(tmp_path / "mine")
    fitted = trainer(tmp_path, LogAlignCallback(), beside, enable_checkpointing=True, max_epochs=1)
    from logalign.integrations.lightning import _folder

    fitted.fit(Classifier(), loader())
    assert _folder(fitted) == str(tmp_path / "mine")


def test_without_stop_an_alarm_ends_nothing(tmp_path):
    callback = LogAlignCallback(every=2)
    fitted = noisy(tmp_path, callback)
    assert fitted.global_step == 320
    assert not list(tmp_path.rglob("*.ckpt"))


class Kill(Callback):
    """What an interrupted training looks like from inside."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            raise RuntimeError("out of memory")


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("every", [EVERY, None])
def test_interrupted_and_resumed_is_the_same_series(tmp_path, micro, every):
    whole = LogAlignCallback(every=every)
    fit(tmp_path, whole, micro=micro)
    saves = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, save_top_k=-1)
    first = LogAlignCallback(every=every, run=tmp_path / "run")
    fitted = trainer(tmp_path, first, saves, Kill(8), enable_checkpointing=True, accumulate_grad_batches=micro)
    with pytest.raises(RuntimeError, match="out of memory"):
        fitted.fit(Classifier(), loader(batch_size=BATCH // micro), loader())
    assert not first._attached
    (checkpoint,) = (tmp_path / "saved").glob("*step=6.ckpt")
    second = LogAlignCallback(every=every, run=tmp_path / "run")
    fitted = trainer(tmp_path, second, accumulate_grad_batches=micro)
    fitted.fit(Classifier(), loader(batch_size=BATCH // micro), loader(), ckpt_path=checkpoint)
    run = open_run(tmp_path / "run")
    assert_same_series(run.readings, mains(whole), rel=1e-12)
    assert [event["step"] for event in run.events if event["event"] == "resume"] == [6]
    assert second.monitor.verdict == whole.monitor.verdict


def test_the_same_trainer_goes_on(tmp_path):
    callback = LogAlignCallback(every=EVERY, run=tmp_path / "run")
    model, fitted = fit(tmp_path, callback, max_epochs=1)
    fitted.fit_loop.max_epochs = 2
    fitted.fit(model, loader(), loader())
    assert [reading.step for reading in open_run(tmp_path / "run").readings] == list(range(0, 12, EVERY))


def test_another_trainer_begins_anew(tmp_path):
    callback = LogAlignCallback(every=EVERY)
    fit(tmp_path, callback, max_epochs=1)
    fit(tmp_path, callback, max_epochs=1)
    assert [reading.step for reading in mains(callback)] == [0, 2, 4]
    occupied = LogAlignCallback(run=tmp_path / "run")
    fit(tmp_path, occupied, max_epochs=1)
    with pytest.raises(RunError, match="expected a new or empty folder, found a run"):
        fit(tmp_path, occupied, max_epochs=1)


def test_a_checkpoint_from_before_the_callback(tmp_path):
    saves = ModelCheckpoint(tmp_path / "saved", save_last=True)
    trainer(tmp_path, saves, enable_checkpointing=True, max_epochs=1).fit(Classifier(), loader())
    callback = LogAlignCallback(every=EVERY, run=tmp_path / "run")
    trainer(tmp_path, callback).fit(Classifier(), loader(), ckpt_path=tmp_path / "saved" / "last.ckpt")
    assert [(reading.step, reading.epoch) for reading in mains(callback)] == [
        (0, 1.0),
        (2, pytest.approx(4 / 3)),
        (4, pytest.approx(5 / 3)),
    ]


def saved_checkpoint(tmp_path, **options) -> Path:
    saves = ModelCheckpoint(tmp_path / "saved", save_last=True)
    callback = LogAlignCallback(every=EVERY, run=tmp_path / "run", **options)
    trainer(tmp_path, callback, saves, enable_checkpointing=True, max_epochs=1).fit(Classifier(), loader())
    return tmp_path / "saved" / "last.ckpt"


def test_resuming_with_other_layers_is_refused_at_the_start(tmp_path):
    checkpoint = saved_checkpoint(tmp_path)
    before = (tmp_path / "run" / "readings.jsonl").read_text()
    callback = LogAlignCallback(every=EVERY, run=tmp_path / "run", layers="body.2")
    model = Classifier()
    with pytest.raises(InputError, match=r"unembedding = 'head' 10 x 16, found unembedding = 'body.2' 16 x 16"):
        trainer(tmp_path, callback).fit(model, loader(), ckpt_path=checkpoint)
    assert (tmp_path / "run" / "readings.jsonl").read_text() == before
    watch(model).close()  # the model is free


class Nameless(Classifier):
    """A module whose unembedding is found in the first forward only."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.head = self.head, None

    def forward(self, images):
        return self.last(self.body(images))


def test_other_layers_that_come_up_later_are_told_once(tmp_path):
    checkpoint = saved_checkpoint(tmp_path)
    callback = LogAlignCallback(every=EVERY, run=tmp_path / "run")
    fitted = trainer(tmp_path, callback)
    state = torch.load(checkpoint, weights_only=True)
    state["state_dict"] = Nameless().state_dict()
    torch.save(state, checkpoint)
    with pytest.warns(LogAlignWarning, match="unembedding = 'head' 10 x 16, found unembedding = 'last'") as told:
        fitted.fit(Nameless(), loader(), ckpt_path=checkpoint)
    assert sum("expected the layers" in str(each.message) for each in told) == 1
    assert [reading.step for reading in mains(callback)] == [6, 8, 10]


# Wrong set-ups, and the end.


class Headless(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 10)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.table((batch[0] * 16).long()).mean(1), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


def test_no_head_is_told_at_the_start(tmp_path):
    with pytest.raises(SiteError, match=r"Headless: expected a model with a linear layer, .* layers='...'"):
        trainer(tmp_path, LogAlignCallback()).fit(Headless(), loader())


def test_a_layer_that_is_not_there(tmp_path):
    with pytest.raises(SiteError, match=r"layers='heads': expected a module of Classifier, .* near matches: head"):
        trainer(tmp_path, LogAlignCallback(layers="heads")).fit(Classifier(), loader())


@pytest.mark.parametrize("keyword", ["model", "resume"])
def test_keywords_that_are_set_for_the_user(keyword):
    with pytest.raises(InputError, match=f"found {keyword}, which it sets itself"):
        LogAlignCallback(**{keyword: True})


@pytest.mark.parametrize("way", ["end", "exception"])
def test_the_module_is_let_go(tmp_path, way):
    model, callback = Classifier(), LogAlignCallback()
    fitted = trainer(tmp_path, callback, *([Kill(2)] if way == "exception" else []))
    if way == "exception":
        with pytest.raises(RuntimeError, match="out of memory"):
            fitted.fit(model, loader())
    else:
        fitted.fit(model, loader())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    watch(model).close()


def test_validation_alone_watches_nothing(tmp_path):
    callback = LogAlignCallback()
    trainer(tmp_path, callback).validate(Classifier(), loader(), verbose=False)
    assert callback.monitor is None
    assert callback.state_dict() == {}


# Two processes, and the other name of Lightning.

SCRIPT = Path(__file__).parent / "lightning_ddp.py"


def run_script(*arguments, timeout: int = 240) -> None:
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_two_processes_measure_together_and_are_resumed(tmp_path):
    run_script("lightning.pytorch", tmp_path, 2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    true_model, true_readings = plain_loop()
    readings = open_run(tmp_path / "run").readings
    # The checkpoint was saved between two readings: of the loss of step 5 it has what rank 0 has.
    readings[3] = replace(readings[3], loss_mean=true_readings[3].loss_mean)
    assert_same_series(readings, true_readings)
    for each in ranks:
        assert each["lars"] == [pytest.approx(reading.lar, rel=1e-5) for reading in true_readings]
        for name, value in each["weights"].items():
            torch.testing.assert_close(value, true_model.state_dict()[name])
    shown = []
    for part in ("first", "second"):
        with open(tmp_path / part / "metrics.csv", newline="") as file:
            shown += [float(row["logalign/lar"]) for row in csv.DictReader(file) if row["logalign/lar"]]
    assert shown == [pytest.approx(reading.lar, rel=1e-5) for reading in true_readings for _ in range(EVERY)]


@pytest.mark.slow
def test_two_processes_that_share_the_weights(tmp_path):
    run_script("lightning.pytorch", tmp_path, 2, "sharded")
    assert_same_series(open_run(tmp_path / "run").readings, plain_loop()[1])


@pytest.mark.slow
def test_two_processes_save_and_stop_together(tmp_path):
    run_script("lightning.pytorch", tmp_path, 2, "until-an-alarm")
    steps = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)["steps"] for rank in (0, 1)]
    assert steps[0] == steps[1] < 400
    saved = {path.name for path in (tmp_path / "noisy" / "checkpoints").iterdir()}
    assert f"logalign-overfitting-step={steps[0]}.ckpt" in saved


def test_the_other_name_of_lightning(tmp_path):
    run_script("pytorch_lightning", tmp_path, 1)
    lars = torch.load(tmp_path / "rank0.pt", weights_only=True)["lars"]
    assert lars == [pytest.approx(reading.lar, rel=1e-5) for reading in plain_loop()[1]]


def test_a_callback_of_both_where_both_are_imported():
    code = (
        "import lightning.pytorch as one, pytorch_lightning as other; "
        "from logalign.integrations.lightning import LogAlignCallback as ours; "
        "assert issubclass(ours, one.Callback) and issubclass(ours, other.Callback)"
    )
    assert "Error" not in said(code)


def said(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


def test_missing_lightning_names_the_command():
    code = (
        "import sys, importlib.util as util; find = util.find_spec; "
        "util.find_spec = lambda name, *rest: None if 'lightning' in name and 'logalign' not in name "
        "else find(name, *rest); sys.modules['lightning'] = None; import logalign.integrations.lightning"
    )
    assert 'LogAlignCallback needs lightning: pip install "logalign[lightning]"' in said(code)


def test_an_unsupported_lightning_says_which_are_supported():
    code = (
        "from importlib import metadata; known = metadata.version; "
        "metadata.version = lambda name: '1.9.5' if name == 'lightning' else known(name); "
        "import logalign.integrations.lightning"
    )
    assert "LogAlignCallback needs lightning from 2.2 on and below 3, found 1.9.5" in said(code)
