"""Text for the language-model demo: read it, train a small byte-pair tokenizer on it, split it into token arrays.

By default the text is the source of Python's own standard library, a few million tokens of real text without a
download. A fixed seed shuffles the documents. Every tenth document is held out whole, so held-out and training text
share no document.

Shapes: token arrays are one-dimensional, int64. A document ends with the token `<|end|>`.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from logalign.errors import InputError, MissingExtraError

try:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
except ImportError as error:
    raise MissingExtraError('the demos need tokenizers: pip install "logalign[demo]"') from error

Tokens = NDArray[np.int64]

END = "<|end|>"
VOCABULARY = 2048
HELD_OUT_EVERY = 10
# A split by file fails for a few long files, so they are first cut into passages.
FEW_FILES = 20
PASSAGE_CHARACTERS = 16_384
# Tests have long tables of data, and installed packages differ between machines, so both are left out.
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Documents:
    """Texts in the order of the corpus, their origin, and a fingerprint of their contents."""

    texts: tuple[str, ...]
    source: str
    fingerprint: str


@dataclass(frozen=True)
class Corpus:
    """Token arrays of a corpus: `train` and `held_out` share no document."""

    train: Tokens
    held_out: Tokens
    vocabulary: int


def read_documents(paths: Sequence[Path] | None = None) -> Documents:
    """Read text files, or the standard library's sources, in an order that depends only on their contents.

    Args:
        paths: UTF-8 text files. None means the sources of the running Python's standard library.

    Raises:
        InputError: a file is missing, is not a file, is empty or is not UTF-8 text.
    """
    if paths is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [path for path in sorted(root.rglob("*.py")) if not NOT_LIBRARY & set(path.relative_to(root).parts)]
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
        texts = [text for text in texts if text.strip()]
        source = f"{len(texts)} source files of Python's standard library"
    else:
        texts = [_read_text(path) for path in paths]
        source = f"{len(texts)} file{'s' if len(texts) > 1 else ''} ({', '.join(path.name for path in paths[:3])}"
        source += ", ...)" if len(paths) > 3 else ")"
    if not texts:
        raise InputError("no text was found: expected text files; name some with --text FILE...")
    if len(texts) < FEW_FILES:
        texts = [passage for text in texts for passage in _passages(text)]
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    random.Random(0).shuffle(texts)
    return Documents(tuple(texts), source, digest.hexdigest()[:16])


def tokenize(documents: Documents) -> Corpus:
    """Train a byte-level BPE on the training documents and encode both parts with it."""
    return encode(train_tokenizer(documents), documents)


def train_tokenizer(documents: Documents, *, vocabulary: int = VOCABULARY) -> Tokenizer:
    """Train a byte-level BPE on the training documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_split(documents)[0], trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Documents) -> Corpus:
    """Encode the training and the held-out documents."""
    end = tokenizer.token_to_id(END)

    def tokens_of(texts: tuple[str, ...]) -> Tokens:
        pieces = [np.array([*encoding.ids, end], dtype=np.int64) for encoding in tokenizer.encode_batch(list(texts))]
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)

    train, held_out = _split(documents)
    return Corpus(tokens_of(train), tokens_of(held_out), tokenizer.get_vocab_size())


def _split(documents: Documents) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the training documents and the held-out documents."""
    train = tuple(text for i, text in enumerate(documents.texts) if i % HELD_OUT_EVERY)
    return train, documents.texts[::HELD_OUT_EVERY]


def _read_text(path: Path) -> str:
    if not path.exists():
        raise InputError(f"--text {path}: there is no such file; name UTF-8 text files")
    if not path.is_file():
        raise InputError(f"--text {path}: expected a text file, found a folder; name the files in it")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"--text {path}: cannot be read ({error.strerror}); name UTF-8 text files") from error
    if b"\0" in data:
        raise InputError(f"--text {path}: expected UTF-8 text, found a binary file; name text files")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"--text {path}: expected UTF-8 text, found the byte 0x{data[error.start]:02x} at position {error.start}; "
            "name text files, or convert this one to UTF-8"
        ) from error
    if not text.strip():
        raise InputError(f"--text {path}: expected text, found an empty file; name a longer one")
    return text


def _passages(text: str) -> list[str]:
    """Cut a text at line ends, and inside longer lines, into passages of about `PASSAGE_CHARACTERS`."""
    passages: list[str] = []
    start = 0
    while start < len(text):
        stop = start + PASSAGE_CHARACTERS
        if stop < len(text):
            line_end = text.rfind("\n", start, stop)
            stop = line_end + 1 if line_end > start else stop
        passages.append(text[start:stop])
        start = stop
    return passages
