import numpy as np
import pytest

from benchmarks.generalization import tables
from benchmarks.generalization.__main__ import main
from benchmarks.generalization.configs import FAMILIES, all_configs
from benchmarks.generalization.score import Interval
from benchmarks.generalization.store import collect

from .test_store import keep

PAGES = {
    "benchmark.md": ("runs", "regret", "held-out", "instruments", "alarms", "steady", "compare", "phases"),
    "benchmark-signals.md": ("within", "across", "rivals", "ranking", "dimension"),
}
DIMENSIONS = ("dimension", "dimension_additive", "dimension_energy")


def page(names):
    return "# A page\n\n" + "\n\n".join(f"<!-- begin: {name} -->\nold\n<!-- end: {name} -->\nText." for name in names)


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
    assert {name: tuple(found) for name, found in built.items()} == PAGES
    for found in built.values():
        for rows in found.values():
            assert rows
            assert all(row.keys() == rows[0].keys() for row in rows)
    main, of_signals = built["benchmark.md"], built["benchmark-signals.md"]
    assert [row["family"] for row in main["runs"]] == list(FAMILIES)
    assert sum(int(row["runs"]) for row in main["runs"]) == len(runs)
    signals = {row["signal"] for row in of_signals["within"]}
    assert {"LAR", "norm of the head", "training loss, deviation", "WeightWatcher alpha, mean"} <= signals
    assert signals <= {row[""] for row in of_signals["rivals"]}


def test_regret_is_of_the_scored_half_and_instruments_of_the_other(built, runs):
    main = built["benchmark.md"]
    overfit = [r for r in runs if tables.judged(r) and tables.outcome(r) == "overfit"]
    scored = [run for run in overfit if not tables.is_for_fitting(run.config)]
    for name, count in (("regret", len(scored)), ("instruments", len(overfit) - len(scored))):
        told = [int(words.split(", ")[-1].split()[0]) for words in main[name][0] if words.endswith("overfit")]
        assert sum(told) == count
        assert count > 0
    healthy = [run for run in runs if tables.judged(run) and tables.outcome(run) == "healthy"]
    expected = sum(not tables.is_for_fitting(run.config) for run in healthy)
    assert {row["healthy: alarmed"].split(" of ")[1] for row in main["regret"]} == {str(expected)}
    end = next(row for row in main["regret"] if row[""] == "train to the end")
    assert end["healthy: alarmed"].startswith("0 of ")


def test_every_run_is_counted_once_for_steadiness(built, runs):
    rows = built["benchmark.md"]["steady"]
    for row in rows:
        parts = [int(value) for name, value in row.items() if name not in ("family", "runs")]
        assert sum(parts) == int(row["runs"])
    assert sum(int(row["runs"]) for row in rows) == len(runs)


def test_writing_replaces_what_is_between_the_markers_and_nothing_else(tmp_path):
    target = tmp_path / "page.md"
    other = "Between.\n<!-- begin: b -->\nkept\n<!-- end: b -->"
    target.write_text(f"Before.\n<!-- begin: a -->\nold | \\1\n<!-- end: a -->\n{other}")
    new = {"a": [{"x": "1", "y": r"\1 \g<0>"}]}
    expected = (
        "Before.\n<!-- begin: a -->\n\n| x | y |\n| --- | ---: |\n| 1 | \\1 \\g<0> |\n\n<!-- end: a -->\n" + other
    )
    for _ in range(2):
        tables.write(new, target)
        assert target.read_text() == expected


def test_a_page_without_a_marker_is_left_as_it_is(tmp_path):
    target = tmp_path / "page.md"
    target.write_text("<!-- begin: a -->\n<!-- end: a -->")
    with pytest.raises(SystemExit, match="begin: b"):
        tables.write({"a": [{"x": "1"}], "b": [{"x": "1"}]}, target)
    assert target.read_text() == "<!-- begin: a -->\n<!-- end: a -->"


def test_numbers_are_shown_with_what_they_rest_on():
    assert tables.interval(Interval(0.5, 0.25, 0.75, 9)) == "0.50 (0.25 to 0.75)"
    assert tables.interval(Interval(float("nan"), 0, 0, 3)) == "–"


def test_the_command_rebuilds_page_and_figures(tmp_path, runs, capsys):
    for run in runs:
        keep(run, tmp_path)
    collect(tmp_path, tmp_path / "runs.parquet")
    for name, names in PAGES.items():
        (tmp_path / name).write_text(page(names))
    main(["--stored", str(tmp_path / "runs.parquet"), "tables", "--docs", str(tmp_path), "--jobs", "1"])
    for name, names in PAGES.items():
        text = (tmp_path / name).read_text()
        assert "old" not in text
        assert text.count("Text.") == len(names)
    images = sorted((tmp_path / "images").glob("*.png"))
    assert len(images) == 4
    said = capsys.readouterr().out
    assert all(str(path) in said for path in images)


def test_without_stored_runs_the_command_says_how_to_get_them(tmp_path):
    with pytest.raises(SystemExit, match=r"runs\.parquet: no such file; `train`"):
        main(["--stored", str(tmp_path / "runs.parquet"), "tables", "--docs", str(tmp_path)])
