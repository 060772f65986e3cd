"""Text of the language-model demo: what is read, how it is split, what is refused."""

from pathlib import Path

import numpy as np
import pytest

from logalign.demos.corpus import END, HELD_OUT_EVERY, read_documents, tokenize
from logalign.errors import InputError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Thirty files, each with a word of its own."""
    names = [f"word{i:02d}" for i in range(30)]
    return [write(tmp_path / f"{name}.txt", f"{name} is a word of its own, {name}!\n" * 20) for name in names]


def test_every_file_is_on_one_side_only(files):
    documents = read_documents(files)
    held_out = documents.texts[::HELD_OUT_EVERY]
    assert sorted(documents.texts) == sorted(path.read_text() for path in files)
    assert len(held_out) == 3
    corpus = tokenize(documents)
    assert corpus.vocabulary > 257
    assert len(corpus.train) > len(corpus.held_out) > 0
    assert corpus.train.max() < corpus.vocabulary
    # One end token a document; it is token 0, the first of the special ones.
    assert END == "<|end|>"
    assert (corpus.train == 0).sum() == 27
    assert (corpus.held_out == 0).sum() == 3


def test_the_same_text_gives_the_same_tokens(files):
    first, second = (tokenize(read_documents(files)) for _ in range(2))
    np.testing.assert_array_equal(first.train, second.train)
    np.testing.assert_array_equal(first.held_out, second.held_out)


def test_the_fingerprint_is_of_the_contents(files):
    before = read_documents(files).fingerprint
    assert read_documents(files).fingerprint == before
    write(files[3], "something else")
    assert read_documents(files).fingerprint != before


def test_one_long_file_is_split_into_passages(tmp_path):
    lines = [f"line {i} of a long text\n" for i in range(10_000)]
    documents = read_documents([write(tmp_path / "long.txt", "".join(lines))])
    assert len(documents.texts) > HELD_OUT_EVERY
    assert sorted(line for text in documents.texts for line in text.splitlines(keepends=True)) == sorted(lines)


def test_a_line_longer_than_a_passage_is_cut(tmp_path):
    documents = read_documents([write(tmp_path / "line.txt", "a" * 50_000)])
    assert sum(len(text) for text in documents.texts) == 50_000
    assert len(documents.texts) == 4


def test_the_standard_library_is_read_by_default():
    documents = read_documents()
    assert len(documents.texts) > 300
    assert "Python's standard library" in documents.source
    assert any("class JSONDecoder" in text for text in documents.texts)


def test_refuses_what_is_no_text(tmp_path):
    binary = tmp_path / "image.png"
    binary.write_bytes(b"\x89PNG\r\n\x00\x00")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\xe9".encode("latin-1"))
    empty = write(tmp_path / "empty.txt", " \n\t\n")
    with pytest.raises(InputError, match=r"image\.png: expected UTF-8 text, found a binary file"):
        read_documents([binary])
    with pytest.raises(InputError, match=r"latin\.txt: expected UTF-8 text, found the byte 0xe9 at position 3"):
        read_documents([latin])
    with pytest.raises(InputError, match=r"empty\.txt: expected text, found an empty file"):
        read_documents([empty])
    with pytest.raises(InputError, match=r"missing\.txt: there is no such file"):
        read_documents([tmp_path / "missing.txt"])
    with pytest.raises(InputError, match="found a folder"):
        read_documents([tmp_path])
    with pytest.raises(InputError, match="no text was found"):
        read_documents([])
