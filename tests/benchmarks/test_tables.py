import numpy as np
import pytest

from benchmarks.generalization import figures, score, tables
from benchmarks.generalization.__main__ import main
from benchmarks.generalization.configs import FAMILIES, all_configs
from benchmarks.generalization.score import Interval
from benchmarks.generalization.store import collect

from .test_store import keep

NAMES = (
    "runs", "within", "across", "detection", "detection-families", "detection-left-out", "ranking", "compare",
    "dimension", "phases",
)  # fmt: skip
DIMENSIONS = ("dimension", "dimension_additive", "dimension_energy")
PAGE = "# A page\n\n" + "\n\n".join(f"<!-- begin: {name} -->\nold\n<!-- end: {name} -->\nText." for name in NAMES)


@pytest.fixture
def runs(make_run, overfits):
    """Two baselines, and runs that overfit and that do not, in each family."""
    found = []
    for family in FAMILIES:
        mine = [config for config in all_configs() if config.family == family]
        shown = {config.name: config for config in [*[c for c in mine if c.recipe == mine[0].recipe][:5], mine[-1]]}
        for i, config in enumerate(shown.values()):
            held_out = overfits + 0.01 * i if i % 2 and not config.baseline else np.linspace(5, 4 + 0.01 * i, 40)
            facts = dict.fromkeys(DIMENSIONS if family == "algorithmic" else (), 10 + i)
            epochs = 0.9 if config.baseline else 5.0
            found.append(make_run(config, held_out=held_out, seed=i, epochs=epochs, facts=facts))
    return found


@pytest.fixture
def built(runs):
    return tables.build(runs)


def test_every_table_has_its_rows(built, runs):
    assert tuple(built) == NAMES
    for rows in built.values():
        assert rows
        assert all(row.keys() == rows[0].keys() for row in rows)
    assert [row["family"] for row in built["runs"]] == list(FAMILIES)
    assert sum(int(row["runs"]) for row in built["runs"]) == len(runs)
    signals = {row["signal"] for row in built["within"]}
    assert {"LAR", "norm of the head", "training loss, deviation", "WeightWatcher alpha, mean"} <= signals
    assert signals <= {row["detector"] for row in built["detection"]}


def test_tables_count_every_scored_run_once(built, runs):
    scored = [run for run in runs if run.config.family in tables.SCORED]
    overfit = sum(tables.outcome(run) == "overfit" for run in scored)
    assert overfit > 0
    assert sum(int(row["overfit"] or 0) for row in built["runs"]) == overfit
    without = [row for row in built["detection-families"] if row["detector"] == "no baseline"]
    counted = [row["on time"].split(" of ")[1].split()[0] for row in without if row["on time"] != "–"]
    assert sum(map(int, counted)) == overfit


def test_a_left_out_family_is_scored_on_all_of_its_runs(built, runs):
    for family in tables.SCORED:
        overfit = sum(tables.outcome(run) == "overfit" for run in runs if run.config.family == family)
        for row in built["detection-left-out"]:
            on_time, found, of = map(int, row[f"{family}: on time, found, of"].split(", "))
            assert 0 <= on_time <= found <= of == overfit


def test_writing_replaces_what_is_between_the_markers_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    other = "Between.\n<!-- begin: b -->\nkept\n<!-- end: b -->"
    page.write_text(f"Before.\n<!-- begin: a -->\nold | \\1\n<!-- end: a -->\n{other}")
    new = {"a": [{"x": "1", "y": r"\1 \g<0>"}]}
    expected = (
        "Before.\n<!-- begin: a -->\n\n| x | y |\n| --- | ---: |\n| 1 | \\1 \\g<0> |\n\n<!-- end: a -->\n" + other
    )
    for _ in range(2):
        tables.write(new, page)
        assert page.read_text() == expected


def test_a_page_without_a_marker_is_left_as_it_is(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- begin: a -->\n<!-- end: a -->")
    with pytest.raises(SystemExit, match="begin: b"):
        tables.write({"a": [{"x": "1"}], "b": [{"x": "1"}]}, page)
    assert page.read_text() == "<!-- begin: a -->\n<!-- end: a -->"


def test_numbers_are_shown_with_what_they_rest_on():
    assert tables.interval(Interval(0.5, 0.25, 0.75, 9)) == "0.50 (0.25 to 0.75)"
    assert tables.interval(Interval(float("nan"), 0, 0, 3)) == "–"
    assert tables.count(Interval(0.5, 0.25, 0.75, 8)) == "4 of 8 (25% to 75%)"
    assert tables.count(score.wilson(0, 0)) == "–"


def test_the_command_rebuilds_page_and_figures(tmp_path, runs, capsys):
    for run in runs:
        keep(run, tmp_path)
    collect(tmp_path, tmp_path / "runs.parquet")
    (tmp_path / "benchmark.md").write_text(PAGE)
    main(["--stored", str(tmp_path / "runs.parquet"), "tables", "--docs", str(tmp_path), "--jobs", "1"])
    text = (tmp_path / "benchmark.md").read_text()
    assert "old" not in text
    assert text.count("Text.") == len(NAMES)
    images = sorted((tmp_path / "images").glob("*.png"))
    assert len(images) == 4
    said = capsys.readouterr().out
    assert all(str(path) in said for path in images)


def test_without_stored_runs_the_command_says_how_to_get_them(tmp_path):
    with pytest.raises(SystemExit, match=r"runs\.parquet: no such file; `train`"):
        main(["--stored", str(tmp_path / "runs.parquet"), "tables", "--docs", str(tmp_path)])


def test_only_scored_runs_are_counted_in_the_figure_of_alarms(make_run, overfits, between):
    found = [score.judge(run, 20) for run in (make_run(held_out=between), make_run(), make_run(held_out=overfits))]
    assert figures._counts(found) == ("1 of 1", "1 of 1")
