import numpy as np
import pytest

from logalign.report import panels
from logalign.report.panels import Tables
from logalign.report.shown import shown_run


def drawn(run, name="run"):
    shown = shown_run(run, name)
    tables = Tables()
    panels.add_tables([shown], tables)
    return shown, tables


def test_texts_of_a_run_are_shown_by_plotly_as_they_are():
    assert panels.label("a <b>bold</b> & <a href='x'>") == "a &lt;b&gt;bold&lt;/b&gt; &amp; &lt;a href='x'&gt;"
    long = panels.label("<" * 200)
    assert long.count("&lt;") == 34  # cut before it is escaped, so that no entity is cut
    assert "\n" not in panels.label("two\nlines")


def test_numbers_are_exact_where_whole_and_null_where_undefined():
    assert panels.numbers(np.array([2**60, 1])) == [2**60, 1]
    assert panels.numbers(np.array([0.123456789, np.nan, np.inf, 3.0])) == [0.1234568, None, None, 3]


def test_every_trace_names_a_column_that_the_page_holds(write_run):
    run = write_run(
        lars=[0.5, None, *(0.5 + 0.01 * i for i in range(60))], val_loss=3.0, sites=("unembedding", "blocks.0")
    )
    shown, tables = drawn(run)
    found = [
        *panels.lar_panels([shown]),
        *panels.outcome_panels([shown], tables),
        *panels.effective_dim_panels([shown]),
        *panels.signal_panels([shown]),
        *panels.loss_panels([shown]),
        *panels.layer_panels(shown),
    ]
    keys = [each.key for each in found]
    assert len(set(keys)) == len(keys)
    assert {"lar", "outcome", "effective_dim", "loss", "layers"} <= set(keys)
    for each in found:
        for trace in each.spec["traces"]:
            table = tables.held[trace["table"]]
            if trace["kind"] == "band":
                names = [trace.get("low", f"{trace.get('y')}_low"), trace.get("high", f"{trace.get('y')}_high")]
            else:
                names = [trace["scale"][0] if "scale" in trace else trace["y"]]
            for name in names:
                assert len(table[name]) == len(table["step"]), (each.key, name)


def test_undefined_readings_are_marked_at_the_foot(write_run):
    shown, tables = drawn(write_run(lars=[0.5, None, 0.4, 0.6]))
    assert tables.held["r0"]["undefined"] == [None, 0.4, None, None]
    (panel,) = panels.lar_panels([shown])
    assert [trace["name"] for trace in panel.spec["traces"] if trace["kind"] == "marks"] == ["undefined reading"]


def test_layers_are_mean_lars_of_stretches_of_steps(write_run, monkeypatch):
    monkeypatch.setattr(panels, "LAYER_BINS", 2)
    shown, _ = drawn(write_run(lars=[0.1, 0.3, None, 0.7], sites=("unembedding", "blocks.0")))
    (panel,) = panels.layer_panels(shown)
    heat = panel.spec["heat"]
    assert heat["step"] == [0, 20, 40]
    assert heat["z"] == [[0.2, 0.7], [0.2, 0.7]]
    assert heat["sites"] == ["unembedding", "blocks.0"]


def test_outcomes_have_a_lane_each_or_each_run_its_own(write_run):
    shown, tables = drawn(write_run())
    (panel,) = panels.outcome_panels([shown], tables)
    lanes = panel.spec["lanes"]
    assert set(lanes) == set(shown.folded.outcomes)
    for trace in panel.spec["traces"]:
        lane = tables.held["s0"][trace["y"]]
        told = [value is not None for value in lane]
        assert told == [outcome == trace["name"] for outcome in shown.folded.outcomes]
        assert {value for value in lane if value is not None} == {lanes.index(trace["name"])}
    others = [shown, shown_run(write_run("other"), "<other>")]
    tables = Tables()
    panels.add_tables(others, tables)
    (panel,) = panels.outcome_panels(others, tables)
    assert panel.spec["lanes"] == ["run", "&lt;other&gt;"]


@pytest.mark.parametrize("lars", [[None, None, None], [0.5], [0.5, 0.5]])
def test_runs_with_next_to_nothing_in_them_are_drawn(write_run, lars):
    shown, tables = drawn(write_run(lars=lars))
    assert panels.lar_panels([shown])
    panels.outcome_panels([shown], tables)
    panels.effective_dim_panels([shown])
    panels.signal_panels([shown])
