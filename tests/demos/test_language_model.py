"""The language-model demo on a tiny text and few steps."""

import itertools
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console

from logalign import open_run
from logalign.demos import language_model
from logalign.demos.corpus import Corpus
from logalign.demos.training import threads
from logalign.errors import InputError


@pytest.fixture
def console() -> Console:
    return Console(file=StringIO(), width=200)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """About 60,000 words that do not compress to nothing."""
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefghij"), 4)) for _ in range(3000)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(" ".join(generator.choice(words, 12)) for _ in range(5000)))
    return path


def test_a_short_run_compares_both_runs(tmp_path, text, console):
    out = tmp_path / "demo"
    with threads(1):  # two threads on a machine that is busy with something else wait for each other
        result = language_model.run(out=out, text=[text], steps=12, unique_tokens=4500, console=console)
    baseline, repeated = (open_run(path) for path in result.runs)
    for run in (baseline, repeated):
        columns = run.columns()
        assert list(columns["step"]) == [0, 10]
        assert np.isfinite(columns["val_loss"]).all()
        assert columns["tokens"][0] == 16 * 128
    assert repeated.columns()["epoch"][-1] == pytest.approx(5.0)
    assert baseline.columns()["epoch"][-1] < 1
    assert baseline.columns()["lar"][0] != repeated.columns()["lar"][0]
    assert "proves nothing" in result.summary
    assert result.report.read_text().count("<svg") == 2

    log = (result.runs[1] / "readings.jsonl").read_bytes()
    again = language_model.run(out=out, text=[text], steps=12, unique_tokens=4500, console=console)
    assert (result.runs[1] / "readings.jsonl").read_bytes() == log
    assert again.summary == result.summary

    longer = tmp_path / "longer.txt"
    longer.write_text(text.read_text() + "more")
    with pytest.raises(InputError, match="other settings: text"):
        language_model.run(out=out, text=[longer], steps=12, unique_tokens=4500, console=console)


def test_batches_repeat_every_token_once_an_epoch_and_start_anywhere():
    tokens = np.arange(128 * 40 + 1)
    source = language_model.batches(tokens, seed=0, start=0)
    first = list(itertools.islice(source, 5))
    inputs = torch.cat([part[0].flatten() for part in first[:2]])
    assert len(set(inputs.tolist())) == 2 * 16 * 128
    for given, target, _ in first:
        assert torch.equal(given + 1, target)
    assert [part[2] for part in first] == [0.0, 0.5, 1.0, 1.5, 2.0]
    for start in (1, 2, 3):
        later = next(language_model.batches(tokens, seed=0, start=start))
        assert torch.equal(later[0], first[start][0])
        assert later[2] == first[start][2]


@pytest.mark.parametrize(
    ("train", "held_out", "unique", "message"),
    [
        (2048 * 5 + 1, 5000, 3000, None),
        (
            2048 * 5,
            5000,
            3000,
            "5 steps on fresh text need 10,241 training tokens, found 10,240 .*; .* at most 4 steps",
        ),
        (1000, 5000, 3000, "need 10,241 training tokens, found 1,000 .*; .* too short for any training"),
        (2048 * 5 + 1, 5000, 20_000, "--unique-tokens: expected at most the 10,241 training tokens .* found 20,000"),
        (0, 5000, 3000, "need 10,241 training tokens, found 0 .*; .* too short for any training"),
        (2048 * 5 + 1, 4000, 3000, "4,128 tokens have to be held out, a tenth of the text, found 4,000"),
    ],
)
def test_a_text_that_is_too_short_says_what_is_needed(train, held_out, unique, message):
    corpus = Corpus(np.zeros(train, dtype=np.int64), np.zeros(held_out, dtype=np.int64), 2048)
    if message is None:
        language_model.check_length(corpus, steps=5, unique_tokens=unique)
    else:
        with pytest.raises(InputError, match=message):
            language_model.check_length(corpus, steps=5, unique_tokens=unique)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"steps": 0}, "--steps: expected at least 1, found 0"),
        ({"steps": 10_000}, "text too short: 10000 steps on fresh text need"),
        ({"unique_tokens": 2048}, "--unique-tokens: expected more than the 2,048 tokens of one step, found 2,048"),
        ({"device": "toaster"}, "--device toaster"),
    ],
)
def test_bad_options_write_nothing(tmp_path, text, console, option, message):
    with pytest.raises(InputError, match=message):
        language_model.run(out=tmp_path / "demo", text=[text], console=console, **{"steps": 5, **option})
    assert not (tmp_path / "demo").exists()
