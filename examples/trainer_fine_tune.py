"""Fine-tune with the Transformers Trainer, without an evaluation set: python examples/trainer_fine_tune.py

A small Llama is first trained on some of the sources of Python's `email` package, then fine-tuned for several epochs on
a little of `asyncio`. Held-out loss is measured beside it for the table at the end only: logalign does not see it.
"""

import asyncio
import email
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from logalign.integrations.transformers import LogAlignCallback

CONTEXT, BATCH = 64, 8
TRAIN_TOKENS, HELD_OUT_TOKENS, EPOCHS, FIRST_STEPS = 16_384, 8_192, 12, 200


def source(package):
    """The text of a package's own modules."""
    files = sorted(Path(package.__file__).parent.glob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def tokenizer_of(text):
    """A byte-level BPE of that text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=1024, initial_alphabet=alphabet))
    return tokenizer


def rows(tokens):
    """Sequences of `CONTEXT` tokens, as the Trainer takes them."""
    windows = torch.tensor(tokens[: len(tokens) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    return [{"input_ids": window, "labels": window} for window in windows]


def texts():
    """Rows of the first text, and of the second, for training and held out."""
    first, second = source(email), source(asyncio)
    tokenizer = tokenizer_of(first)
    tokens = tokenizer.encode(second).ids
    held_out = tokens[-HELD_OUT_TOKENS:]
    return rows(tokenizer.encode(first).ids), rows(tokens[:TRAIN_TOKENS]), rows(held_out)


def first_model(data, folder):
    """A small Llama that has learned the first text a little."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    )
    model = LlamaForCausalLM(config)
    trainer = Trainer(model, arguments(folder, max_steps=FIRST_STEPS, report_to=[]), train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model


def arguments(folder, **settings):
    """How both trainings go: AdamW at a constant rate."""
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": EPOCHS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 8,
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**defaults, **settings})


class HeldOut(TrainerCallback):
    """Notes the held-out loss and the verdict at the end of every epoch."""

    def __init__(self, data, callback):
        self.inputs = torch.stack([row["input_ids"] for row in data])
        self.callback = callback
        self.table = []

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        model.eval()
        with torch.no_grad():
            loss = model(input_ids=self.inputs, labels=self.inputs).loss.item()
        self.table.append((round(state.epoch), state.global_step, loss, self.callback.monitor.verdict))


def fine_tune(model, data, held_out, folder, callback, resume=None, **settings):
    """Fine-tune, with the callback; what the held-out loss was meanwhile."""
    table = HeldOut(held_out, callback)
    trainer = Trainer(
        model,
        arguments(folder, **settings),
        train_dataset=data,
        callbacks=[callback, table],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return table.table


def main():
    """Train on the first text, fine-tune on the second, print what was found."""
    folder = Path(tempfile.mkdtemp(prefix="logalign-trainer-"))
    first, train, held_out = texts()
    model = first_model(first, folder / "first")
    callback = LogAlignCallback(run=folder / "run")
    table = fine_tune(model, train, held_out, folder, callback, report_to=["tensorboard"])
    print("epoch  step  held-out loss  verdict")
    for epoch, step, loss, verdict in table:
        print(f"{epoch:5d} {step:5d} {loss:14.3f}  {verdict.outcome}")
    print(f"LAR of the unembedding at the end: {callback.monitor.readings[-1].main.lar:.3f}")
    print(callback.monitor.verdict)
    print(f"recorded: logalign report {folder / 'run'}")


if __name__ == "__main__":
    main()
