"""Supervised fine-tuning with TRL's SFTTrainer, packed sequences and all: python examples/sft_trainer.py

A small Llama learns the functions of Python's `statistics` module. TRL's loss never forms the logits; logalign measures
the unembedding all the same.
"""

import ast
import statistics
import tempfile
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from logalign.integrations.transformers import LogAlignCallback


def functions():
    """The source of each function and class of the module."""
    source = Path(statistics.__file__).read_text(encoding="utf-8")
    nodes = ast.parse(source).body
    return [ast.get_source_segment(source, node) for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def tokenizer_of(texts):
    """A byte-level BPE of these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def main():
    """Train, and say what was measured."""
    set_seed(0)
    folder = Path(tempfile.mkdtemp(prefix="logalign-sft-"))
    texts = functions()
    tokenizer = tokenizer_of(texts)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.eos_token_id,
        )
    )
    arguments = SFTConfig(
        output_dir=str(folder),
        max_length=128,
        packing=True,
        per_device_train_batch_size=4,
        num_train_epochs=4,
        learning_rate=2e-3,
        logging_steps=5,
        report_to=["tensorboard"],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    )
    callback = LogAlignCallback(run=folder / "run")
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    first, last = callback.monitor.readings[0].main, callback.monitor.readings[-1].main
    print(f"step {first.step}: LAR {first.lar:.3f}, loss {first.loss:.3f}")
    print(f"step {last.step}: LAR {last.lar:.3f}, loss {last.loss:.3f}")
    print(callback.monitor.verdict)
    print(f"recorded: logalign report {folder / 'run'}")


if __name__ == "__main__":
    main()
