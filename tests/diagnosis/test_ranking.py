"""Ranking: by the estimated held-out loss where passes can be seen, by LAR elsewhere; bad comparisons are refused."""

import json
import math

import numpy as np
import pytest

from logalign.diagnosis.ranking import rank
from logalign.errors import InputError, RunError


def write(path, *, readings=40, every=10, steps_per_pass=None, loss=2.0, drop=0.0, lar=0.6, scatter=0.0, **fields):
    """A run whose training loss drops by `drop` with every pass."""
    random = np.random.default_rng(0)
    lines = []
    for i in range(readings):
        step = i * every
        epoch = step / steps_per_pass if steps_per_pass else None
        value = loss - drop * math.floor(epoch or 0)
        record = {"step": step, "loss": value + scatter * random.standard_normal(), "epoch": epoch}
        record |= {"lar": lar + scatter * random.standard_normal(), "n": 64, "m": 100, **fields}
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_run_that_memorized_most_comes_last_though_its_training_loss_is_lowest(tmp_path):
    fresh = write(tmp_path / "fresh.jsonl", steps_per_pass=10_000, loss=1.6)
    some = write(tmp_path / "some.jsonl", steps_per_pass=100, loss=2.0, drop=0.2)
    much = write(tmp_path / "much.jsonl", steps_per_pass=50, loss=2.4, drop=0.3)
    found = rank([much, fresh, some])
    assert [each.run for each in found] == [str(fresh), str(some), str(much)]
    assert [each.quantity for each in found] == ["estimated held-out loss"] * 3
    assert [each.score for each in found] == pytest.approx([1.6, 2.0, 2.4], abs=0.06)


def test_where_passes_are_too_short_to_see_the_higher_lar_comes_first(tmp_path):
    clean = write(tmp_path / "clean.jsonl", steps_per_pass=5, lar=0.74, lar_vocab_centered=0.72)
    noisy = write(tmp_path / "noisy.jsonl", steps_per_pass=5, lar=0.75, lar_vocab_centered=0.60)
    found = rank([noisy, clean])
    assert [(each.run, each.quantity) for each in found] == [
        (str(clean), "vocabulary-centered LAR"),
        (str(noisy), "vocabulary-centered LAR"),
    ]
    plain = write(tmp_path / "plain.jsonl", steps_per_pass=5, lar=0.9)
    assert [each.run for each in rank([clean, noisy, plain])] == [str(plain), str(noisy), str(clean)]


def test_losses_compare_between_models_of_other_width(tmp_path):
    wide = write(tmp_path / "wide.jsonl", steps_per_pass=50, n=128, loss=2.0)
    narrow = write(tmp_path / "narrow.jsonl", steps_per_pass=50, n=32, loss=2.5)
    assert [each.run for each in rank([narrow, wide])] == [str(wide), str(narrow)]


def test_a_longer_run_is_judged_where_the_shorter_one_ends(tmp_path):
    long = write(tmp_path / "long.jsonl", readings=80, steps_per_pass=50, loss=2.0, drop=0.1)
    short = write(tmp_path / "short.jsonl", readings=40, steps_per_pass=50, loss=2.0, drop=0.1)
    a, b = rank([long, short])
    assert (a.step, b.step) == (390, 390)
    assert a.score == pytest.approx(b.score)


def test_the_interval_is_wider_where_readings_scatter(tmp_path):
    runs = [write(tmp_path / f"{s}.jsonl", steps_per_pass=50, scatter=s) for s in (0.001, 0.1)]
    widths = {each.run: each.high - each.low for each in rank(runs)}
    assert widths[str(runs[1])] > 20 * widths[str(runs[0])]
    for each in rank(runs):
        assert each.low <= each.score <= each.high
        assert json.loads(json.dumps(each.record(), allow_nan=False))["run"] == each.run


def test_what_cannot_be_compared_is_refused(tmp_path):
    run = write(tmp_path / "run.jsonl")
    with pytest.raises(InputError, match="expected at least two runs to compare, found 1"):
        rank([run])
    with pytest.raises(InputError, match=r"expected different runs, found .*run\.jsonl twice"):
        rank([run, run])
    with pytest.raises(InputError, match=r"short\.jsonl: expected at least 10 readings .* found 3"):
        rank([run, write(tmp_path / "short.jsonl", readings=3)])
    with pytest.raises(InputError, match=r"expected layers of one fan-in, .* found n = 32, 64"):
        rank([run, write(tmp_path / "narrow.jsonl", n=32)])
    with pytest.raises(InputError, match=r"expected layers of one vocabulary: .* found m = 100, 200"):
        rank([run, write(tmp_path / "other.jsonl", m=200)])
    with pytest.raises(InputError, match=r"sparse\.jsonl: expected at least 10 readings up to step 390"):
        rank([run, write(tmp_path / "sparse.jsonl", every=100)])
    with pytest.raises(RunError, match="found nothing there"):
        rank([run, tmp_path / "none"])


def test_runs_of_other_batch_sizes_are_aligned_on_tokens(tmp_path):
    small = write(tmp_path / "small.jsonl", readings=80, steps_per_pass=200, loss=2.0, drop=0.1)
    large = write(tmp_path / "large.jsonl", readings=80, steps_per_pass=50, loss=2.0, drop=0.1)
    for path, tokens in ((small, 10), (large, 40)):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line | {"tokens_seen": tokens * line["step"]}) + "\n" for line in lines))
    by_tokens = {each.run: each for each in rank([small, large], align="tokens")}
    assert {each.at for each in by_tokens.values()} == {7900}
    assert (by_tokens[str(small)].step, by_tokens[str(large)].step) == (790, 190)
    assert by_tokens[str(large)].record()["align"] == "tokens"
    by_epochs = {each.run: each for each in rank([small, large], align="epoch")}
    assert {each.at for each in by_epochs.values()} == {3.95}
    assert by_epochs[str(large)].step == 190
    assert {each.at for each in rank([small, large])} == {790}


def test_runs_that_cannot_be_aligned_are_refused(tmp_path):
    runs = [write(tmp_path / f"{i}.jsonl", steps_per_pass=None) for i in range(2)]
    with pytest.raises(
        InputError, match=r"0\.jsonl: expected readings with tokens_seen to align the runs on, found none"
    ):
        rank(runs, align="tokens")
    with pytest.raises(InputError, match=r"expected readings with epoch"):
        rank(runs, align="epoch")
    with pytest.raises(InputError, match="align: expected one of step, tokens, epoch, found 'time'"):
        rank(runs, align="time")
