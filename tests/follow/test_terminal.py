"""The command in a real pseudo-terminal: what a person sees, types and gets back."""

import json
import os
import re
import signal
import subprocess
import sys
import termios

import pytest
import torch
from sklearn.datasets import load_digits

import logalign
from logalign import open_run
from tests.drifts import write_log

# A terminal begins with a fork, of which programs with threads are warned; what follows is to run another program.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning", "ignore:.*fork:DeprecationWarning")

ENTERED, LEFT = b"\x1b[?1049h", b"\x1b[?1049l"


def given_back(session):
    """Whether the last that was sent leaves the full-screen mode, with a cursor."""
    return session.sent.rfind(LEFT) > session.sent.rfind(ENTERED) and b"\x1b[?25h" in session.sent


def training(folder, *, steps, every=5):
    """A classifier of digits with random labels, step by step: it memorizes."""
    torch.manual_seed(0)
    inputs = torch.tensor(load_digits().data, dtype=torch.float32)[:256] / 16
    labels = torch.randint(10, (256,))
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with logalign.watch(model, every=every, run=folder) as monitor:
        for step in range(steps):
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss, lr=3e-3, epoch=float(step))
            yield step, monitor.verdict


def test_a_training_is_shown_while_it_runs_and_q_gives_the_terminal_back(terminal, tmp_path):
    session = terminal("run", cwd=tmp_path)
    session.wait_for("waiting: nothing is there yet")
    before = termios.tcgetattr(session.child.child_fd)
    steps = training(tmp_path / "run", steps=301)
    verdict = next(verdict for step, verdict in steps if step == 10)
    seen = session.wait_for("step 10 ")
    assert "running" in seen
    assert f" {verdict.outcome.upper()} " in seen
    assert "layer unembedding: 2, Linear 10 x 64, found by" in seen
    *_, (_, verdict) = steps
    seen = session.wait_for("closed, training has ended")
    assert f"{verdict.outcome.upper()} " in seen
    assert verdict.outcome == "overfitting"
    assert f"since step {verdict.since_step}" in seen
    assert "61 readings" in seen
    assert "step 300 " in seen
    session.keys("q")
    assert session.end() == 0
    assert given_back(session)
    assert before[3] & (termios.ECHO | termios.ICANON) == 0  # it had been taken over


def test_drift_is_a_line_and_a_curve_in_a_terminal_of_24_rows(terminal, tmp_path):
    log = write_log(tmp_path / "run.jsonl")
    session = terminal(log)
    seen = session.wait_for("nats a pass: ")
    rows = seen.splitlines()
    last = open_run(log).readings[-1]
    (line,) = [row for row in rows if row.startswith(" drift ")]
    assert line.startswith(f" drift {last.drift:.3f} ± {last.drift_error:.3f} nats a pass: ")
    (upper,) = [row for row in rows if row.startswith("LAR ──")]
    assert "drift ── nats a pass " in upper  # in the place of k
    assert any(row.startswith("loss ──") for row in rows)
    session.keys("\t\t\t\t")
    seen = session.wait_for("curve: drift")
    assert any(row.startswith("drift ──") for row in seen.splitlines())
    assert len([row for row in seen.splitlines() if "│zero" in row or "┤zero" in row]) == 1
    session.keys("?")
    session.wait_for("how much training on other samples changes a sample's loss")
    assert any(row.split()[:1] == ["signal"] for row in session.text.splitlines())  # the last of the names
    session.keys("q")
    assert session.end() == 0


def test_where_a_run_has_no_drift_k_is_beside_lar(terminal, recorded):
    session = terminal(recorded)
    seen = session.wait_for(lambda text: "150 readings" in text and "k ──" in text)
    assert "drift" not in seen
    session.keys("q")
    assert session.end() == 0


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda session: session.keys("\x03"), 130),
        (lambda session: session.signal(signal.SIGINT), 130),
        (lambda session: session.signal(signal.SIGTERM), 143),
        (lambda session: session.signal(signal.SIGHUP), 129),
    ],
)
def test_whatever_ends_it_the_terminal_is_given_back(terminal, tmp_path, end, status):
    session = terminal("run", cwd=tmp_path)
    session.wait_for("nothing is there yet")
    end(session)
    assert session.end() == status
    assert given_back(session)
    assert b"Traceback" not in session.sent


def test_when_the_terminal_goes_away_it_ends(terminal, tmp_path):
    session = terminal("run", cwd=tmp_path)
    session.wait_for("nothing is there yet")
    session.child.ptyproc.fileobj.close()
    session.child.closed = session.child.ptyproc.closed = True
    assert session.child.ptyproc.wait() == 129


def test_echo_and_line_mode_are_as_before(tmp_path):
    """Through a shell of its own, which says so after the command."""
    import pexpect

    program = f"{sys.executable} -m logalign.cli follow run"
    child = pexpect.spawn(
        "/bin/sh",
        ["-c", f"stty -a > before; {program}; stty -a > after; echo ended=$?"],
        cwd=tmp_path,
        timeout=60,
        env={**os.environ, "TERM": "xterm"},
    )
    child.expect_exact("nothing is there yet")
    child.send("q")
    child.expect_exact("ended=0")
    child.close()
    assert (tmp_path / "before").read_text() == (tmp_path / "after").read_text() != ""


def test_a_suspended_command_leaves_the_terminal_and_takes_it_again(terminal, tmp_path):
    session = terminal("run", cwd=tmp_path)
    session.wait_for("nothing is there yet")
    session.signal(signal.SIGTSTP)
    os.waitpid(session.child.pid, os.WUNTRACED)
    session.wait_for(lambda _: session.sent.endswith(LEFT))
    session.signal(signal.SIGCONT)
    session.wait_for(lambda _: session.sent.count(ENTERED) == 2)
    session.wait_for("nothing is there yet")
    session.keys("q")
    assert session.end() == 0


def test_curves_are_chosen_with_the_keys(terminal, recorded):
    session = terminal(recorded)
    session.wait_for("curve: all")
    for expected in ("LAR ── plain", "k ── plain", "loss ── training", "step 1,490"):
        assert expected in session.wait_for(expected)
    session.keys("\t")
    assert "loss ──" not in session.wait_for("curve: LAR")
    session.keys("\x1b[C")
    assert "LAR ──" not in session.wait_for("curve: k ")
    session.keys("\x1bOD\x1b[D\x1b[Z")
    session.wait_for("curve: signal")
    session.keys("\x1b[A")
    assert "└0 " not in session.wait_for("last 100")
    session.keys("\x1b[B")
    assert "└0 " in session.wait_for("all readings")
    session.keys("?")
    assert "effective dimension" in session.wait_for("the training goes on")
    session.keys("?x\x1b[15~\x1b[1;5C")  # and keys that mean nothing
    session.wait_for(lambda text: "curve: signal" in text and "effective dimension" not in text)
    session.keys("q")
    assert session.end() == 0


def test_it_fits_every_size_and_follows_a_resize(terminal, recorded):
    session = terminal(recorded, rows=40, columns=132)
    session.wait_for("step 1,490")
    for rows, columns in ((24, 80), (12, 40), (6, 20), (3, 10), (1, 1), (50, 160)):
        session.resize(rows, columns)
        if columns >= 10:
            session.wait_for(
                lambda text, columns=columns: "q quit" in text and ("k ── plain" in text) == (columns >= 80)
            )
    session.keys("q")
    assert session.end() == 0
    assert b"Traceback" not in session.sent


@pytest.mark.parametrize(("env", "colored"), [({"NO_COLOR": "1"}, False), ({}, True)])
def test_without_color_it_says_the_same_in_words(terminal, recorded, env, colored):
    session = terminal(recorded, env=env)
    seen = session.wait_for("step 1,490")
    codes = set(re.findall(rb"\x1b\[([\d;]*)m", session.sent))
    numbers = {int(number) for code in codes for number in code.split(b";") if number}
    assert bool(numbers & {*range(30, 38), *range(90, 98)}) == colored
    assert not numbers & {38, 48}  # sixteen colors are enough
    assert "why" in seen


def test_a_terminal_without_braille_gets_ascii(terminal, recorded):
    session = terminal(recorded, env={"TERM": "linux"})
    session.wait_for("step 1,490")
    session.wait_for("k -- plain")
    drawn = re.sub(rb"\x1b\[[\d;?]*[A-Za-z]", b"", session.sent)
    assert drawn.isascii()


def test_a_training_that_is_killed_is_told_to_have_stalled(terminal, tmp_path):
    program = (
        "import os, signal, sys, torch, logalign\n"
        "model = torch.nn.Linear(8, 4)\n"
        "monitor = logalign.watch(model, every=1, run='run')\n"
        "for _ in range(8):\n"
        "    model(torch.randn(16, 8)).sum().backward()\n"
        "    monitor.step(loss=1.0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    log = tmp_path / "run" / "readings.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    for record in records:
        record["time"] -= 600
    log.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 8, "la')
    session = terminal("run", cwd=tmp_path)
    seen = session.wait_for("is the training still running?")
    assert "no reading for 10 min" in seen.splitlines()[0]
    assert "step 7 " in seen
    session.keys("q")
    assert session.end() == 0


def test_a_resume_a_replaced_run_and_one_that_goes_away_are_followed(terminal, write_run, tmp_path):
    run = write_run()
    session = terminal(run.path)
    session.wait_for("step 190 ")
    with (run.path / "readings.jsonl").open("a") as log:
        log.write('{"step": 100, "lar": 0.5, "n": 64, "m": 512}\n')
        offset = log.tell() - len('{"step": 100, "lar": 0.5, "n": 64, "m": 512}\n')
    with (run.path / "events.jsonl").open("a") as log:
        log.write(json.dumps({"event": "resume", "step": 100, "readings_offset": offset}) + "\n")
    session.wait_for("step 100 ")
    session.wait_for("11 readings")
    (run.path / "run.json").rename(tmp_path / "away")
    session.wait_for("its run.json is gone")
    (tmp_path / "away").rename(run.path / "run.json")
    session.wait_for(lambda text: "gone" not in text)
    session.keys("q")
    assert session.end() == 0


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"schema_version": 99}', "expected schema version 1 or earlier, found 99; upgrade logalign"),
        ('{"schema_ver', "expected a JSON object, found damage"),
    ],
)
def test_what_is_no_run_is_one_error_on_a_terminal_given_back(terminal, tmp_path, content, expected):
    (tmp_path / "run.json").write_text(content)
    session = terminal(tmp_path)
    assert session.end() == 1
    assert given_back(session)
    after = session.sent[session.sent.rfind(LEFT) :].decode()
    assert "error: " in after
    assert expected in after
    assert "Traceback" not in after


def test_damage_that_comes_later_is_told_and_then_an_error(terminal, write_run):
    run = write_run()
    session = terminal(run.path)
    session.wait_for("step 190 ")
    with (run.path / "readings.jsonl").open("a") as log:
        log.write('oops\n{"step": 200, "lar": 0.5}\n')
    assert session.end() == 1
    assert b"line 21: expected a JSON object, found damage" in session.sent[session.sent.rfind(LEFT) :]


HOSTILE = "\x1b[31m\x1b]0;owned\x07[bold red]x[/] \u202e\r\n\x00\x9b2J"


def test_nothing_of_a_run_reaches_the_terminal_as_a_command(terminal, write_run):
    run = write_run(
        lars=[0.5, 0.6, None],
        meta={
            "main": HOSTILE,
            "sites": {HOSTILE: {"module": HOSTILE, "kind": HOSTILE, "how": HOSTILE, "m": 1, "n": HOSTILE}},
        },
        sites=("unembedding",),
        reason=HOSTILE,
        site=HOSTILE,
    )
    with (run.path / "events.jsonl").open("a") as log:
        log.write(json.dumps({"event": "warning", "step": 5, "message": HOSTILE}) + "\n")
    hostile_path = run.path.parent / "a\x1b[41m[bold]b"
    run.path.rename(hostile_path)
    session = terminal(hostile_path, columns=240)
    seen = session.wait_for("warning at step 5")
    assert "[bold red]x[/]" in seen  # as it stands, not as markup
    assert "a?[41m[bold]b" in seen
    session.keys("q")
    assert session.end() == 0
    for command in (b"\x1b[41m", b"\x1b]0", b"\x07", b"\x9b2J", "\u202e".encode(), b"\x00"):
        assert command not in session.sent


def test_a_long_run_is_caught_up_with_while_keys_are_answered(terminal, tmp_path):
    path = tmp_path / "log.jsonl"
    with path.open("w") as log:
        for step in range(30_000):
            log.write(
                json.dumps({"step": step, "lar": 0.5 + step * 1e-6, "n": 64, "m": 512, "loss": 3.0, "epoch": 0.1})
                + "\n"
            )
    session = terminal(path)
    session.wait_for("catching up")
    session.keys("\t")
    assert "catching up" in session.wait_for("curve: LAR")
    session.keys("q")
    assert session.end() == 0
    assert b"running" not in session.sent  # it was not waited for
