"""The benchmark's texts, as token arrays: Python's standard library, and the King James Bible from a Debian package.

Tokenized once by a byte-pair encoding of 1,024 types, trained on the training part of each text, and kept in the work
folder. Every tenth document is held out whole.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from logalign.demos import corpus

VOCABULARY = 1024
TEXTS = ("python", "prose")

Tokens = NDArray[np.int64]


def tokens_of(text: str, work: Path, *, tokenizer_of: str | None = None) -> tuple[Tokens, Tokens]:
    """The training and the held-out tokens of a text.

    Args:
        text: "python" or "prose".
        work: Folder in which they are kept.
        tokenizer_of: The text that the tokenizer was trained on, this one by default: fine-tuning meets new text with
            the old tokenizer.
    """
    owner = tokenizer_of or text
    path = work / f"tokens-{text}-by-{owner}.npz"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        tokenizer = corpus.train_tokenizer(_documents(owner), vocabulary=VOCABULARY)
        found = corpus.encode(tokenizer, _documents(text))
        draft = path.with_suffix(f".{os.getpid()}.npz")  # another process may make the same
        np.savez_compressed(draft, train=found.train.astype(np.int16), held_out=found.held_out.astype(np.int16))
        draft.replace(path)
    arrays = np.load(path)
    return arrays["train"].astype(np.int64), arrays["held_out"].astype(np.int64)


def _documents(text: str) -> corpus.Documents:
    if text == "python":
        return corpus.read_documents()
    prose = "\n".join(verse for _, verse in verses())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prose.txt"
        path.write_text(prose)
        return corpus.read_documents([path])


def verses() -> list[tuple[str, str]]:
    """The King James Bible, verse by verse: the short name of the book, and the verse."""
    program = shutil.which("bible")
    if program is None:
        raise SystemExit("the prose of the benchmark is Debian's package bible-kjv: apt-get install bible-kjv")
    said = subprocess.run([program, "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    found = [re.match(r"(?:([1-3]?[A-Za-z]+)[\d:]+ )?(.*)", line) for line in said.splitlines()]
    return [(match[1] or "", match[2]) for match in found if match]


def blocks(tokens: Tokens, context: int, *, count: int) -> Tokens:
    """Fixed held-out sequences [count, context + 1], spread evenly over the text."""
    starts = np.linspace(0, len(tokens) - context - 1, count).astype(np.int64)
    return tokens[starts[:, None] + np.arange(context + 1)]


def rare_types(tokens: Tokens, vocabulary: int = VOCABULARY) -> NDArray[np.bool_]:
    """Which token types are rare: those that, from the rarest up, make up half of the text."""
    counts = np.bincount(tokens, minlength=vocabulary)
    order = np.argsort(counts, kind="stable")
    rare = np.zeros(vocabulary, dtype=bool)
    rare[order[np.cumsum(counts[order]) <= len(tokens) / 2]] = True
    return rare
