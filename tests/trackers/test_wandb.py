"""W&B: real runs, offline, whose files are read again; the user's own rows are what they are without logalign."""

import json
from functools import partial

import pytest
import wandb

from logalign import diagnose, open_run
from logalign.errors import InputError
from logalign.runs.foreign.wandb import _parser, _records, wandb_files
from logalign.trackers.wandb import WandbTracker, open_tracker, wrap


@pytest.fixture
def run(tmp_path):
    with wandb.init(project="test", dir=tmp_path) as run:
        yield run


def written(folder):
    """The file of the run in a folder, once W&B's service, which writes it, has ended."""
    wandb.teardown()
    (file,) = wandb_files(folder)
    return file


def rows(folder):
    """The rows of the run in a folder, as W&B's records have them."""
    file = written(folder)
    records = map(_parser(file), (data for _, data in _records(file)))
    found = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            found.append({name: value for name, value in items.items() if name not in ("_timestamp", "_runtime")})
    return found


def users(folder):
    """What the user logged, and at which of W&B's steps."""
    found = [{name: value for name, value in row.items() if not name.startswith("logalign/")} for row in rows(folder)]
    return [row for row in found if set(row) != {"_step"}]


def test_a_run_reads_as_the_run_that_it_shows(run, recorded, tools, tmp_path):
    show, check_same = tools
    show("wandb", recorded, after=lambda reading: run.log({"mine": reading.step}))
    assert run.summary["logalign/verdict_text"].startswith("overfitting (decline regime) at step ")
    run.finish()
    file = written(tmp_path)
    assert file.stat().st_size > 32 * 1024, "records go over more than one block"
    for path in (file, file.parent, file.parent.parent, tmp_path):
        check_same(open_run(path).readings, recorded)
    shown, own = diagnose(file), diagnose(recorded)
    assert own.outcome == "overfitting"
    assert shown.record() == own.record()
    assert users(tmp_path) == [{"mine": reading.step, "_step": i} for i, reading in enumerate(recorded)]


def before(run, step, log):
    log()
    run.log({"loss": float(step)}, step=step)


def after(run, step, log):
    run.log({"loss": float(step)}, step=step)
    log()


def around(run, step, log):
    run.log({"loss": float(step)}, step=step)
    log()
    run.log({"accuracy": step / 100}, step=step)


def counted_by_wandb(run, step, log):
    run.log({"loss": float(step)})
    log()


def committed(run, step, log):
    run.log({"loss": float(step)}, commit=False)
    log()
    run.log({"accuracy": step / 100}, commit=True)


def by_epoch(run, step, log):
    log()
    if step % 10 == 9:
        run.log({"loss": float(step)}, step=step // 10)


@pytest.mark.parametrize("way", [before, after, around, counted_by_wandb, committed, by_epoch])
def test_the_rows_of_the_user_are_undisturbed(way, tmp_path):
    for name in ("with", "without"):
        with wandb.init(project="test", dir=tmp_path / name) as run:
            tracker = WandbTracker(run) if name == "with" else None
            for step in range(30):
                way(run, step, partial(tracker.log, {"logalign/lar": 0.5}, step=step) if tracker else int)
            assert tracker is None or (tracker.notice is None) == (way is not by_epoch)
    assert users(tmp_path / "with") == users(tmp_path / "without")
    steps = [reading.step for reading in open_run(tmp_path / "with").readings]
    # Rows that `step=` completes are complete when the next begins: see REPLACED.
    assert steps == {before: list(range(1, 30)), by_epoch: [19, 29]}.get(way, list(range(30)))


def test_every_row_has_the_step_of_its_reading_and_the_curves_are_drawn_over_it(run, tmp_path):
    tracker = open_tracker(None)
    for step in (0, 10, 20):
        run.log({"loss": 1.0}, step=5 * step)
        tracker.log({"logalign/lar": 0.5}, step=step)
    run.finish()
    assert [(row["_step"], row["logalign/step"]) for row in rows(tmp_path)] == [(0, 0), (50, 10), (100, 20)]
    file = written(tmp_path)
    records = map(_parser(file), (data for _, data in _records(file)))
    metrics = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    assert [(each.glob_name, each.step_metric) for each in metrics if each.glob_name] == [
        ("logalign/*", "logalign/step")
    ]


def test_rows_of_the_user_that_are_rare_keep_the_last_reading_and_that_is_told_once(run, recorded, tools, tmp_path):
    show, _ = tools
    told = []

    def log(reading):
        if reading.step % 50 == 40:
            run.log({"loss": 1.0})

    show(run, recorded[:20], warn=lambda key, message: told.append((key, message)), after=log)
    run.finish()
    assert len({key for key, _ in told}) == 1, "the monitor tells of each key once"
    assert told[0][1].startswith("readings come more often than W&B's run.log() is called")
    assert [reading.step for reading in open_run(written(tmp_path)).readings] == [40, 90, 140, 190]


def test_rows_of_our_own_where_nothing_else_is_logged(run, recorded, tools, tmp_path):
    show, check_same = tools
    show(WandbTracker(run, own_rows=True), recorded[:20])
    run.finish()
    check_same(open_run(written(tmp_path)).readings, recorded[:20])


def test_a_run_that_is_finished_is_told_of_once(run, recorded, tools, tmp_path):
    show, _ = tools
    told = {}

    def finish(reading):
        if reading.step == 30:
            run.finish()

    show([run, "csv"], recorded[:20], folder=tmp_path, warn=told.__setitem__, after=finish)
    _, message = told.values()  # the first says that nothing else is logged
    assert message.startswith("WandbTracker failed and gets no more readings (UsageError: ")
    assert len(open_run(tmp_path / "metrics.csv").readings) == 20


def test_without_a_run_the_error_says_what_to_do():
    assert wandb.run is None
    with pytest.raises(InputError) as caught:
        open_tracker(None)
    assert str(caught.value) == (
        'trackers="wandb": expected a W&B run in this process, found none; call wandb.init() before, or pass the run'
    )


def test_a_disabled_run_takes_readings_and_tells_nothing(recorded, tools, tmp_path):
    show, _ = tools
    with wandb.init(mode="disabled", dir=tmp_path) as run:
        show(run, recorded[:5])


def test_what_is_no_run():
    assert wrap(object()) is None
