import numpy as np
import pytest

from logalign import open_run
from logalign.report import panels, signal_figures
from logalign.report.drift_panels import EXPLAINED, drift_cell, drift_facts, drift_panels, drift_text
from logalign.report.panels import Tables
from logalign.report.shown import shown_run
from tests.drifts import NO_DRIFT_YET, write_log


def drawn(*paths):
    runs = [shown_run(open_run(path), path.stem) for path in paths]
    tables = Tables()
    panels.add_tables(runs, tables)
    return runs, tables.held


def test_drift_is_drawn_with_two_standard_errors_about_it_and_a_line_at_zero(tmp_path):
    (run,), held = drawn(write_log(tmp_path / "run.jsonl", gaps=[30]))
    (panel,) = drift_panels([run])
    kinds = [(trace["kind"], trace["y"], trace.get("hidden", False)) for trace in panel.spec["traces"]]
    assert kinds == [("band", "drift", False), ("line", "drift", False), ("line", "gain", True)]
    assert [line["y"] for line in panel.spec["lines"]] == [0.0]
    assert panel.spec["title"] == "drift (nats a pass)"
    for i, reading in enumerate(run.run.readings):
        at = [held["r0"][name][i] for name in ("drift_low", "drift", "drift_high")]
        if reading.drift is None:
            assert at == [None] * 3
        else:
            width = 2 * reading.drift_error
            assert at == pytest.approx(
                [reading.drift - width, reading.drift, reading.drift + width], rel=1e-5, abs=1e-6
            )
    assert [value is None for value in held["r0"]["drift"]].count(True) == 13  # of two passes, and the gap


def test_of_several_runs_those_with_drift_are_drawn(tmp_path, write_run):
    paths = [write_log(tmp_path / f"{seed}.jsonl", seed=seed) for seed in range(2)]
    runs, _ = drawn(paths[0], write_run("without").path, paths[1])
    (panel,) = drift_panels(runs)
    assert [(trace["table"], trace["kind"]) for trace in panel.spec["traces"]] == [
        ("r0", "band"),
        ("r0", "line"),
        ("r2", "band"),
        ("r2", "line"),
    ]
    assert [trace["name"] for trace in panel.spec["traces"] if trace["kind"] == "line"] == ["0", "1"]
    assert drift_text(runs) == EXPLAINED
    assert [drift_cell(run.columns) is None for run in runs] == [False, True, False]


def test_where_no_reading_has_drift_nothing_is_drawn(tmp_path, write_run):
    assert drift_panels([shown_run(write_run(), "run")]) == []
    early = shown_run(open_run(write_log(tmp_path / "early.jsonl", of=60, gaps=range(60))), "early")
    assert drift_panels([early]) == []


def test_the_numbers_are_those_of_the_last_reading_with_drift(tmp_path):
    (run,), _ = drawn(write_log(tmp_path / "run.jsonl", gaps=[59]))
    last = run.run.readings[58]
    text = drift_text([run])
    assert f"At step 580 drift is {last.drift:.3f} ± {last.drift_error:.3f} nats a pass: " in text
    assert f"by {last.gain:.3f} ± 0.010 nats (gain). This rests on 4,154 pairs of visits. ± is one standard" in text
    assert drift_facts(run.columns) == {
        "Passes over the data": "10",
        "Pairs of visits": "4,155",
        "Drift": f"none at the last reading: {NO_DRIFT_YET}",
    }
    assert drift_cell(run.columns) is None


def test_runs_that_say_nothing_of_samples_have_no_facts_of_them(write_run):
    assert drift_facts(shown_run(write_run(), "run").columns) == {}


def test_the_figure_keeps_gaps_and_begins_where_the_run_begins(tmp_path):
    (run,), _ = drawn(write_log(tmp_path / "run.jsonl", gaps=[30]))
    (panel,) = drift_panels([run])
    (ax,) = panel.figure.axes
    curve, zero = ax.lines
    assert zero.get_ydata() == [0.0, 0.0]
    np.testing.assert_array_equal(curve.get_ydata(), run.drawn["drift"])
    low, high = ax.get_xlim()
    assert low < 0 < 590 < high
    (band,) = ax.collections
    assert len(band.get_paths()) == 2
    assert curve.get_marker() == "None"
    few = signal_figures.drift_figure(
        [("run", {name: values[:14] for name, values in run.drawn.items()})], label="drift", colors=["#000000"]
    )
    assert few.axes[0].lines[0].get_marker() == "o"
