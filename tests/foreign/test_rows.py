"""What all formats share: names, what stands on, what is superseded."""

from pathlib import Path

import pytest

from logalign.errors import RunError
from logalign.runs.foreign.row import Row
from logalign.runs.foreign.rows import DERIVED, OF_A_LAYER, Point, listed, readings_of, rows_by_step
from logalign.trackers import metrics


def read(*rows, steps=None):
    made = [Row(i * 10 if steps is None else steps[i], None, values, f"line {i + 1}") for i, values in enumerate(rows)]
    return readings_of(made, path=Path("log"), kind="log")


def test_what_trackers_are_given_is_known_here():
    assert OF_A_LAYER == metrics.LAYER
    given = {*metrics.JUDGED, "verdict", metrics.VERDICT_TEXT.removeprefix(metrics.PREFIX)}
    assert given | {"decline_rate", "memorization"} == set(DERIVED)


def test_the_names_of_the_trainer():
    (reading,) = read(
        {
            "train/logalign/lar": 0.5,
            "train/logalign/step": 4,
            "train/logalign/gap": 1.5,
            "train/logalign/blocks.0/lar": 0.25,
            "train/loss": 2.0,
            "train/epoch": 0.5,
            "train/learning_rate": 1e-3,
            "train/grad_norm": 3.0,
            "eval/loss": 2.5,
        }
    )[:1]
    assert (reading.step, reading.lar, reading.loss, reading.epoch, reading.lr) == (4, 0.5, 2.0, 0.5, 1e-3)
    assert reading.extra == {"gap": 1.5, "val_loss": 2.5}


def test_a_name_with_the_prefix_comes_before_the_same_without():
    (reading,) = read({"loss": 9.0, "logalign/loss": 2.0, "lar": 0.9, "logalign/lar": 0.5, "train/loss": 8.0})
    assert (reading.loss, reading.lar, reading.extra) == (2.0, 0.5, {})


def test_other_layers_and_names_with_a_slash_that_are_none():
    readings = read({"logalign/lar": 0.5, "logalign/a/b/lar": 0.25, "logalign/a/b/n": 8, "logalign/eval/acc": 1.0})
    assert [(each.site, each.lar, each.n, dict(each.extra)) for each in readings] == [
        ("unembedding", 0.5, None, {"eval/acc": 1.0}),
        ("a/b", 0.25, 8, {}),
    ]


def test_training_numbers_stand_on_and_a_held_out_loss_belongs_to_the_reading_before():
    rows = [{"loss": 3.0}, {"lar": 0.5}, {"loss": 2.0}, {"val_loss": 2.5}, {"lar": 0.25}]
    readings = read(*rows)
    assert [(each.step, each.loss, each.extra.get("val_loss")) for each in readings] == [
        (10, 3.0, 2.5),
        (40, 2.0, None),
    ]


def test_rows_that_go_back_supersede():
    rows = [{"lar": lar / 10} for lar in range(6)]
    readings = read(*rows, steps=[0, 10, 20, 30, 10, 20])
    assert [(each.step, each.lar) for each in readings] == [(0, 0.0), (10, 0.4), (20, 0.5)]


def test_curves_are_rows_by_step():
    rows = rows_by_step({"lar": [Point(0, 0.5, 1.0), Point(10, 0.25, 2.0)], "loss": [Point(10, 3.0, 9.0)]})
    assert [(row.step, row.time, dict(row.values)) for row in rows] == [
        (0, 1.0, {"lar": 0.5}),
        (10, 2.0, {"lar": 0.25, "loss": 3.0}),
    ]


def test_the_norm_of_the_weight_is_its_energy():
    (reading,) = read({"logalign/lar": 0.5, "logalign/weight_norm": 3.0})
    assert reading.energies == {"weight": 9.0, "input": None, "output": None}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"gap": 1.0, "a\x1b[31m": 2.0},
            "log: expected 'logalign/lar', 'lar' or a loss such as 'loss', 'train/loss' or 'val_loss' in the log, "
            "found a?[31m, gap; ",
        ),
        ({"lar": "x"}, "log, line 1: lar: expected a number or null, found 'x'"),
        ({"lar": 0.5, "logalign/step": 0.5}, "log, line 1: expected a whole number for the step, found 0.5"),
        ({"lar": 0.5, "logalign/step": float("nan")}, "log, line 1: expected a whole number for the step, found nan"),
        ({"lar": 0.5, "logalign/step": -1}, "log, line 1: step: expected a whole number from 0 on, found -1"),
        ({"lar": 0.5, "n": float("inf")}, None),
    ],
)
def test_what_is_wrong_is_one_clear_error(row, message):
    if message is None:
        assert read(row)[0].n is None
        return
    with pytest.raises(RunError) as caught:
        read(row)
    assert str(caught.value).startswith(message)


def test_many_names_are_counted():
    assert listed(f"a{i:02}" for i in range(25)).endswith("a18, a19, and 5 more")
    assert listed([]) == "nothing"
