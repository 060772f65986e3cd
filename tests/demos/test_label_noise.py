"""The label-noise demo, end to end on few steps; the whole story is a slow test."""

import re
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console

from logalign import open_run
from logalign.demos import label_noise
from logalign.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture
def console() -> Console:
    return Console(file=StringIO(), width=200)


def test_noise_is_a_share_of_the_training_labels_and_the_rest_is_the_same():
    digits = label_noise.load(noise=0.4, seed=0, device=CPU)
    changed = (digits.labels != digits.noisy).float().mean().item()
    # Drawn from all ten labels, a tenth of the random ones is right by chance.
    assert changed == pytest.approx(0.4 * 0.9, abs=0.03)
    assert len(digits.labels) + len(digits.held_out_labels) == 1797
    clean = label_noise.load(noise=0.0, seed=0, device=CPU)
    assert torch.equal(clean.noisy, clean.labels)
    assert torch.equal(clean.images, digits.images)
    other = label_noise.load(noise=0.4, seed=1, device=CPU)
    assert not torch.equal(other.held_out_labels, digits.held_out_labels)


def test_a_short_run_leaves_two_runs_and_a_report_and_does_not_claim_the_pattern(tmp_path, console):
    result = label_noise.run(out=tmp_path / "demo", steps=30, console=console)
    assert [path.name for path in result.runs] == ["clean", "noisy"]
    for path in result.runs:
        columns = open_run(path).columns()
        assert list(columns["step"]) == [0, 10, 20]
        assert np.isfinite(columns["val_loss"]).all()
        assert (columns["m"] == 10).all()
        assert (columns["n"] == 256).all()
    assert "The expected pattern was not seen here" in result.summary
    page = result.report.read_text()
    assert "<svg" in page
    assert result.summary in page.replace("&#39;", "'")
    printed = console.file.getvalue()
    assert result.summary in printed
    assert str(result.report) in printed


def test_a_finished_demo_only_rebuilds_its_report(tmp_path, console):
    first = label_noise.run(out=tmp_path / "demo", steps=12, console=console)
    log = (first.runs[0] / "readings.jsonl").read_bytes()
    page = first.report.read_bytes()
    first.report.unlink()
    second = label_noise.run(out=tmp_path / "demo", steps=12, console=console)
    assert (second.runs[0] / "readings.jsonl").read_bytes() == log
    assert second.report.read_bytes() == page


def test_fresh_begins_anew_with_other_settings(tmp_path, console):
    label_noise.run(out=tmp_path / "demo", steps=12, console=console)
    with pytest.raises(InputError, match=r"noise 0\.4 there and 0\.1 here"):
        label_noise.run(out=tmp_path / "demo", steps=12, noise=0.1, console=console)
    result = label_noise.run(out=tmp_path / "demo", steps=12, noise=0.1, fresh=True, console=console)
    assert open_run(result.runs[1]).meta["settings"]["noise"] == 0.1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"steps": 0}, "--steps: expected at least 1, found 0"),
        ({"noise": 1.5}, r"--noise: expected a share between 0 and 1, found 1\.5"),
        ({"noise": float("nan")}, "--noise: expected a share between 0 and 1, found nan"),
        ({"device": "toaster"}, "--device toaster: expected a device"),
    ],
)
def test_bad_options_write_nothing(tmp_path, console, option, message):
    with pytest.raises(InputError, match=message):
        label_noise.run(out=tmp_path / "demo", console=console, **option)
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_lar_falls_for_noisy_labels_before_the_held_out_loss_turns_up(tmp_path, console):
    result = label_noise.run(out=tmp_path / "demo", console=console)
    clean, noisy = (open_run(path).columns() for path in result.runs)
    assert clean["train_loss"][-1] < 0.001
    assert noisy["train_loss"][-1] < 0.1
    assert clean["lar_centered"][-1] - noisy["lar_centered"][-1] > 0.1
    assert clean["lar"][-1] - noisy["lar"][-1] > 0.05
    times = re.search(
        r"known at step (\d+), (\d+) steps before the held-out loss.* turned up at step (\d+)", result.summary
    )
    assert times is not None, result.summary
    known, earlier, turned = map(int, times.groups())
    assert turned - known == earlier > 0
