"""The callback in real Trainers: the numbers of a loop by hand, in the logs, in checkpoints, on several ranks."""

import argparse
import copy
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from logalign import diagnose, open_run, watch
from logalign.errors import InputError, LogAlignWarning, RunError, SiteError
from logalign.integrations.transformers import LogAlignCallback
from tests.integrations import trainer_cases
from tests.torch.workers import Workers

VOCABULARY, LENGTH, BATCH = 300, 24, 4
FORMS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered")

pytestmark = [
    # What Transformers, TRL and Accelerate say of their own use.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("error::logalign.errors.LogAlignWarning"),
]


@pytest.fixture(scope="module")
def tokenizer():
    """A small byte-level BPE of Python source, made here."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator([inspect.getsource(argparse)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module")
def texts():
    """Lines of Python source, of different lengths."""
    lines = [line.strip() for line in inspect.getsource(argparse).splitlines()]
    return [line for line in lines if len(line) > 20]


@pytest.fixture(scope="module")
def rows(tokenizer, texts):
    """Forty lines as token numbers."""
    encoded = tokenizer(texts[:40], truncation=True, max_length=LENGTH)
    return [{"input_ids": ids} for ids in encoded["input_ids"]]


def llama(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def arguments(folder, kind=TrainingArguments, **changes):
    settings = {
        "per_device_train_batch_size": BATCH,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "dataloader_pin_memory": False,
    }
    return kind(str(folder), **{**settings, **changes})


def train(folder, rows, tokenizer, callback=None, model=None, resume=None, trainer=Trainer, more=(), **changes):
    """Train a small Llama on padded lines; the trainer after it."""
    model = llama() if model is None else model
    collator = changes.pop("data_collator", None) or DataCollatorForLanguageModeling(tokenizer, mlm=False)
    options = {name: changes.pop(name) for name in ("eval_dataset", "compute_loss_func") if name in changes}
    callbacks = [*([] if callback is None else [callback]), *more]
    made = trainer(
        model, arguments(folder, **changes), train_dataset=rows, data_collator=collator, callbacks=callbacks, **options
    )
    made.train(resume_from_checkpoint=resume)
    return made


def series(readings):
    return [[getattr(reading, name) for name in (*FORMS, "loss", "loss_mean", "lr", "epoch")] for reading in readings]


class Steps:
    """Batches of every step, as the trainer's loader gave them, kept by a collator that this one wraps."""

    def __init__(self, collator):
        self.collator, self.batches = collator, []

    def __call__(self, features):
        batch = self.collator(features)
        self.batches.append(
            {name: value.clone() if hasattr(value, "clone") else value for name, value in batch.items()}
        )
        return batch


def by_hand(model, batches, *, accumulate=1, lr=1e-2, steps=6, **watching):
    """The plain loop: the same batches, AdamW and a linear schedule, watched by hand."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    with watch(model, every=1, **watching) as monitor:
        for step in range(steps):
            micro = batches[step * accumulate : (step + 1) * accumulate]
            counted = sum(int((batch["labels"][..., 1:] != -100).sum()) for batch in micro)
            loss = 0
            for batch in micro:
                part = model(**batch, num_items_in_batch=counted).loss
                part.backward()
                loss += part.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            monitor.step(loss=loss, lr=rate, epoch=step * accumulate * BATCH / 40)
        return [reading.main for reading in monitor.readings]


# The same numbers as by hand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_plain_loop_gives_the_same_readings(tmp_path, rows, tokenizer, accumulate):
    kept = Steps(DataCollatorForLanguageModeling(tokenizer, mlm=False))
    callback = LogAlignCallback(every=1)
    train(tmp_path, rows, tokenizer, callback, data_collator=kept, gradient_accumulation_steps=accumulate, max_steps=5)
    truth = by_hand(llama(), kept.batches, accumulate=accumulate, steps=5)
    found = [readings.main for readings in callback.monitor.readings]
    assert len(found) == 5
    torch.testing.assert_close(series(found), series(truth), rtol=1e-5, atol=1e-6)
    assert found[0].kept < 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_are_the_same_bits_without_it(tmp_path, rows, tokenizer, checkpointing):
    trained = [
        train(
            tmp_path / str(watched),
            rows,
            tokenizer,
            LogAlignCallback(every=2, spectra_every=4) if watched else None,
            gradient_checkpointing=checkpointing,
        ).model.state_dict()
        for watched in (True, False)
    ]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[1])
    assert trained[0].keys() == trained[1].keys()


@pytest.mark.parametrize("how", ["compute_loss_func", "label_smoothing_factor"])
def test_labels_that_the_trainer_keeps_to_itself_are_the_mask_all_the_same(tmp_path, rows, tokenizer, how):
    def sum_of_all(outputs, labels, num_items_in_batch):
        tokens = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        return F.cross_entropy(outputs.logits.flatten(0, 1), tokens, reduction="sum") / num_items_in_batch

    usual, special = LogAlignCallback(every=1), LogAlignCallback(every=1)
    train(tmp_path / "usual", rows, tokenizer, usual)
    options = {how: sum_of_all if how == "compute_loss_func" else 0.1}
    train(tmp_path / "special", rows, tokenizer, special, **options)
    first, same = (series([callback.monitor.readings[0].main])[0] for callback in (usual, special))
    assert special.monitor.readings[0].main.kept == usual.monitor.readings[0].main.kept < 1
    torch.testing.assert_close(first[:4], same[:4], rtol=1e-6, atol=1e-7)
    if how == "compute_loss_func":
        whole = [series([readings.main for readings in callback.monitor.readings]) for callback in (usual, special)]
        torch.testing.assert_close(whole[0], whole[1], rtol=1e-5, atol=1e-6)


def first_by_hand(model, batch, **settings):
    """The first reading of a model, of this batch."""
    model.train()
    with watch(model, every=1, **settings) as monitor:
        model(**batch, use_cache=False).loss.backward()
        return monitor.step().main


def test_sequences_that_are_flattened_into_one_row(tmp_path, rows, tokenizer):
    kept = Steps(DataCollatorWithFlattening())
    callback = LogAlignCallback()
    train(tmp_path, rows, tokenizer, callback, data_collator=kept, max_steps=1)
    reading = callback.monitor.readings[0].main
    assert kept.batches[0]["input_ids"].shape[0] == 1
    # Of each sequence the last token predicts nothing: the next one's first label does not count.
    assert reading.tokens == kept.batches[0]["input_ids"].numel() - BATCH
    torch.testing.assert_close(reading.lar, first_by_hand(llama(), kept.batches[0]).lar, rtol=1e-6, atol=0)


def test_evaluation_in_between_is_not_measured(tmp_path, rows, tokenizer):
    found = []
    for strategy in ("no", "steps"):
        callback = LogAlignCallback(every=1)
        options = {"eval_strategy": strategy, "eval_steps": 2, "eval_on_start": strategy == "steps"}
        made = train(tmp_path / strategy, rows, tokenizer, callback, eval_dataset=rows[:8], **options)
        found.append(series([readings.main for readings in callback.monitor.readings]))
    assert found[0] == found[1]
    evaluated = [entry for entry in made.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 4
    assert not any(name.startswith("logalign") for entry in evaluated for name in entry)


def test_the_default_interval_is_a_500th_of_all_steps_between_1_and_10(tmp_path, rows, tokenizer):
    from logalign.integrations.transformers import _default_every

    assert [_default_every(steps) for steps in (1, 400, 1000, 2250, 5000, 10**6)] == [1, 1, 2, 4, 10, 10]
    callback = LogAlignCallback()
    train(tmp_path, rows, tokenizer, callback, max_steps=3)
    assert [readings.step for readings in callback.monitor.readings] == [0, 1, 2]


# The logs -------------------------------------------------------------------------------------------------------------


def scalars(folder):
    """What a TensorBoard log holds: by tag, values by step."""
    (events,) = {file.parent for file in Path(folder).rglob("*tfevents*")}
    log = EventAccumulator(str(events), size_guidance={"scalars": 0})
    log.Reload()
    return {tag: {event.step: event.value for event in log.Scalars(tag)} for tag in log.Tags()["scalars"]}


@pytest.mark.parametrize("way", ["callbacks", "add_callback"])
def test_trackers_of_the_trainer_get_every_reading(tmp_path, rows, tokenizer, way):
    callback = LogAlignCallback(every=1)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    settings = arguments(tmp_path, report_to=["tensorboard"])
    given = [callback] if way == "callbacks" else []
    made = Trainer(llama(), settings, train_dataset=rows, data_collator=collator, callbacks=given)
    if way == "add_callback":
        made.add_callback(callback)
    made.train()
    found = scalars(tmp_path)
    taken = [readings.main for readings in callback.monitor.readings]
    assert len(taken) == 6
    for field in ("lar", "effective_dim", "tokens_seen"):
        expected = {reading.step + 1: getattr(reading, field) for reading in taken}
        assert found[f"train/logalign/{field}"] == pytest.approx(expected, rel=1e-6)
    assert set(found["train/logalign/verdict"]) == set(range(1, 7))
    assert not {"train/logalign/loss", "train/logalign/lr", "train/logalign/epoch"} & set(found)
    history = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["logalign/lar"] for entry in history] == [reading.lar for reading in taken]
    assert [entry["loss"] for entry in history] == pytest.approx([reading.loss for reading in taken], rel=1e-6)
    assert [entry["learning_rate"] for entry in history] == [reading.lr for reading in taken]


def test_the_latest_reading_stands_and_the_last_is_not_lost(tmp_path, rows, tokenizer):
    callback = LogAlignCallback(every=2)
    made = train(tmp_path, rows, tokenizer, callback, logging_steps=3, max_steps=8)
    logged = [(entry["step"], entry["logalign/step"]) for entry in made.state.log_history if "logalign/lar" in entry]
    assert logged == [(3, 2), (6, 4), (8, 6)]
    assert "train_runtime" in made.state.log_history[-1]


# Stop and save --------------------------------------------------------------------------------------------------------


@pytest.fixture
def steep_baseline(write_run):
    """A baseline far above what the small Llama does: its verdict soon is an alarm."""
    fields = {"n": 32, "m": VOCABULARY, "loss": 5.0, "epoch": 0.1}
    lars = [0.93 + 0.002 * (i % 2) for i in range(40)]
    return write_run("baseline", lars=lars, **fields).path


def test_an_alarm_stops_the_training_and_is_logged(tmp_path, rows, tokenizer, steep_baseline):
    callback = LogAlignCallback(every=1, stop=True, baseline=steep_baseline)
    made = train(tmp_path, rows, tokenizer, callback, max_steps=300, logging_steps=1000)
    assert callback.monitor.verdict.is_alarm
    assert made.state.global_step == callback.monitor.verdict.since_step + 1 < 300
    assert made.state.log_history[0]["logalign/verdict"] == 4


def test_checkpoints_are_saved_as_the_verdict_gets_worse(tmp_path, rows, tokenizer, steep_baseline):
    outcomes = []

    class Notes(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            outcomes.append(callback.monitor.verdict.outcome)

    callback = LogAlignCallback(every=1, save=True, baseline=steep_baseline)
    train(tmp_path, rows, tokenizer, callback, max_steps=120, more=[Notes()])
    worse = [
        step + 1
        for step, (before, now) in enumerate(zip([None, *outcomes], outcomes, strict=False))
        if now != before and now in ("approaching", "overfitting")
    ]
    assert worse
    saved = sorted(int(folder.name.split("-")[1]) for folder in tmp_path.glob("checkpoint-*"))
    assert saved == worse


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_training_gives_the_same_series(tmp_path, rows, tokenizer, restore, every):
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 9, "logging_steps": 2}
    settings |= {"restore_callback_states_from_checkpoint": restore}
    whole = LogAlignCallback(every=every, run=tmp_path / "whole")
    made = train(tmp_path / "1", rows, tokenizer, whole, **settings)

    class Killed(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 7:
                raise KeyboardInterrupt

    first = LogAlignCallback(every=every, run=tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "2", rows, tokenizer, first, more=[Killed()], **settings)
    first.close()
    checkpoint = str(tmp_path / "2" / "checkpoint-4")
    second = LogAlignCallback(every=every, run=tmp_path / "run")
    again = train(tmp_path / "2", rows, tokenizer, second, resume=checkpoint, **settings)

    one, two = open_run(tmp_path / "whole"), open_run(tmp_path / "run")
    assert series(one.readings) == series(two.readings)
    assert [reading.step for reading in two.readings] == list(range(0, 9, every))
    assert [r.tokens_seen for r in one.readings] == [r.tokens_seen for r in two.readings]
    if not restore:  # the Trainer puts another callback in its place
        assert second.monitor.verdict == whole.monitor.verdict
    logs = [[e for e in t.state.log_history if "loss" in e] for t in (made, again)]
    assert logs[0] == logs[1]
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), again.model.parameters(), strict=True))


def test_a_training_that_began_without_the_callback_goes_on_with_it(tmp_path, rows, tokenizer):
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 9}
    train(tmp_path, rows, tokenizer, **settings)
    callback = LogAlignCallback(every=1)
    train(tmp_path, rows, tokenizer, callback, resume=str(tmp_path / "checkpoint-4"), **settings)
    assert [readings.step for readings in callback.monitor.readings] == [4, 5, 6, 7, 8]


def test_the_interval_of_a_checkpoint_stands(tmp_path, rows, tokenizer):
    settings = {"save_strategy": "steps", "save_steps": 4}
    train(tmp_path, rows, tokenizer, LogAlignCallback(every=2), max_steps=4, **settings)
    callback = LogAlignCallback()
    train(tmp_path, rows, tokenizer, callback, resume=str(tmp_path / "checkpoint-4"), max_steps=8, **settings)
    assert [readings.step for readings in callback.monitor.readings] == [4, 6]


def test_other_layers_than_the_checkpoints_are_refused_before_anything_is_written(tmp_path, rows, tokenizer):
    settings = {"save_strategy": "steps", "save_steps": 4}
    train(tmp_path, rows, tokenizer, LogAlignCallback(run=tmp_path / "run"), max_steps=4, **settings)
    before = (tmp_path / "run" / "run.json").read_text()
    callback = LogAlignCallback(run=tmp_path / "run", layers=["model.layers.0.mlp.down_proj"])
    with pytest.raises(InputError, match=r"the layers of the checkpoint, unembedding \(300, 32\), found model"):
        train(tmp_path, rows, tokenizer, callback, resume=str(tmp_path / "checkpoint-4"), max_steps=8, **settings)
    assert (tmp_path / "run" / "run.json").read_text() == before


def test_what_a_checkpoint_cannot_hold_is_told_where_it_would_be_lost(tmp_path, rows, tokenizer, steep_baseline):
    from logalign import Baseline

    settings = {"save_strategy": "steps", "save_steps": 4, "restore_callback_states_from_checkpoint": True}
    baseline = Baseline.from_run(steep_baseline)
    train(tmp_path, rows, tokenizer, LogAlignCallback(baseline=baseline), max_steps=4, **settings)
    with pytest.raises(InputError, match="a checkpoint cannot hold baseline of LogAlignCallback; leave it False"):
        train(
            tmp_path,
            rows,
            tokenizer,
            LogAlignCallback(baseline=baseline),
            resume=str(tmp_path / "checkpoint-4"),
            max_steps=8,
            **settings,
        )


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_arguments_that_watch_does_not_have():
    with pytest.raises(InputError, match=r"LogAlignCallback\(layer=\.\.\.\): expected an argument of logalign.watch"):
        LogAlignCallback(layer="lm_head")


def test_a_set_up_that_cannot_be_measured_fails_before_the_first_step(tmp_path, rows, tokenizer):
    started = []

    class Notes(TrainerCallback):
        def on_step_begin(self, *_, **__):
            started.append(1)

    for callback, error, message in [
        (LogAlignCallback(layers="head"), SiteError, "near matches: lm_head"),
        (LogAlignCallback(every=0), InputError, "every: expected a whole number"),
    ]:
        with pytest.raises(error, match=message):
            train(tmp_path, rows, tokenizer, callback, more=[Notes()])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(RunError, match="found a run"):
        train(tmp_path, rows, tokenizer, LogAlignCallback(run=tmp_path / "run"), more=[Notes()])
    assert started == []


def test_a_loop_that_is_no_trainer_is_told():
    from transformers import TrainerControl, TrainerState

    with pytest.raises(InputError, match=r"expected to be called by a transformers\.Trainer"):
        LogAlignCallback().on_train_begin(None, TrainerState(), TrainerControl())


def test_copies_of_the_model_in_threads_are_refused(tmp_path, rows, tokenizer):
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    made = Trainer(
        llama(), arguments(tmp_path), train_dataset=rows, data_collator=collator, callbacks=[LogAlignCallback()]
    )
    made.model_wrapped = torch.nn.DataParallel(made.model)
    with pytest.raises(InputError, match=r"found torch.nn.DataParallel.*torchrun"):
        made.train()


class NoLabels(Trainer):
    """A loss of the user's own: the model never sees labels."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def test_a_trainer_without_labels_is_told_once_and_trains_on(tmp_path, rows, tokenizer):
    callback = LogAlignCallback(every=1)
    with pytest.warns(LogAlignWarning, match="expected labels among the arguments") as told:
        train(tmp_path, rows, tokenizer, callback, trainer=NoLabels)
    assert len([each for each in told if each.category is LogAlignWarning]) == 1
    assert len(callback.monitor.readings) == 6
    assert all(readings.main.loss > 0 for readings in callback.monitor.readings)


def test_the_users_own_mask_for_a_loss_of_the_users_own(tmp_path, rows, tokenizer):
    usual, masked = LogAlignCallback(every=1), LogAlignCallback(every=1)

    class Masked(NoLabels):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            masked.monitor.mask(F.pad(inputs["labels"][:, 1:] != -100, (0, 1), value=False))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    train(tmp_path / "usual", rows, tokenizer, usual, max_steps=1)
    train(tmp_path / "masked", rows, tokenizer, masked, max_steps=1, trainer=Masked)
    first, same = (series([callback.monitor.readings[0].main])[0] for callback in (usual, masked))
    torch.testing.assert_close(first, same, rtol=1e-5, atol=1e-6)


class Stream(torch.utils.data.IterableDataset):
    """Rows without a length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_data_without_a_length(tmp_path, rows, tokenizer):
    callback = LogAlignCallback(every=1)
    train(tmp_path, Stream(rows), tokenizer, callback, max_steps=14)
    epochs = [readings.main.epoch for readings in callback.monitor.readings]
    assert [int(epoch) for epoch in epochs] == [0] * 10 + [0] + [1] * 3


@pytest.mark.parametrize("where", ["forward", "data"])
def test_after_an_error_the_model_is_free_again(tmp_path, rows, tokenizer, where):
    model, callback = llama(), LogAlignCallback(every=1, run=tmp_path / "run")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    calls = []

    def failing(features):
        calls.append(1)
        batch = collator(features)
        if len(calls) == 3:
            if where == "data":
                raise RuntimeError("no more data")
            batch["input_ids"] = batch["input_ids"] + VOCABULARY
        return batch

    made = Trainer(model, arguments(tmp_path), train_dataset=rows, data_collator=failing, callbacks=[callback])
    with pytest.raises((RuntimeError, IndexError)):
        made.train()
    assert ("training_step" in vars(made)) == (where == "data")
    if where == "forward":
        with watch(model):
            pass
    made.train()
    assert "training_step" not in vars(made)
    assert [reading.step for reading in open_run(tmp_path / "run").readings] == list(range(6))


MISSING = """
import sys
sys.modules["transformers"] = None
try:
    import logalign.integrations.transformers
except ImportError as error:
    print(type(error).__name__, error)
"""


def test_without_transformers_the_install_command_is_told():
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, check=True)
    expected = 'MissingExtraError LogAlignCallback needs transformers: pip install "logalign[transformers]"'
    assert done.stdout.strip() == expected


def test_an_unsupported_release_is_told(tmp_path):
    (tmp_path / "transformers-4.57.1.dist-info").mkdir()
    (tmp_path / "transformers-4.57.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.1\n"
    )
    (tmp_path / "transformers.py").write_text("")
    script = MISSING.replace('sys.modules["transformers"] = None', "")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert "needs transformers from 5.0 on and below 6.0, found 4.57.1: pip install" in done.stdout


# Wrappers, other trainers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workers():
    pool = Workers(2)
    yield pool
    pool.stop()


@pytest.mark.parametrize(
    ("kind", "wrapped", "settings"),
    [
        ("Trainer", "DistributedDataParallel", {}),
        ("Trainer", "DistributedDataParallel", {"gradient_accumulation_steps": 2}),
        ("ShardedTrainer", "FSDPLlamaForCausalLM", {}),
    ],
)
def test_two_ranks_give_what_one_gives(tmp_path, workers, kind, wrapped, settings):
    truth = trainer_cases.training(tmp_path / "one", 8, **settings)
    settings = {"kind": getattr(trainer_cases, kind), **settings}
    watched = workers.run(trainer_cases.over_ranks, tmp_path / "watched", True, settings)
    plain = workers.run(trainer_cases.over_ranks, tmp_path / "plain", False, settings)
    for rank in range(2):
        assert watched[rank]["wrapped"] == wrapped
        assert watched[rank]["readings"].keys() == truth["readings"].keys()
        for key, reading in truth["readings"].items():
            assert watched[rank]["readings"][key] == pytest.approx(reading, rel=1e-5, abs=1e-6), key
        for name, weight in plain[rank]["weights"].items():
            assert torch.equal(weight, watched[rank]["weights"][name]), name
    assert len(truth["readings"]) == 2 * trainer_cases.STEPS
    # The loss that is recorded is the one that the Trainer logs, over all ranks and micro-batches.
    logged = [entry["loss"] for entry in watched[0]["logs"]]
    recorded = [truth["readings"]["unembedding", step]["loss"] for step in range(trainer_cases.STEPS)]
    assert logged == pytest.approx(recorded, rel=1e-5)
    assert all("logalign/lar" in entry for entry in watched[0]["logs"])


def test_adapters(tmp_path, rows, tokenizer):
    peft = pytest.importorskip("peft")
    callback = LogAlignCallback(every=1)
    kept = Steps(DataCollatorForLanguageModeling(tokenizer, mlm=False))

    def model():
        torch.manual_seed(1)
        settings = {"target_modules": ["q_proj", "lm_head"], "r": 4, "init_lora_weights": False}
        return peft.get_peft_model(llama(), peft.LoraConfig(**settings))

    made = train(tmp_path, rows, tokenizer, callback, model=model(), data_collator=kept)
    readings = [readings.main for readings in callback.monitor.readings]
    torch.testing.assert_close(readings[0].lar, first_by_hand(model(), kept.batches[0]).lar, rtol=1e-5, atol=0)
    assert callback.monitor.sites["unembedding"]["mask"].startswith("forward argument 'labels'")
    base = first_by_hand(llama(), kept.batches[0]).lar
    assert abs(base - readings[0].lar) > 1e-4  # the adapter on the head counts
    assert readings[-1].lar != readings[0].lar
    assert made.state.log_history[0]["logalign/lar"] == readings[0].lar


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is for Linux")
def test_liger(tmp_path, rows, tokenizer):
    found = []
    for use in (False, True):
        config = {"rope": False, "rms_norm": False, "swiglu": False, "fused_linear_cross_entropy": True}
        options = {"use_liger_kernel": True, "liger_kernel_config": config} if use else {}
        callback = LogAlignCallback(every=1, without_logits="exact")
        train(tmp_path / str(use), rows, tokenizer, callback, max_steps=2, gradient_accumulation_steps=2, **options)
        found.append(series([readings.main for readings in callback.monitor.readings]))
        assert ("inputs" in callback.monitor.sites["unembedding"]) == use
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_compiled_model(tmp_path, rows, tokenizer):
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        callback = LogAlignCallback(every=2)
        options = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        train(tmp_path / str(compiled), rows, tokenizer, callback, **options)
        found.append(series([readings.main for readings in callback.monitor.readings]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_the_seq2seq_trainer(tmp_path, rows, tokenizer):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes))
    pairs = [{"input_ids": row["input_ids"], "labels": row["input_ids"][: 4 + i % 5]} for i, row in enumerate(rows)]
    kept = Steps(DataCollatorForSeq2Seq(tokenizer, model=model))
    untrained = copy.deepcopy(model)
    callback = LogAlignCallback(every=1)
    settings = arguments(tmp_path, Seq2SeqTrainingArguments, max_steps=3, eval_strategy="steps", eval_steps=1)
    settings.predict_with_generate = True
    made = Seq2SeqTrainer(
        model,
        settings,
        train_dataset=pairs,
        eval_dataset=pairs[:2],
        data_collator=kept,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    made.train()
    first = callback.monitor.readings[0].main
    assert first.tokens == int((kept.batches[0]["labels"] != -100).sum())
    assert first.kept < 1
    torch.testing.assert_close(first.lar, first_by_hand(untrained, kept.batches[0]).lar, rtol=1e-6, atol=0)
    assert len(callback.monitor.readings) == 3


@pytest.mark.parametrize("packing", [False, True])
def test_the_sft_trainer_of_trl(tmp_path, texts, tokenizer, packing):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    callback = LogAlignCallback(every=1, without_logits="exact")
    settings = arguments(
        tmp_path,
        trl.SFTConfig,
        max_length=48,
        packing=packing,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=2,
        max_steps=3,
        train_sampling_strategy="sequential",
    )
    made = trl.SFTTrainer(
        model=llama(),
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"text": texts[:40]}),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    batch = next(iter(made.get_train_dataloader()))
    made.train()
    readings = [readings.main for readings in callback.monitor.readings]
    assert "inputs" in callback.monitor.sites["unembedding"]  # the loss forms no logits
    truth = first_by_hand(llama(), batch)
    assert readings[0].tokens == truth.tokens == int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(series(readings)[0][:4], series([truth])[0][:4], rtol=1e-5, atol=1e-6)
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["logalign/lar"] for entry in logged] == [reading.lar for reading in readings]
    assert [entry["loss"] for entry in logged] == pytest.approx([reading.loss for reading in readings], rel=1e-5)


# The whole: a fine-tune without an evaluation set ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def example():
    """examples/trainer_fine_tune.py."""
    path = Path(__file__).parents[2] / "examples" / "trainer_fine_tune.py"
    spec = importlib.util.spec_from_file_location("trainer_fine_tune", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_fine_tune_gets_a_verdict_that_its_held_out_loss_confirms(tmp_path, example, monkeypatch):
    """Read back from TensorBoard and from W&B; ends early with stop=True; resumed, it is the same series."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    first, data, held_out = example.texts()
    begin = example.first_model(first, tmp_path / "first").state_dict()

    def tuned(name, resume=None, run="run", more=(), **settings):
        model = LlamaForCausalLM(LlamaConfig(**CONFIG_OF_EXAMPLE))
        model.load_state_dict(begin)
        callback = LogAlignCallback(run=tmp_path / run, stop=name == "stopped")
        options = {"save_strategy": "steps", "save_steps": 128, **settings}
        table = example.fine_tune(model, data, held_out, tmp_path / name, callback, resume=resume, **options)
        return callback, table

    callback, table = tuned("whole", report_to=["tensorboard", "wandb"], logging_steps=1)
    wandb.finish()  # as the end of a script does
    verdict = callback.monitor.verdict
    assert verdict.outcome == "overfitting"
    losses = [loss for _, _, loss, _ in table]
    lowest = losses.index(min(losses))
    assert 0 < lowest < len(losses) - 3
    # Held-out loss has left its lowest point before the alarm, and is higher wherever the alarm stands.
    alarmed = [loss for _, _, loss, at in table if at.is_alarm]
    assert alarmed
    assert min(alarmed) > losses[lowest] + 0.05
    assert all(not at.is_alarm for _, _, _, at in table[: lowest + 1])

    readings = open_run(tmp_path / "run").readings
    chart = {reading.step: reading.lar for reading in readings}
    (events,) = {file.parent for file in (tmp_path / "whole").rglob("*tfevents*")}
    (offline,) = (tmp_path / "wandb").glob("offline-run-*")
    state = tmp_path / "whole" / "checkpoint-384" / "trainer_state.json"
    for logged in (events, offline, state):
        assert {r.step: r.lar for r in open_run(logged).readings} == pytest.approx(chart, rel=1e-6)
        assert diagnose(logged).outcome == verdict.outcome

    stopped, short = tuned("stopped", run="stopped-run", report_to=[])
    assert stopped.monitor.verdict.is_alarm
    assert stopped.monitor.readings[-1].step == verdict.since_step < readings[-1].step
    assert len(short) < len(table)

    again, _ = tuned("whole", resume=str(tmp_path / "whole" / "checkpoint-128"), report_to=[])
    assert len(again.monitor.readings) == len(readings) - 128
    assert series(open_run(tmp_path / "run").readings) == series(readings)
    assert again.monitor.verdict == verdict


CONFIG_OF_EXAMPLE = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
