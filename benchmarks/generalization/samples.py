"""Small data sets of whole samples, from what packages ship or what a formula gives: images, tables, texts.

Every set is given as training samples, of whose labels a share is drawn anew, some more of the same kind that a user
would keep apart (a twentieth of them), and held-out samples with true labels.
"""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.generalization.data import verses

WORDS, VOCABULARY = 30, 2000
BOOKS = ("Ge", "Exo", "Num", "Psa", "Isa", "Jer", "Eze", "Acts")
PACKAGES = ("asyncio", "email", "idlelib", "unittest", "multiprocessing", "ctypes", "tkinter", "xml")

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Inputs and targets of the three parts, and how many classes, outputs or words there are."""

    train: tuple[Tensor, Tensor]
    kept_apart: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    outputs: int


def samples_of(settings: dict[str, Any], seed: int) -> Samples:
    """The data of one run."""
    name, count = settings["data"], settings["samples"]
    generator = np.random.default_rng([seed, 17])
    x, y = SOURCES[name](generator)
    order = generator.permutation(len(x))
    x, y = x[order], y[order]
    apart = max(1, round(count / 20))
    if len(x) < count + apart + 50:
        raise ValueError(f"{name}: expected at least {count + apart + 50} samples, found {len(x)}")
    labels = y.copy()
    drawn = generator.permutation(count)[: round(settings["noise"] * count)]
    if labels.ndim == 1:
        labels[drawn] = generator.permutation(labels[drawn]) if labels.dtype.kind == "f" else _any(generator, y, drawn)
    else:
        labels[drawn] = labels[generator.permutation(drawn)]
    inputs = torch.tensor(x)
    held = slice(count + apart, count + apart + 1500)
    parts = [
        (inputs[:count], torch.tensor(labels[:count])),
        *((inputs[p], torch.tensor(y[p])) for p in (slice(count, count + apart), held)),
    ]
    outputs = int(y.max()) + 1 if y.dtype.kind == "i" else (1 if y.ndim == 1 else y.shape[1])
    return Samples(train=parts[0], kept_apart=parts[1], held_out=parts[2], outputs=outputs)


def _any(generator: np.random.Generator, y: Array, drawn: Array) -> Array:
    return generator.integers(0, int(y.max()) + 1, len(drawn))


def _digits(_: np.random.Generator) -> tuple[Array, Array]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16.0).astype(np.float32)[:, None], data.target


def _scaled(x: Array) -> Array:
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32)


def _cancer(_: np.random.Generator) -> tuple[Array, Array]:
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    return _scaled(data.data), data.target.astype(np.int64)


def _wine(_: np.random.Generator) -> tuple[Array, Array]:
    from sklearn.datasets import load_wine

    data = load_wine()
    return _scaled(data.data), data.target.astype(np.int64)


def _diabetes(_: np.random.Generator) -> tuple[Array, Array]:
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    return _scaled(data.data), _scaled(data.target)


def _blobs(generator: np.random.Generator) -> tuple[Array, Array]:
    from sklearn.datasets import make_classification

    x, y = make_classification(
        6000, 20, n_informative=10, n_classes=8, class_sep=2.0, random_state=int(generator.integers(2**31))
    )
    return _scaled(x), y.astype(np.int64)


def _curves(generator: np.random.Generator) -> tuple[Array, Array]:
    x = generator.uniform(size=(6000, 10))
    y = np.sin(np.pi * x[:, 0] * x[:, 1]) + 2 * (x[:, 2] - 0.5) ** 2 + x[:, 3] + 0.5 * x[:, 4]
    return _scaled(x), _scaled(y + 0.2 * generator.standard_normal(len(y)))


def _tags(generator: np.random.Generator) -> tuple[Array, Array]:
    """Fifty tags, each given where a direction of its own is in the upper twentieth."""
    x = generator.standard_normal((6000, 30))
    tendency = x @ generator.standard_normal((30, 50)) / np.sqrt(30) + 0.2 * generator.standard_normal((6000, 50))
    return x.astype(np.float32), (tendency > np.quantile(tendency, 0.95)).astype(np.float32)


def _books(_: np.random.Generator) -> tuple[Array, Array]:
    """Verses, and which of eight books each is from."""
    found = [(verse, BOOKS.index(book)) for book, verse in verses() if book in BOOKS]
    return _coded([re.findall(r"[a-z]+", verse.lower()) for verse, _ in found]), np.array([book for _, book in found])


def _packages(_: np.random.Generator) -> tuple[Array, Array]:
    """Thirty words in a row of Python's standard library, and which of eight packages they are from."""
    texts, labels = [], []
    for label, package in enumerate(PACKAGES):
        paths = sorted((Path(sysconfig.get_paths()["stdlib"]) / package).rglob("*.py"))
        words = [word for path in paths for word in _words_of(path)]
        for start in range(0, len(words) - WORDS, WORDS):
            texts.append(words[start : start + WORDS])
            labels.append(label)
    return _coded(texts), np.array(labels)


def _languages(generator: np.random.Generator) -> tuple[Array, Array]:
    """Thirty words of Python or of English prose, and which of the two they are."""
    code, _ = _packages(generator)
    prose, _ = _books(generator)
    count = min(len(code), len(prose))
    return np.concatenate([code[:count], prose[:count]]), np.repeat(np.array([0, 1]), count)


def _words_of(path: Path) -> list[str]:
    return re.findall(r"[a-z]+", path.read_text(encoding="utf-8", errors="ignore").lower())


def _coded(texts: Sequence[Sequence[str]]) -> Array:
    """Numbers of words, the more frequent the lower; 0 fills up, 1 is a rare word."""
    counts = Counter(word for text in texts for word in text)
    known = {word: 2 + i for i, (word, _) in enumerate(counts.most_common(VOCABULARY - 2))}
    coded = np.zeros((len(texts), WORDS), dtype=np.int64)
    for row, text in zip(coded, texts, strict=True):
        found = [known.get(word, 1) for word in text[:WORDS]]
        row[: len(found)] = found
    return coded


SOURCES = {
    "digits": _digits,
    "cancer": _cancer,
    "wine": _wine,
    "diabetes": _diabetes,
    "blobs": _blobs,
    "curves": _curves,
    "tags": _tags,
    "books": _books,
    "packages": _packages,
    "languages": _languages,
}
