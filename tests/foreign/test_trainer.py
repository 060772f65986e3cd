"""What the real Trainer logs with the callback: its history and its trackers read as the run."""

import pytest
import torch
import wandb
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from logalign import diagnose, open_run
from logalign.integrations.transformers import LogAlignCallback
from logalign.runs.reading import NO_LAR


def test_the_logs_of_a_real_trainer(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    tokens = torch.randint(97, (64, 16))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=24,
        per_device_train_batch_size=8,
        logging_steps=4,
        eval_strategy="steps",
        eval_steps=8,
        save_steps=24,
        report_to=["tensorboard", "wandb"],
        use_cpu=True,
        disable_tqdm=True,
    )
    callback = LogAlignCallback(every=2, run=str(tmp_path / "run"))
    Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8], callbacks=[callback]).train()
    wandb.finish()
    wandb.teardown()
    native = {reading.step: reading for reading in open_run(tmp_path / "run").readings}
    (events,) = (tmp_path / "out" / "runs").iterdir()
    logs = [open_run(path).readings for path in (tmp_path / "out", tmp_path / "wandb", events)]
    for readings in logs:
        assert [each.step for each in readings] == [2, 6, 10, 14, 18, 22]
        for each in readings:
            own = native[each.step]
            assert each.lar == pytest.approx(own.lar, rel=1e-6)
            assert (each.n, each.m, each.tokens_seen) == (own.n, own.m, own.tokens_seen)
            assert each.epoch is not None
            assert each.lr is not None
        assert [each.step for each in readings if "val_loss" in each.extra] == [6, 14, 22]
    assert [each.loss for each in logs[0]] == [each.loss for each in logs[1]]


def test_the_logs_of_a_real_trainer_without_the_callback(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "n_positions": 16, "n_embd": 128, "n_layer": 2, "n_head": 4}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    configuration = GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(configuration)
    tokens = torch.randint(31, (32, 16))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        num_train_epochs=48,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        report_to=["tensorboard"],
        use_cpu=True,
        disable_tqdm=True,
    )
    held_out = [{"input_ids": row, "labels": row} for row in torch.randint(31, (16, 16))]
    Trainer(model, arguments, train_dataset=data, eval_dataset=held_out).train()
    (events,) = (tmp_path / "out" / "runs").iterdir()
    for path in (tmp_path / "out", events):
        readings = open_run(path).readings
        assert [each.step for each in readings] == list(range(2, 385, 2))
        assert [each.step for each in readings if "val_loss" in each.extra] == list(range(8, 385, 8))
        assert all(each.loss_mean == each.loss for each in readings)
        assert {each.reason for each in readings} == {NO_LAR}
        verdict = diagnose(path)
        assert verdict.outcome == "overfitting"  # of random tokens nothing can be learned
        assert verdict.held_out == ""
