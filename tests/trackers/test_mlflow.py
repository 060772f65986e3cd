"""MLflow: runs in a real local store, of files and of SQLite."""

import shutil

import mlflow
import pytest

from logalign import diagnose, open_run
from logalign.errors import InputError, LogAlignError
from logalign.trackers.mlflow import MlflowTracker, open_tracker, wrap

# What MLflow does with SQLAlchemy is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")


@pytest.fixture
def store(tmp_path):
    """A file store."""
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    yield tmp_path / "mlruns"
    while mlflow.active_run() is not None:
        mlflow.end_run()


@pytest.fixture
def database(tmp_path):
    """A store in SQLite."""
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    yield tmp_path / "mlflow.db"
    while mlflow.active_run() is not None:
        mlflow.end_run()


def test_a_run_of_a_file_store_reads_as_the_run_that_it_shows(store, recorded, tools):
    show, check_same = tools
    with mlflow.start_run() as run:
        show("mlflow", recorded)
        mlflow.log_metric("mine", 1.0)
    for path in (store / "0" / run.info.run_id, store / "0", store, store.parent):
        check_same(open_run(path).readings, recorded)
    shown, own = diagnose(store), diagnose(recorded)
    assert own.outcome == "overfitting"
    assert shown.record() == own.record()
    tags = mlflow.get_run(run.info.run_id).data.tags
    assert tags["logalign/verdict_text"].startswith("overfitting (decline regime) at step ")


def test_a_run_of_a_database_reads_as_the_run_that_it_shows(database, recorded, tools):
    show, check_same = tools
    with mlflow.start_run() as run:
        show(run, recorded[:25], after=lambda reading: mlflow.log_metric("train_time", 2.0, step=reading.step))
    check_same(open_run(database).readings, recorded[:25])
    assert diagnose(database).record() == diagnose(recorded[:25]).record()
    with mlflow.start_run() as other:
        show("mlflow", recorded[:3])
    check_same(open_run(f"{database}#{run.info.run_id}").readings, recorded[:25])
    check_same(open_run(f"{database}#{other.info.run_id}").readings, recorded[:3])


def test_names_that_mlflow_refuses(store):
    with mlflow.start_run():
        tracker = open_tracker(None)
        tracker.log({"logalign/lar": 0.5, "logalign/heads[1]@x<y/lar": 0.25}, step=0)
        with pytest.raises(InputError, match="expected names that differ in what MLflow takes, found a<, a>"):
            tracker.log({"a<": 0.5, "a>": 0.25}, step=0)
    assert [(reading.site, reading.lar) for reading in open_run(store).readings] == [
        ("unembedding", 0.5),
        ("heads_1__x_y", 0.25),
    ]


def test_more_numbers_than_mlflow_takes_at_once(store):
    with mlflow.start_run() as run:
        MlflowTracker(run).log({f"logalign/site{i}/lar": i / 2000 for i in range(1500)} | {"logalign/lar": 0.5}, step=0)
    assert len(open_run(store).readings) == 1501


def test_a_resumed_run_supersedes(store):
    with mlflow.start_run() as run:
        for step in (0, 10, 20, 30):
            open_tracker(None).log({"logalign/lar": 0.5}, step=step)
    with mlflow.start_run(run_id=run.info.run_id):
        for step in (20, 30):
            open_tracker(None).log({"logalign/lar": 0.75}, step=step)
    assert [(each.step, each.lar) for each in open_run(store).readings] == [(0, 0.5), (10, 0.5), (20, 0.75), (30, 0.75)]


def test_a_store_that_is_removed_is_told_of_once(store, recorded, tools, tmp_path):
    show, _ = tools
    told = []

    def remove(reading):
        if reading.step == 30:
            shutil.rmtree(store)

    with mlflow.start_run():
        show(
            ["mlflow", "csv"],
            recorded[:20],
            folder=tmp_path,
            warn=lambda key, message: told.append(message),
            after=remove,
        )
        store.mkdir()
        mlflow.tracking.fluent._active_run_stack.get().clear()
    (message,) = told
    assert message.startswith("MlflowTracker failed and gets no more readings (")
    assert len(open_run(tmp_path / "metrics.csv").readings) == 20


def test_without_an_active_run_the_error_says_what_to_do(store):
    with pytest.raises(InputError) as caught:
        open_tracker(None)
    assert str(caught.value) == (
        'trackers="mlflow": expected an active MLflow run, found none; call mlflow.start_run() before, or pass the run'
    )
    assert isinstance(caught.value, LogAlignError)


def test_what_is_no_run():
    assert wrap(object()) is None
