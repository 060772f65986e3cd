"""A log without LAR through every command: diagnose, report, export, follow, and in a notebook; and where it grows."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from logalign import diagnose, open_run
from logalign.cli import app
from logalign.diagnosis.loss_only import AFTERWARDS
from logalign.follow.following import Follower
from logalign.report.folded import fold
from logalign.report.shown import shown_run

STATE = Path(__file__).parent / "data" / "without_lar" / "trainer_state.json"
RISES = Path(__file__).parent / "data" / "held_out_rises.jsonl"


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """Run a command line in an empty folder, on a terminal of a known width."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


def words(text):
    return " ".join(text.split())


def test_diagnose(cli):
    result = cli("diagnose", STATE)
    assert result.exit_code == 0
    assert "approaching (without LAR) at step 2,000, since step 850" in result.stdout
    assert f"- {AFTERWARDS}" in words(result.stdout)
    rises = cli("diagnose", RISES)
    assert "but: the recorded held-out loss was lowest at step 400 (2.224) and has risen by 69% since;" in words(
        rises.stdout
    )
    assert json.loads(cli("diagnose", RISES, "--json").stdout)["held_out"].startswith("the recorded held-out loss")


def test_a_baseline_is_not_used():
    verdict = diagnose(STATE, baseline=STATE.parent.parent / "lm_fresh.jsonl")
    assert verdict.limits[0] == "the baseline is not used: a log without LAR cannot be compared with it"
    assert verdict.outcome == diagnose(STATE).outcome


def test_the_verdict_of_the_report_is_that_of_diagnose():
    for path in (STATE, RISES):
        assert shown_run(open_run(path), "run").folded.verdict == diagnose(path)
    columns = open_run(STATE).columns()
    assert fold(columns, "unembedding", all_up_to=100, thinned_to=100).verdict.regime == "loss"


def test_report(cli, tmp_path):
    result = cli("report", STATE, "-o", "report.html", "--figures", "figures")
    assert result.exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert "without LAR" in page
    assert AFTERWARDS in page
    drawn = {each.stem for each in (tmp_path / "figures").iterdir()}
    assert drawn == {"loss", "outcome", "memorized_share_low"}
    assert "The recorded held-out loss was lowest at step 400" in cli_page(cli, tmp_path, RISES)
    assert cli("report", STATE, RISES, "-o", "both.html").exit_code == 0


def cli_page(cli, tmp_path, path):
    assert cli("report", path, "-o", "other.html").exit_code == 0
    return (tmp_path / "other.html").read_text()


def test_export(cli, tmp_path):
    assert cli("export", STATE, "--parquet", "all.parquet").exit_code == 0
    table = pyarrow.parquet.read_table(tmp_path / "all.parquet").to_pydict()
    assert table["step"] == list(range(10, 2001, 10))
    assert set(table["lar"]) == {None}
    assert set(table["reason"]) == {"the log has no LAR"}
    assert [each for each in table["val_loss"] if each is not None][:3] == [0.808, 0.7053, 0.65]


def test_compare_is_one_clear_sentence_or_an_order(cli, tmp_path):
    shutil.copy(STATE, tmp_path / "other.json")
    result = cli("compare", STATE, "other.json")
    assert result.exit_code == 0 or (result.exit_code == 1 and result.stderr.startswith("error: "))
    assert "Traceback" not in result.output


def test_a_notebook_shows_losses():
    shown = open_run(STATE)._repr_html_()
    assert "the log has no LAR" in shown
    assert "held out" in shown
    assert "undefined" not in shown


def test_follow_once(cli):
    shown = cli("follow", "--once", STATE).stdout
    assert "APPROACHING   since step 850, without LAR" in shown
    assert "loss ── training 0.05" in shown
    assert "held-out 0.956" in shown
    assert "approaching 0.35" in shown
    assert words(AFTERWARDS) in words(shown)
    assert "LAR is undefined" not in shown
    assert " but the recorded held-out loss" in words(cli("follow", "--once", RISES).stdout)


def test_follow_takes_what_was_added_to_another_tools_log(tmp_path):
    state = json.loads(STATE.read_text())
    history = state["log_history"]
    file = tmp_path / "out" / "checkpoint-100" / "trainer_state.json"
    follower = Follower(tmp_path / "out")
    assert follower.look() == []
    assert follower.waiting == "nothing is there yet"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"log_history": history[:50]}))
    first = follower.look()
    assert follower.waiting is None
    assert follower.look() == []
    file.write_text(json.dumps({"log_history": history}))
    second = follower.look()
    assert [reading.step for reading, _ in (*first, *second)] == list(range(10, 2001, 10))
    assert follower.verdict == diagnose(STATE)
    file.write_text(json.dumps({"log_history": [{"step": 5, "loss": 1.0, "epoch": 0.1}]}))
    assert [reading.step for reading, _ in follower.look()] == [5]
    assert len(follower.history) == 1
    file.unlink()
    follower.look()
    assert follower.waiting == "it is gone"


def test_follow_a_table_of_losses(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,loss\n0,2.0\n")
    follower = Follower(path)
    assert len(follower.look()) == 1
    with path.open("a") as file:
        file.write("1,1.5\n2,1.25\n")
    assert [(reading.step, reading.loss) for reading, _ in follower.look()] == [(1, 1.5), (2, 1.25)]
    assert follower.verdict.regime == "loss"
