"""TensorBoard logs that the real SummaryWriter wrote, and what is made of them."""

import subprocess
import sys

import pytest
from torch.utils.tensorboard import SummaryWriter

from logalign import diagnose, open_run
from logalign.errors import RunError
from logalign.runs.foreign.tensorboard import event_folders


def write(folder, scalars, **options):
    """Write (tag, step, value) triples, as a training would."""
    with SummaryWriter(str(folder), **options) as writer:
        for tag, step, value in scalars:
            writer.add_scalar(tag, value, step, walltime=1_700_000_000 + step)


def table(prefix="logalign/", steps=range(0, 50, 10)):
    for step in steps:
        yield f"{prefix}lar", step, 0.5 + step / 1000
        yield f"{prefix}lar_centered", step, 0.4
        yield f"{prefix}loss", step, 3.0 - step / 100
        yield f"{prefix}epoch", step, step / 100
        yield f"{prefix}n", step, 64
        yield f"{prefix}m", step, 512


@pytest.mark.parametrize("prefix", ["logalign/", ""])
def test_a_log_reads_as_a_run(tmp_path, prefix):
    write(tmp_path / "log", table(prefix))
    run = open_run(tmp_path / "log")
    assert (run.meta, run.events) == ({}, [])
    columns = run.columns()
    assert columns["step"].tolist() == [0, 10, 20, 30, 40]
    assert columns["lar"] == pytest.approx([0.5, 0.51, 0.52, 0.53, 0.54], abs=1e-7)
    assert columns["loss"] == pytest.approx([3.0, 2.9, 2.8, 2.7, 2.6])
    assert columns["time"][1] == 1_700_000_010
    assert (columns["n"].tolist(), columns["m"].tolist()) == ([64] * 5, [512] * 5)
    assert {reading.site for reading in run.readings} == {"unembedding"}
    assert diagnose(tmp_path / "log").outcome == "healthy"


def test_what_is_taken_and_what_is_not(tmp_path):
    write(
        tmp_path / "log",
        [
            *table(),
            ("lar", 0, 0.9),
            ("val_loss", 20, 4.5),
            ("logalign/gap", 20, 0.5),
            ("accuracy", 20, 1.0),
            ("logalign/step", 0, 7.0),
        ],
    )
    readings = open_run(tmp_path / "log").readings
    assert readings[0].lar == pytest.approx(0.5)
    assert [dict(reading.extra) for reading in readings] == [{}, {}, {"val_loss": 4.5, "gap": 0.5}, {}, {}]


def test_what_is_logged_at_other_steps_stands_until_the_next_value(tmp_path):
    scalars = [("lar", step, 0.5) for step in (0, 50, 100)]
    scalars += [("loss", step, 5.0 - step / 100) for step in (19, 39, 59, 79)] + [("lr", 0, 0.25)]
    write(tmp_path / "log", scalars)
    readings = open_run(tmp_path / "log").readings
    assert [reading.loss for reading in readings] == pytest.approx([None, 4.61, 4.21])
    assert [reading.lr for reading in readings] == [0.25] * 3
    assert [reading.epoch for reading in readings] == [None] * 3


def test_several_event_files_and_a_resume(tmp_path):
    write(tmp_path / "log", [("lar", step, 0.5) for step in (0, 10, 20, 30)], filename_suffix=".a")
    write(tmp_path / "log", [("lar", step, 0.75) for step in (20, 25)], filename_suffix=".b")
    files = sorted((tmp_path / "log").iterdir())
    assert len(files) == 2
    # The order of the files is that of the seconds in their names, which here may be the same second.
    for i, file in enumerate(sorted(files, key=lambda each: each.name[-1])):
        file.rename(file.with_name(f"events.out.tfevents.{1_700_000_000 + i}.host"))
    readings = open_run(tmp_path / "log").readings
    assert [(reading.step, reading.lar) for reading in readings] == [(0, 0.5), (10, 0.5), (20, 0.75), (25, 0.75)]


def test_scalars_in_the_form_of_tensors(tmp_path):
    with SummaryWriter(str(tmp_path / "log")) as writer:
        writer.add_scalar("lar", 0.625, 3, new_style=True)
        writer.add_text("note", "no scalar", 3)
    assert [(reading.step, reading.lar) for reading in open_run(tmp_path / "log").readings] == [(3, 0.625)]


def test_an_undefined_value_is_undefined(tmp_path):
    write(tmp_path / "log", [("lar", 0, 0.5), ("lar", 10, float("nan"))])
    assert [reading.lar for reading in open_run(tmp_path / "log").readings] == [0.5, None]


def test_a_log_in_a_folder_below_and_several_of_them(tmp_path):
    write(tmp_path / "logs" / "version_0", table())
    assert len(open_run(tmp_path / "logs").readings) == 5
    write(tmp_path / "logs" / "version_1", table())
    assert [folder.name for folder in event_folders(tmp_path / "logs")] == ["version_0", "version_1"]
    with pytest.raises(RunError) as caught:
        open_run(tmp_path / "logs")
    assert str(caught.value) == (
        f"{tmp_path / 'logs'}: expected one folder with TensorBoard event files, found version_0, version_1; "
        "give one of them"
    )


def test_a_log_without_lar_and_without_a_loss(tmp_path):
    write(tmp_path / "log", [("accuracy", 0, 1.0)])
    with pytest.raises(RunError) as caught:
        open_run(tmp_path / "log")
    assert str(caught.value) == (
        f"{tmp_path / 'log'}: expected 'logalign/lar', 'lar' or a loss such as 'loss', 'train/loss' or 'val_loss' in "
        "the TensorBoard log, found accuracy; record LAR with logalign.watch(trackers=...)"
    )


def test_a_value_that_no_reading_has(tmp_path):
    write(tmp_path / "log", [("lar", -5, 0.5)])
    with pytest.raises(RunError, match=r"log, step -5: step: expected a whole number from 0 on"):
        open_run(tmp_path / "log")


def test_a_run_folder_that_holds_event_files_too_is_a_run_folder(tmp_path, write_run):
    run = write_run()
    write(run.path, table())
    assert open_run(run.path).readings == run.readings


def test_a_missing_extra_is_named_with_the_command(tmp_path):
    write(tmp_path / "log", table())
    script = (
        "import sys; sys.modules['tensorboard'] = None\n"
        "from logalign import open_run\n"
        "from logalign.errors import MissingExtraError\n"
        "try:\n"
        "    open_run(sys.argv[1])\n"
        "except MissingExtraError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "log")], capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        f'{tmp_path / "log"}: reading TensorBoard logs needs tensorboard: pip install "logalign[tensorboard]"\n'
    )
