"""Ranking: one quantity for all runs, an interval where one holds, and one bad run among many is left out by name."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from logalign.diagnosis.ranking import ESTIMATE, LAR, LOSS_AND_LAR, PASSES, interval, rank
from logalign.errors import InputError

DATA = Path(__file__).parents[1] / "data"


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
        lines.append(json.dumps({key: None if each != each else each for key, each in record.items()}))
    path.write_text("\n".join(lines) + "\n")
    return path


def order_of(*runs, **options):
    return [Path(each.run).stem for each in rank(runs, **options).runs]


def test_the_run_that_memorized_most_comes_last_though_its_training_loss_is_lowest(tmp_path):
    fresh = write(tmp_path / "fresh.jsonl", steps_per_pass=10_000, loss=1.6)
    some = write(tmp_path / "some.jsonl", steps_per_pass=100, loss=2.0, drop=0.2)
    much = write(tmp_path / "much.jsonl", steps_per_pass=50, loss=2.4, drop=0.3)
    found = rank([much, fresh, some])
    assert [each.run for each in found.runs] == [str(fresh), str(some), str(much)]
    assert found.quantity == ESTIMATE
    assert [each.score for each in found.runs] == pytest.approx([1.6, 2.0, 2.4], abs=0.06)


def test_an_interval_is_of_the_difference_to_the_first_run(tmp_path):
    runs = [write(tmp_path / f"{loss}.jsonl", steps_per_pass=100, loss=loss) for loss in (2.0, 2.5, 4.0)]
    first, second, third = rank(runs).runs
    assert (first.low, first.high) == (None, None)
    assert (second.low, second.high) == pytest.approx(interval(0.5, 0.0))
    assert (third.low, third.high) == pytest.approx(interval(2.0, 0.0))


def test_an_order_is_sure_where_scatter_does_not_explain_it(tmp_path):
    def sure(scatter):
        runs = [
            write(tmp_path / f"{loss}.jsonl", steps_per_pass=100, loss=loss, scatter=scatter) for loss in (2.0, 2.2)
        ]
        first, second = rank(runs).runs
        assert (second.low > 0) is first.is_sure
        return first.is_sure

    assert sure(0.01)
    assert not sure(0.2)


def test_in_classifiers_with_short_passes_loss_and_lar_decide(tmp_path):
    shape = {"n": 64, "m": 10}
    clean = write(tmp_path / "clean.jsonl", steps_per_pass=5, lar=0.74, loss=0.01, **shape)
    noisy = write(tmp_path / "noisy.jsonl", steps_per_pass=5, lar=0.60, loss=0.01, **shape)
    unfit = write(tmp_path / "unfit.jsonl", steps_per_pass=5, lar=0.74, loss=2.0, **shape)
    found = rank([unfit, noisy, clean])
    assert found.quantity == LOSS_AND_LAR
    assert [each.run for each in found.runs] == [str(clean), str(noisy), str(unfit)]
    assert {(each.low, each.high) for each in found.runs} == {(None, None)}
    assert [each.is_sure for each in found.runs] == [True, True, True]
    less = write(tmp_path / "less.jsonl", steps_per_pass=2, lar=0.60, loss=0.01, **shape)
    assert [each.is_sure for each in rank([clean, less]).runs] == [False, True]


def test_where_passes_are_too_short_to_see_fewer_come_first_and_nothing_is_sure(tmp_path):
    few = write(tmp_path / "few.jsonl", steps_per_pass=6, lar=0.5)
    many = write(tmp_path / "many.jsonl", steps_per_pass=3, lar=0.6)
    found = rank([many, few])
    assert found.quantity == PASSES
    assert [(each.run, each.is_sure) for each in found.runs] == [(str(few), False), (str(many), True)]
    same = write(tmp_path / "same.jsonl", steps_per_pass=3, lar=0.9)
    found = rank([many, same])
    assert (found.quantity, found.runs[0].is_sure) == (LAR, False)
    assert found.runs[0].run == str(same)


def test_losses_compare_between_models_of_other_width(tmp_path):
    wide = write(tmp_path / "wide.jsonl", steps_per_pass=50, n=128, loss=2.0)
    narrow = write(tmp_path / "narrow.jsonl", steps_per_pass=50, n=32, loss=2.5)
    assert order_of(narrow, wide) == ["wide", "narrow"]


def test_a_longer_run_is_judged_where_the_shorter_one_ends(tmp_path):
    long = write(tmp_path / "long.jsonl", readings=80, steps_per_pass=50, loss=2.0, drop=0.1)
    short = write(tmp_path / "short.jsonl", readings=40, steps_per_pass=50, loss=2.0, drop=0.1)
    a, b = rank([long, short]).runs
    assert (a.step, b.step) == (390, 390)
    assert a.score == pytest.approx(b.score)


def test_a_run_killed_early_is_left_out_and_the_others_are_ordered():
    runs = [DATA / "killed" / f"{name}.jsonl" for name in ("a", "b", "killed")]
    found = rank(runs)
    assert [each.run for each in found.runs] == [str(run) for run in runs[:2]]
    assert found.left_out == {str(runs[2]): "short: 3 readings of the layer, fewer than 10"}
    records = found.records()
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    assert [each["left_out"] for each in records] == [None, None, found.left_out[str(runs[2])]]


def bad_runs(folder):
    """Runs of which each is bad in its own way, and what is said of it."""
    yield write(folder / "killed.jsonl", readings=12, steps_per_pass=100), "short: it ends at step 110, where half"
    yield write(folder / "torn.jsonl", readings=3, steps_per_pass=100), "short: 3 readings of the layer, fewer than 10"
    yield write(folder / "coarse.jsonl", readings=10, every=100, steps_per_pass=100), "short: 4 readings up to step 390"
    yield write(folder / "lost.jsonl", steps_per_pass=100, loss=math.nan), "0 readings with loss, fewer than 10"
    yield write(folder / "timeless.jsonl"), "0 readings with epoch, fewer than 10"
    yield write(folder / "wide.jsonl", steps_per_pass=100, m=200), "m = 200, others have 100"
    diverged = write(folder / "diverged.jsonl", steps_per_pass=100)
    lines = [json.loads(line) for line in diverged.read_text().splitlines()]
    end_badly(diverged, lines, {"loss": None, "lar": None, "nonfinite": 3}, 5)
    yield diverged, "diverged: NaN or infinite values at step 390"
    unlogged = folder / "nan.jsonl"
    end_badly(unlogged, lines, {"loss": None}, 20)
    yield unlogged, "diverged: no finite loss after step 190"
    back = folder / "back.jsonl"
    end_badly(back, lines, {"epoch": 0.5}, 5)
    yield back, "passes over the data that go back"
    damaged = folder / "damaged.jsonl"
    damaged.write_text("{}\n{}\n")
    yield damaged, "found nothing"
    yield folder / "nowhere", "expected a run folder, a JSONL or a CSV file, found nothing there"


def end_badly(path, lines, fields, count):
    ends = [*lines[:-count], *({**line, **fields} for line in lines[-count:])]
    path.write_text("".join(json.dumps(line) + "\n" for line in ends))


def test_one_bad_run_among_many_is_left_out_whatever_is_wrong_with_it(tmp_path):
    good = [write(tmp_path / f"{i}.jsonl", steps_per_pass=100, loss=2.0 + i, drop=0.1) for i in range(3)]
    for bad, why in bad_runs(tmp_path):
        found = rank([bad, *good])
        assert [each.run for each in found.runs] == [str(run) for run in good], why
        assert list(found.left_out) == [str(bad)]
        assert why in found.left_out[str(bad)]
        assert found.at == 390


def test_a_run_without_the_layer_is_left_out(tmp_path):
    good = [write(tmp_path / f"{i}.jsonl", steps_per_pass=100, site="head") for i in range(2)]
    bad = write(tmp_path / "bad.jsonl", steps_per_pass=100, site="block")
    found = rank([*good, bad], site="head")
    assert found.left_out == {str(bad): "short: 0 readings of the layer, fewer than 10"}


def test_a_run_without_lar_is_left_out_only_where_lar_is_needed(tmp_path):
    good = [write(tmp_path / f"{i}.jsonl", steps_per_pass=5, lar=0.5 + i / 10, n=64, m=10) for i in range(3)]
    bad = write(tmp_path / "bad.jsonl", steps_per_pass=5, lar=math.nan, n=64, m=10)
    assert rank([*good, bad]).left_out == {str(bad): "0 readings with a defined LAR, fewer than 10"}
    long = [write(tmp_path / f"{i}.jsonl", steps_per_pass=100, lar=math.nan if i else 0.5) for i in range(3)]
    assert not rank(long).left_out


def test_a_few_good_losses_do_not_leave_out_the_others(tmp_path):
    runs = [write(tmp_path / f"{i}.jsonl", lar=0.5 + i / 10, **({"loss": math.nan} if i else {})) for i in range(4)]
    found = rank(runs)
    assert (found.quantity, dict(found.left_out)) == (LAR, {})
    assert [each.run for each in found.runs] == [str(run) for run in reversed(runs)]
    assert not any(each.is_sure for each in found.runs[:-1])


def test_passes_are_not_asked_of_a_run_whose_samples_have_not_come_back(tmp_path):
    fresh = write(tmp_path / "fresh.jsonl", drift_reason="no sample has come back so far", loss=1.5)
    repeats = write(tmp_path / "repeats.jsonl", steps_per_pass=100, drop=0.1)
    found = rank([repeats, fresh])
    assert (found.quantity, [each.run for each in found.runs]) == (ESTIMATE, [str(fresh), str(repeats)])


def test_what_cannot_be_compared_is_refused(tmp_path):
    run = write(tmp_path / "run.jsonl", steps_per_pass=100)
    with pytest.raises(InputError, match="expected at least two runs to compare, found 1"):
        rank([run])
    with pytest.raises(InputError, match=r"expected different runs, found .*run\.jsonl twice"):
        rank([run, run])
    with pytest.raises(
        InputError,
        match=r"expected at least two runs that compare, found 1 \(.*short\.jsonl: short: 3 readings of the layer",
    ):
        rank([run, write(tmp_path / "short.jsonl", readings=3)])
    with pytest.raises(InputError, match=r"other\.jsonl: m = 200, others have 100"):
        rank([run, write(tmp_path / "other.jsonl", m=200)])
    with pytest.raises(InputError, match=r"narrow\.jsonl: n = 32, others have 64"):
        rank([write(tmp_path / "plain.jsonl"), write(tmp_path / "narrow.jsonl", n=32)])
    with pytest.raises(InputError, match=r"sparse\.jsonl: short: 4 readings up to step 390, fewer than 10"):
        rank([run, write(tmp_path / "sparse.jsonl", every=100)])
    with pytest.raises(InputError, match=r"none: expected a run folder, .* found nothing there"):
        rank([run, tmp_path / "none"])
    with pytest.raises(InputError, match=r"expected runs with at least 10 readings of loss and epoch, or of LAR"):
        rank([write(tmp_path / f"{i}.jsonl", lar=math.nan) for i in range(2)])


def test_runs_of_other_batch_sizes_are_aligned_on_tokens(tmp_path):
    small = write(tmp_path / "small.jsonl", readings=80, steps_per_pass=200, loss=2.0, drop=0.1)
    large = write(tmp_path / "large.jsonl", readings=80, steps_per_pass=50, loss=2.0, drop=0.1)
    for path, tokens in ((small, 10), (large, 40)):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line | {"tokens_seen": tokens * line["step"]}) + "\n" for line in lines))
    by_tokens = rank([small, large], align="tokens")
    assert by_tokens.at == 7900
    assert {each.run: each.step for each in by_tokens.runs} == {str(small): 790, str(large): 190}
    assert {each["align"] for each in by_tokens.records()} == {"tokens"}
    by_epochs = rank([small, large], align="epoch")
    assert by_epochs.at == 3.95
    assert {each.run: each.step for each in by_epochs.runs} == {str(small): 790, str(large): 190}
    assert rank([small, large]).at == 790


def test_runs_that_cannot_be_aligned_are_refused(tmp_path):
    runs = [write(tmp_path / f"{i}.jsonl", steps_per_pass=None) for i in range(2)]
    with pytest.raises(InputError, match=r"0\.jsonl: no tokens_seen recorded to align it on"):
        rank(runs, align="tokens")
    with pytest.raises(InputError, match=r"no epoch recorded to align it on"):
        rank(runs, align="epoch")
    with pytest.raises(InputError, match="align: expected one of step, tokens, epoch, found 'time'"):
        rank(runs, align="time")


def test_intervals_widen_with_the_difference_and_hold_zero_only_where_the_order_is_not_sure():
    differences = np.linspace(0, 5, 11)
    for low, high in (interval(float(each), 0.1) for each in differences):
        assert low < high
    highs = [interval(float(each), 0.1)[1] for each in differences]
    assert all(a < b for a, b in pairwise(highs))
    assert interval(0.26, 0.1)[0] > 0 > interval(0.25, 0.1)[0]
