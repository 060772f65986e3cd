"""The callback in real Trainers: the numbers of a loop by hand, in the logs, in checkpoints, on several ranks."""

import argparse
import inspect

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from logalign import watch
from logalign.integrations.transformers import LogAlignCallback

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
    train(
        tmp_path, rows, tokenizer, callback, data_collator=kept, gradient_accumulation_steps=accumulate, max_steps=5
    )
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
