"""Runs that lie elsewhere read as they do here: from a real S3 server, a web server, and fsspec's own memory."""

import functools
import gc
import json
import shutil
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pytest
import s3fs
from moto.server import ThreadedMotoServer

import logalign
from logalign import Baseline, Reading, diagnose, open_run
from logalign.diagnosis.ranking import rank
from logalign.errors import MissingExtraError, RunError
from logalign.runs.remote import find_runs, is_remote, shown
from logalign.runs.writer import RunWriter

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def server():
    started = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    yield f"http://{host}:{port}"
    started.stop()


@pytest.fixture
def s3(server, monkeypatch):
    """A bucket on the S3 server, as boto3 sees it; the library finds the server by the environment."""
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    for each in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        client.delete_object(Bucket="bucket", Key=each["Key"])
    client.close()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()


@pytest.fixture
def web(tmp_path):
    """A web server that shows a folder."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    folder = tmp_path / "web"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()
        thread.join()


def upload(client, folder, key):
    for file in folder.rglob("*"):
        if file.is_file():
            client.put_object(Bucket="bucket", Key=f"{key}/{file.relative_to(folder)}", Body=file.read_bytes())


def write(path, *, lar=0.6, readings=20):
    """A run that was resumed, with spectra."""
    writer = RunWriter(path, {"main": "unembedding", "settings": {"lr": 0.1}})
    for step in range(readings):
        writer.append(of(step, lar))
    writer.spectra(10, "unembedding", p=np.full(8, 1 / 8), q=np.full(8, 1 / 8))
    writer.close()
    writer = RunWriter(path, {}, resume=True)
    writer.resume_at(10 * (readings - 2))
    writer.append(of(readings - 2, lar + 0.01))
    writer.close()
    return path


def of(i, lar):
    return Reading(step=10 * i, lar=lar + 0.001 * i, lar_centered=None, n=8, m=16, tokens_seen=100 * i, loss=1.0)


def refusal(path, error=RunError):
    with pytest.raises(error) as caught:
        open_run(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_in_a_bucket_reads_as_it_does_here(tmp_path, s3):
    here = open_run(write(tmp_path / "here"))
    upload(s3, here.path, "runs/there")
    there = open_run("s3://bucket/runs/there")
    assert there.name == "s3://bucket/runs/there"
    assert there.meta == here.meta
    assert there.events == here.events
    assert there.readings == here.readings
    assert len(there.readings) == 19
    assert not (there.path / "spectra").exists()
    [spectra] = there.spectra_folder.iterdir()
    assert spectra.read_bytes() == (here.spectra_folder / spectra.name).read_bytes()
    assert open_run("s3://bucket/runs/there/").readings == here.readings
    assert open_run("s3://bucket/runs/there/readings.jsonl").readings[0] == here.readings[0]


def test_what_takes_runs_takes_urls(tmp_path, s3):
    for name in ("lm_fresh", "lm_repeat200k"):
        s3.put_object(Bucket="bucket", Key=f"{name}.jsonl", Body=(DATA / f"{name}.jsonl").read_bytes())
    fresh, repeated = "s3://bucket/lm_fresh.jsonl", "s3://bucket/lm_repeat200k.jsonl"
    there, here = (
        diagnose(repeated, baseline=fresh),
        diagnose(DATA / "lm_repeat200k.jsonl", baseline=DATA / "lm_fresh.jsonl"),
    )
    assert there.evidence == here.evidence
    assert (there.outcome, there.since_step, there.reason) == (here.outcome, here.since_step, here.reason)
    assert len(Baseline.from_run(fresh, repeated).runs) == 2
    assert [each.run for each in rank([repeated, fresh]).runs] == [fresh, repeated]


def test_a_run_that_grows_is_read_as_it_is_now(tmp_path, s3):
    write(tmp_path / "run", readings=5)
    upload(s3, tmp_path / "run", "run")
    assert len(open_run("s3://bucket/run").readings) == 4
    with (tmp_path / "run" / "readings.jsonl").open("a") as log:
        log.write(of(9, 0.7).line() + '{"step": 100, "la')
    upload(s3, tmp_path / "run", "run")
    assert [each.step for each in open_run("s3://bucket/run").readings] == [0, 10, 20, 30, 90]


def test_runs_in_a_bucket_are_found(tmp_path, s3):
    write(tmp_path / "run", readings=3)
    for key in ("sweep/a/1", "sweep/a/2", "sweep/b"):
        upload(s3, tmp_path / "run", key)
    assert find_runs("s3://bucket/sweep", "run.json") == [f"s3://bucket/sweep/{each}" for each in ("a/1", "a/2", "b")]
    assert find_runs("s3://bucket/sweep/b", "run.json") == ["s3://bucket/sweep/b"]
    assert find_runs("s3://bucket/sweep/a/*", "run.json") == ["s3://bucket/sweep/a/1", "s3://bucket/sweep/a/2"]
    assert find_runs("s3://bucket/none/*", "run.json") == []


def test_files_and_folders_of_other_places(tmp_path, memory, web):
    here = open_run(write(tmp_path / "here"))
    data = (DATA / "lm_fresh.jsonl").read_bytes()
    memory.pipe("/logs/a.jsonl", data)
    memory.pipe("/logs/a.csv", b"step,lar\n0,0.5\n10,0.6\n")
    assert open_run("memory://logs/a.jsonl").readings == open_run(DATA / "lm_fresh.jsonl").readings
    assert [each.lar for each in open_run("memory://logs/a.csv").readings] == [0.5, 0.6]
    folder, url = web
    shutil.copytree(here.path, folder / "run")
    (folder / "a.jsonl").write_bytes(data)
    assert open_run(f"{url}/a.jsonl?version=2").readings == open_run(DATA / "lm_fresh.jsonl").readings
    assert open_run(f"{url}/run").readings == here.readings
    local = open_run(here.path.as_uri())
    assert (local.path, local.readings) == (here.path, here.readings)


def test_logs_of_other_tools_are_copied_without_what_lies_beside_them(tmp_path, memory):
    history = [{"step": step, "logalign/lar": 0.5 + step / 100} for step in range(3)]
    memory.pipe("/out/checkpoint-3/trainer_state.json", json.dumps({"log_history": history}).encode())
    memory.pipe("/out/checkpoint-3/model.safetensors", b"large")
    run = open_run("memory://out")
    assert [each.lar for each in run.readings] == [0.5, 0.51, 0.52]
    assert [file.name for file in run.path.rglob("*") if file.is_file()] == ["trainer_state.json"]
    memory.pipe("/mlruns/0/abc/meta.yaml", b"")
    memory.pipe("/mlruns/0/abc/metrics/logalign/lar", b"1000 0.5 0\n2000 0.6 10\n")
    assert [each.step for each in open_run("memory://mlruns").readings] == [0, 10]


def test_tensorboard_and_mlflow_databases_from_elsewhere(tmp_path, memory):
    import sqlite3

    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path / "tb") as writer:
        writer.add_scalar("logalign/lar", 0.5, 7)
    memory.put(str(tmp_path / "tb"), "/tb", recursive=True)
    assert [(each.step, each.lar) for each in open_run("memory://tb").readings] == [(7, 0.5)]
    database = sqlite3.connect(tmp_path / "mlflow.db")
    database.execute("CREATE TABLE metrics (run_uuid, key, step, value, is_nan, timestamp)")
    database.executemany(
        "INSERT INTO metrics VALUES (?, 'logalign/lar', 0, ?, 0, 1000)", [("first", 0.5), ("second", 0.25)]
    )
    database.commit()
    database.close()
    memory.put(str(tmp_path / "mlflow.db"), "/mlflow.db")
    assert open_run("memory://mlflow.db#second").readings[0].lar == 0.25
    assert refusal("memory://mlflow.db").startswith("memory://mlflow.db: expected one MLflow run")


def test_the_copy_goes_with_the_run(memory):
    memory.pipe("/a.jsonl", b'{"step": 0, "lar": 0.5}\n')
    run = open_run("memory://a.jsonl")
    folder = next(each for each in run.path.parents if each.name.startswith("logalign-"))
    assert run.path.is_file()
    del run
    gc.collect()
    assert not folder.exists()


def test_no_copy_stays_where_opening_failed(memory, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    memory.pipe("/run/run.json", b"{}")
    memory.pipe("/empty/model.bin", b"x")
    for url in ("memory://run", "memory://empty", "memory://none"):
        refusal(url)
    assert list(tmp_path.iterdir()) == []


def test_errors_name_the_url_and_not_the_copy(memory):
    for name, content in {
        "damaged": b'{"schema_version": 1',
        "future": b'{"schema_version": 99}',
        "other": b"[1]",
    }.items():
        memory.pipe(f"/{name}/run.json", content)
        assert refusal(f"memory://{name}").startswith(f"memory://{name}/run.json: expected ")
    memory.pipe("/torn/run.json", b'{"schema_version": 1}')
    memory.pipe("/torn/readings.jsonl", b'{"step": 0, "lar": 0.5}\nnonsense\n{"step": 1, "lar": 0.5}\n')
    run = open_run("memory://torn")
    with pytest.raises(RunError, match=r"^memory://torn/readings\.jsonl, line 2: expected a JSON object"):
        run.readings  # noqa: B018
    memory.pipe("/torn/events.jsonl", b'{"event": "resume", "step": "x"}\n')
    with pytest.raises(RunError, match=r"^memory://torn/events\.jsonl: expected a resume event"):
        open_run("memory://torn").readings  # noqa: B018
    memory.pipe("/empty.jsonl", b"")
    assert refusal("memory://empty.jsonl") == (
        "memory://empty.jsonl: expected readings with columns 'step' and 'lar', found none"
    )
    memory.pipe("/elsewhere/notes.txt", b"x")
    assert "memory://elsewhere: expected a run folder, found no run.json" in refusal("memory://elsewhere")


def test_nothing_there_no_bucket_no_connection_no_credentials(s3, monkeypatch):
    nothing = "expected a run folder, a JSONL or a CSV file, found nothing there"
    assert refusal("s3://bucket/none") == f"s3://bucket/none: {nothing}"
    assert "The specified bucket does not exist" in refusal("s3://no-such-bucket/run")
    assert refusal("memory://none") == f"memory://none: {nothing}"
    assert "Protocol not known: nowhere" in refusal("nowhere://x/y")
    assert "ConnectionRefusedError" in refusal("http://127.0.0.1:9/run.jsonl")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    message = refusal("s3://bucket/run")
    assert message.startswith("s3://bucket/run: expected what can be read, found: ")
    assert "onnect" in message
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    s3fs.S3FileSystem.clear_instance_cache()
    message = refusal("s3://bucket/run")
    assert "NoCredentialsError: Unable to locate credentials" in message
    assert message.endswith("(credentials and endpoints come from the environment or fsspec's configuration)")


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    message = refusal("gs://bucket/run", MissingExtraError)
    assert message.startswith("gs://bucket/run: ")
    assert message.endswith('pip install "logalign[remote]" gcsfs')
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    assert refusal("s3://bucket/run", MissingExtraError).endswith('needs fsspec: pip install "logalign[remote]"')


def test_secrets_are_not_shown():
    url = "http://me:word@127.0.0.1:9/run.jsonl?X-Amz-Signature=12ab&access_token=cd34&part=2"
    message = refusal(url)
    assert message.startswith("http://127.0.0.1:9/run.jsonl?X-Amz-Signature=...&access_token=...&part=2: ")
    for secret in ("me:", "word", "12ab", "cd34"):
        assert secret not in message
    assert shown("s3://bucket/run") == "s3://bucket/run"


def test_names_that_would_leave_the_copy_are_refused(s3):
    s3.put_object(Bucket="bucket", Key="evil/../../x.wandb", Body=b"x")
    assert "expected names of files below it, found '../../x.wandb'" in refusal("s3://bucket/evil")


def test_a_path_that_was_a_url_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "a URL has two slashes" in refusal(Path("s3://bucket/run"))
    assert "a URL has two slashes" not in refusal(Path("bucket/run"))
    assert is_remote("s3://bucket/run")
    assert not is_remote("bucket/run")
    assert not is_remote(Path("C:/run"))


def test_nothing_is_written_elsewhere(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"^s3://bucket/run: expected a folder of this machine to write to, found a URL"):
        logalign.watch(torch.nn.Sequential(torch.nn.Linear(4, 4)), run="s3://bucket/run", trackers="csv", layers=["0"])
    assert list(tmp_path.iterdir()) == []


def test_a_report_of_a_run_in_a_bucket_has_its_spectra_and_names_the_url(tmp_path, s3):
    from logalign.report.run_report import write_run_report
    from logalign.report.spectra_shown import shown_spectra

    upload(s3, write(tmp_path / "here"), "runs/there")
    run = open_run("s3://bucket/runs/there")
    page = write_run_report([run], tmp_path / "report.html").read_text()
    assert "s3://bucket/runs/there" in page
    assert str(run.path) not in page
    assert shown_spectra(run, "unembedding").steps == [10]
