import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import logalign
from logalign.cli import app
from logalign.errors import InputError
from logalign.runs.run import open_run
from tests.drifts import drifting


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """Run a command line in an empty folder, on a terminal of a known width."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


def test_version(cli):
    result = cli("--version")
    assert (result.exit_code, result.output) == (0, f"logalign {logalign.__version__}\n")


def test_help_tells_a_newcomer_what_lar_is_and_what_to_type(cli):
    result = cli("--help")
    assert result.exit_code == 0
    for expected in (
        "memorizing or generalizing",
        "log-alignment ratio (LAR)",
        "logalign demo label-noise",
        "logalign.watch(",
    ):
        assert expected in result.output


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (("demo", "label-noise"), ["--out", "--steps", "--noise", "--seed", "--device", "--fresh"]),
        (
            ("demo", "language-model"),
            ["--out", "--text", "--steps", "--unique-tokens", "--seed", "--device", "--fresh"],
        ),
        (
            ("demo", "grokking"),
            ["--out", "--p", "--width", "--weight-decay", "--steps", "--seed", "--device", "--fresh"],
        ),
        (("report",), ["RUN", "--out"]),
        (("diagnose",), ["RUN", "--baseline", "--regime", "--json"]),
    ],
)
def test_every_command_has_help(cli, command, options):
    result = cli(*command, "--help")
    assert result.exit_code == 0
    for option in options:
        assert option in result.output


def test_report_writes_the_page_and_names_it(cli, write_run, tmp_path):
    run = write_run()
    result = cli("report", run.path)
    assert (result.exit_code, result.stdout) == (0, "report: report.html\n")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert cli("report", run.path, write_run("second").path, "-o", tmp_path / "two.html").exit_code == 0
    assert "2 runs" in (tmp_path / "two.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "error: nowhere: expected a run folder, a JSONL or a CSV file, found nothing there\n"),
        (["damaged"], "expected a JSON object"),
        (["{run}", "-o", "."], "is a folder: give a name such as report.html"),
        (["{run}", "{run}"], "the same one given twice"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(cli, write_run, tmp_path, arguments, message):
    run = write_run()
    write_run("damaged")
    (tmp_path / "damaged" / "run.json").write_text("{")
    result = cli("report", *(argument.format(run=run.path) for argument in arguments))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize(
    ("arguments", "status", "headline"),
    [
        (
            ["lm_repeat200k.jsonl", "--baseline", DATA / "lm_fresh.jsonl"],
            3,
            "overfitting (decline regime) at step 1,490, since step ",
        ),
        (["modadd59_wd0.jsonl"], 3, "memorizing (grokking regime) at step 1,490, since step "),
        (["modadd59_wd1.jsonl"], 0, "generalizing (grokking regime) at step 1,490, since step "),
        (["lm_fresh.jsonl"], 0, "healthy (decline regime) at step 1,490, since step 0\n"),
        (["lm_repeat200k.jsonl"], 3, "overfitting (decline regime) at step 1,490, since step "),
        (["modadd59_wd1.jsonl", "--regime", "decline"], 4, "undecidable (decline regime) at step 1,490, since step 10"),
    ],
)
def test_diagnose_says_what_a_run_shows_and_exits_with_it(cli, arguments, status, headline):
    path, *options = arguments
    result = cli("diagnose", DATA / path, *options)
    assert result.exit_code == status
    assert result.stdout.startswith(f"{DATA / path}: {headline}")
    assert "why:" in result.stdout
    assert "what to do:" in result.stdout
    for label in ("evidence", "limits"):
        assert label not in result.stdout
        assert label in cli("diagnose", DATA / path, *options, "--verbose").stdout
    as_json = cli("diagnose", DATA / path, *options, "--json")
    assert as_json.exit_code == status
    record = json.loads(as_json.stdout)
    assert record["run"] == str(DATA / path)
    assert headline.startswith(record["outcome"])
    assert set(record) == {
        "run", "outcome", "regime", "step", "since_step", "is_alarm", "reason", "suggestion", "evidence", "basis",
        "limits", "held_out", "sure", "earlier",
    }  # fmt: skip


def test_diagnose_with_several_baselines(cli, write_run):
    first, second, run = (write_run(name, epoch=3.0) for name in ("first", "second", "run"))
    result = cli("diagnose", run.path, "--baseline", first.path, "--baseline", second.path, "--regime", "both")
    assert result.exit_code == 4, result.output


def test_diagnose_takes_a_tensorboard_log(cli, tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "log")) as writer:
        for step in range(0, 50, 10):
            writer.add_scalar("logalign/lar", 0.5 + step / 1000, step)
            writer.add_scalar("epoch", step / 100, step)
    result = cli("diagnose", "log")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (
        0,
        "log: healthy (decline regime) at step 40, since step 0",
    )


def test_help_of_diagnose_explains_the_exit_status(cli):
    text = cli("diagnose", "--help").output
    for expected in (
        "0: healthy, approaching or generalizing",
        "1: an error",
        "3: overfitting, memorizing or diverged, now or earlier",
        "4: undecidable",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "error: nowhere: expected a run folder, a JSONL or a CSV file, found nothing there\n"),
        (["{run}", "--baseline", "nowhere"], "error: nowhere: expected a run folder"),
        (["{run}", "--baseline", "{wider}"], "expected a layer of the baseline's shape (m, n) = (512, 128), found"),
    ],
)
def test_what_cannot_be_diagnosed_is_one_line_and_status_1(cli, write_run, arguments, message):
    run, wider = write_run(), write_run("wider", n=128)
    result = cli("diagnose", *(argument.format(run=run.path, wider=wider.path) for argument in arguments))
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_compare_puts_the_run_that_overfits_last(cli):
    runs = [DATA / "lm_repeat200k.jsonl", DATA / "lm_fresh.jsonl"]
    result = cli("compare", *runs)
    assert result.exit_code == 0
    assert "held-out loss above the first" in result.stdout
    assert result.stdout.index("lm_fresh") < result.stdout.index("lm_repeat200k")
    as_json = json.loads(cli("compare", *runs, "--json").stdout)
    assert [each["run"] for each in as_json] == [str(runs[1]), str(runs[0])]
    assert {"run", "low", "high", "is_sure", "left_out"} <= set(as_json[0])
    assert 0 < as_json[1]["low"] < 1.9 < as_json[1]["high"]  # the held-out losses that were recorded differ by 1.9
    alone = cli("compare", runs[0])
    assert (alone.exit_code, alone.stderr) == (1, "error: expected at least two runs to compare, found 1\n")


def test_compare_names_what_it_leaves_out_and_orders_the_others(cli):
    runs = [DATA / "killed" / f"{name}.jsonl" for name in ("a", "b", "killed")]
    result = cli("compare", *runs, "nowhere", "--html", "all.html")
    assert result.exit_code == 0
    assert result.stdout.index("a.jsonl") < result.stdout.index("b.jsonl") < result.stdout.index("left out: ")
    assert "killed.jsonl: short: 3 readings of the layer, fewer than 10\n" in result.stdout
    assert "left out: nowhere: expected a run folder, a JSONL or a CSV file, found nothing there\n" in result.stdout
    assert "left out: nowhere" in Path("all.html").read_text()
    as_json = json.loads(cli("compare", *runs, "--json").stdout)
    assert [bool(each["left_out"]) for each in as_json] == [False, False, True]


def test_compare_aligns_runs_on_tokens_and_draws_them(cli, tmp_path):
    runs = [DATA / "lm_repeat200k.jsonl", DATA / "lm_fresh.jsonl"]
    result = cli("compare", *runs, "--align", "tokens", "--html", "<b>.html")
    assert result.exit_code == 0
    assert "at 3,053,568 tokens, the last that all runs have." in result.stdout
    assert result.stdout.endswith("overlay: <b>.html\n")
    page = (tmp_path / "<b>.html").read_text()
    assert page.index("Order by estimated held-out loss") < page.index("at 3,053,568 tokens")
    as_json = cli("compare", *runs, "--align", "tokens", "--html", "b.html", "--json")
    assert {(each["align"], each["at"]) for each in json.loads(as_json.stdout)} == {("tokens", 3_053_568)}
    refused = cli("compare", *runs, "--align", "epoch")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "short: 3 readings up to epoch 0.3" in refused.stderr


def test_compare_gives_drift_where_the_runs_are_compared(cli, tmp_path):
    shorter, repeated = tmp_path / "shorter.jsonl", tmp_path / "repeated.jsonl"
    without = open_run(DATA / "lm_fresh.jsonl").readings[:100]
    readings = drifting(open_run(DATA / "lm_repeat200k.jsonl").readings)
    shorter.write_text("".join(reading.line() for reading in without))
    repeated.write_text("".join(reading.line() for reading in readings))
    result = cli("compare", shorter, repeated, "--html", "both.html")
    at = next(reading for reading in readings if reading.step == without[-1].step)
    assert at.drift != readings[-1].drift
    shown = f"{at.drift:.3f} ± {at.drift_error:.3f}"
    rows = {words[1]: line for line in result.stdout.splitlines() if (words := line.split())[0] in "12"}
    assert shown in rows["repeated.jsonl"]
    assert shown not in rows["shorter.jsonl"]
    assert "(nats a pass)" in result.stdout
    assert "above zero they raise it" in result.stdout
    page = (tmp_path / "both.html").read_text()
    assert shown in page
    assert "drift (nats a pass)" in page
    as_json = json.loads(cli("compare", shorter, repeated, "--json").stdout)
    assert {each["run"]: (each["drift"], each["drift_error"]) for each in as_json} == {
        str(shorter): (None, None),
        str(repeated): (at.drift, at.drift_error),
    }


def test_compare_has_no_word_of_drift_where_no_run_has_it(cli):
    runs = [DATA / "lm_repeat200k.jsonl", DATA / "lm_fresh.jsonl"]
    assert "drift" not in cli("compare", *runs).stdout.lower()
    assert not any("drift" in each for each in json.loads(cli("compare", *runs, "--json").stdout))


def test_more_runs_than_can_be_told_apart_are_ordered_and_the_best_are_drawn(cli, tmp_path):
    for i in range(10):
        lines = [{"step": step, "lar": 0.5 + i / 100} for step in range(12)]
        (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = cli("compare", *sorted(tmp_path.glob("*.jsonl")), "--html", "all.html")
    assert result.exit_code == 0
    assert "Drawn are the best 8 of 10 runs." in (tmp_path / "all.html").read_text()
    assert [line.split()[1] for line in result.stdout.splitlines()[1:11]] == [f"{i}.jsonl" for i in range(9, -1, -1)]


def test_commands_take_urls(cli, tmp_path):
    urls = [(DATA / f"{name}.jsonl").as_uri() for name in ("lm_repeat200k", "lm_fresh")]
    assert cli("diagnose", urls[0], "--baseline", urls[1]).exit_code == 3
    assert cli("compare", *urls).exit_code == 0
    assert cli("report", *urls, "--baseline", urls[1]).exit_code == 0
    assert cli("export", *urls, "--parquet", "all.parquet").stdout == "export: all.parquet (2 runs, 300 readings)\n"
    gone = cli("diagnose", "memory://gone")
    nothing = "error: memory://gone: expected a run folder, a JSONL or a CSV file, found nothing there\n"
    assert (gone.exit_code, gone.stderr) == (1, nothing)


def test_export_tells_what_it_leaves_out(cli, tmp_path):
    (tmp_path / "[bold]x").mkdir()
    (tmp_path / "[bold]x/run.json").write_text("{")
    runs = [DATA / "lm_fresh.jsonl", "[bold]x"]
    result = cli("export", *runs, "--parquet", "all.parquet")
    assert result.exit_code == 1
    assert result.stdout == "export: all.parquet (1 runs, 150 readings, 1 left out)\n"
    assert result.stderr.startswith("skipped: [bold]x/run.json: expected a JSON object, found damage")
    strict = cli("export", *runs, "--strict", "--parquet", "none.parquet")
    assert (strict.exit_code, strict.stdout) == (1, "")
    assert strict.stderr.startswith("error: [bold]x/run.json")
    assert not (tmp_path / "none.parquet").exists()


def test_wrong_usage_is_status_2(cli):
    for arguments in (
        ["report"],
        ["nonsense"],
        ["diagnose"],
        ["diagnose", "run", "--regime", "none"],
        ["compare", "a", "b", "--align", "time"],
        ["export", "a"],
        ["demo", "label-noise", "--noise", "2"],
        ["demo", "grokking", "--steps", "x"],
    ):
        result = cli(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (InputError("expected this, found that"), 1, "error: expected this, found that\n"),
        (PermissionError(13, "Permission denied", "/data/run"), 1, "error: /data/run: Permission denied\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_a_command_raises_becomes_one_line(cli, monkeypatch, raised, status, message):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr("logalign.report.run_report.write_run_report", fail)
    result = cli("report", "run")
    assert (result.exit_code, result.stderr) == (status, message)


def test_our_own_mistakes_are_not_hidden(cli, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("ours")

    monkeypatch.setattr("logalign.report.run_report.write_run_report", fail)
    assert isinstance(cli("report", "run").exception, AssertionError)


@pytest.mark.parametrize(
    ("arguments", "module", "expected"),
    [
        (["label-noise", "--steps", "3", "--noise", "0.2"], "label_noise", {"steps": 3, "noise": 0.2, "fresh": False}),
        (
            ["language-model", "--text", "a.txt", "--text", "b.txt", "--fresh"],
            "language_model",
            {"unique_tokens": 100_000, "fresh": True},
        ),
        (["grokking", "--weight-decay", "0", "--seed", "4"], "grokking", {"weight_decay": 0.0, "seed": 4, "p": 59}),
    ],
)
def test_demo_options_reach_the_demo(cli, monkeypatch, arguments, module, expected):
    import importlib
    import inspect

    demo = importlib.import_module(f"logalign.demos.{module}")
    signature = inspect.signature(demo.run)
    seen = {}
    monkeypatch.setattr(demo, "run", lambda **given: seen.update(given))
    result = cli("demo", *arguments)
    assert result.exit_code == 0, result.output
    assert seen.items() >= expected.items()
    assert str(seen["out"]) == f"logalign-demos/{arguments[0]}"
    signature.bind(**seen)
    # The command's defaults are the function's own.
    for name, parameter in signature.parameters.items():
        if name in seen and name not in ("out", "text") and f"--{name.replace('_', '-')}" not in arguments:
            assert seen[name] == parameter.default, name


def test_interrupted_demo_says_how_to_go_on(cli, monkeypatch):
    from logalign.demos import label_noise

    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(label_noise, "run", interrupt)
    result = cli("demo", "label-noise")
    assert result.exit_code == 130
    assert result.stderr == "interrupted: give the same command again, without --fresh, to go on where it stopped\n"


def test_installed_module_runs_as_a_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "logalign.cli", "report", "nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: nowhere: expected a run folder, a JSONL or a CSV file, found nothing there\n"


def test_what_a_file_holds_does_not_steer_the_terminal(cli, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"\\u001b[2Jstep": 1}\n')
    result = cli("diagnose", "bad.jsonl")
    assert (result.exit_code, "\x1b" in result.stderr) == (1, False)
    assert "?[2Jstep" in result.stderr
