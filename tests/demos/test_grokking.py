"""The grokking demo: its data, its network, its bad input; generalizing itself is a slow test."""

from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console

from logalign import open_run
from logalign.demos import grokking
from logalign.errors import InputError, LogAlignWarning

CPU = torch.device("cpu")


@pytest.fixture
def console() -> Console:
    return Console(file=StringIO(), width=200)


def test_pairs_are_all_pairs_once_in_two_halves():
    pairs = grokking.all_pairs(7, seed=0, device=CPU)
    both = torch.cat([pairs.train, pairs.held_out])
    labels = torch.cat([pairs.train_labels, pairs.held_out_labels])
    assert sorted(map(tuple, both.tolist())) == [(a, b) for a in range(7) for b in range(7)]
    assert torch.equal(both.sum(dim=1) % 7, labels)
    assert len(pairs.train) == 24
    assert not torch.equal(pairs.train, grokking.all_pairs(7, seed=1, device=CPU).train)


def test_a_short_run_records_k_accuracies_and_counts(tmp_path, console):
    result = grokking.run(out=tmp_path / "demo", p=11, width=16, steps=21, console=console)
    columns = grokking.with_effective_dims(open_run(result.runs[0]).columns())
    assert list(columns["step"]) == [0, 10, 20]
    assert (columns["m"] == 11).all()
    assert (columns["n"] == 16).all()
    np.testing.assert_allclose(columns["effective_dim"], 16 ** (2 * (1 - columns["lar"])), rtol=1e-9)
    assert (columns["effective_dim_centered"] >= 1).all()
    # Nothing generalizes yet: the dimension is undefined, and the log says so with null.
    assert np.isnan(columns["dimension"][columns["margin"] <= 0]).all()
    assert result.summary.count(". ") == 1
    assert "<svg" in result.report.read_text()


def test_accuracy_and_dimension_agree_with_a_direct_count(tmp_path, console):
    """A network that is right by construction: every logit column is the wave of its class."""
    pairs = grokking.all_pairs(11, seed=0, device=CPU)

    class Right(torch.nn.Module):
        def forward(self, numbers):
            difference = numbers.sum(dim=1, keepdim=True) - torch.arange(11)
            return torch.cos(2 * torch.pi * 3 * difference / 11)

    model = Right()
    seen = grokking._check(model, pairs, model(pairs.train))
    assert seen["train_acc"] == seen["test_acc"] == 1.0
    assert seen["dimension"] == seen["dimension_additive"] == seen["dimension_energy"] == 2.0


def test_a_diverged_network_is_recorded_and_not_an_error(tmp_path, console):
    with pytest.warns(LogAlignWarning, match="no LAR"):
        result = grokking.run(out=tmp_path / "demo", p=11, width=16, weight_decay=1e30, steps=21, console=console)
    columns = open_run(result.runs[0]).columns()
    assert np.isfinite(columns["lar"]).tolist() == [True, False, False]
    assert np.isnan(columns["margin"][1:]).all()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"p": 58}, "p must be an odd number of at least 5, found 58"),
        ({"p": 3}, "p must be an odd number of at least 5, found 3"),
        ({"width": 1}, "--width: expected at least 2, found 1"),
        ({"steps": 0}, "--steps: expected at least 1, found 0"),
        ({"weight_decay": -1.0}, "--weight-decay: expected a number from 0 on, found -1.0"),
        ({"weight_decay": float("nan")}, "--weight-decay: expected a number from 0 on, found nan"),
        ({"device": "toaster"}, "--device toaster"),
    ],
)
def test_bad_options_write_nothing(tmp_path, console, option, message):
    with pytest.raises(InputError, match=message):
        grokking.run(out=tmp_path / "demo", console=console, **option)
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_k_falls_to_the_independent_dimension(tmp_path, console):
    result = grokking.run(out=tmp_path / "demo", console=console)
    columns = grokking.with_effective_dims(open_run(result.runs[0]).columns())
    assert columns["test_acc"][-1] == 1.0
    assert columns["effective_dim"][5] > 35
    assert columns["effective_dim_centered"][-1] == pytest.approx(columns["dimension"][-1], rel=0.25)


@pytest.mark.slow
def test_without_weight_decay_nothing_generalizes_and_the_summary_says_so(tmp_path, console):
    result = grokking.run(out=tmp_path / "demo", weight_decay=0.0, steps=600, console=console)
    columns = open_run(result.runs[0]).columns()
    assert columns["train_acc"][-1] == 1.0
    assert columns["test_acc"][-1] < 0.1
    assert "memorized and did not generalize" in result.summary
