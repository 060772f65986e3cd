"""TensorBoard: event files of our own and the real SummaryWriter, read again as runs and by TensorBoard itself."""

import subprocess
import sys
from dataclasses import replace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from logalign import diagnose, open_run
from logalign.diagnosis.verdict import Verdict
from logalign.errors import RunError
from logalign.runs.reading import Reading, Readings
from logalign.trackers.tensorboard import open_tracker, wrap
from logalign.trackers.tracker import Trackers

FLOAT32 = 1e-6


def test_event_files_by_name_read_as_the_run_that_they_show(recorded, tools, tmp_path):
    show, check_same = tools
    show("tensorboard", recorded, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]
    check_same(open_run(tmp_path / "tensorboard").readings, recorded, rel=FLOAT32)
    shown, own = diagnose(tmp_path / "tensorboard"), diagnose(recorded)
    assert own.outcome == "overfitting"
    assert (shown.outcome, shown.regime, shown.since_step) == (own.outcome, own.regime, own.since_step)


def test_a_summary_writer_of_the_user(recorded, tools, tmp_path):
    show, check_same = tools
    with SummaryWriter(str(tmp_path / "mine")) as writer:
        show(writer, recorded[:40], after=lambda reading: writer.add_scalar("train/loss", -1.0, reading.step))
        writer.add_scalar("still/open", 1.0, 1)
    check_same(open_run(tmp_path / "mine").readings, recorded[:40], rel=FLOAT32)
    log = EventAccumulator(str(tmp_path / "mine"))
    log.Reload()
    assert [event.value for event in log.Scalars("train/loss")] == [-1.0] * 40
    assert log.Scalars("still/open")[0].value == 1.0


@pytest.mark.parametrize("own", [True, False])
def test_the_verdict_is_a_text_that_tensorboard_knows(own, recorded, tools, tmp_path):
    show, _ = tools
    if own:
        show("tensorboard", recorded, folder=tmp_path)
    else:
        with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
            show(writer, recorded)
    log = EventAccumulator(str(tmp_path / "tensorboard"))
    log.Reload()
    (tag,) = log.PluginTagToContent("text")
    assert tag.startswith("logalign/verdict_text")
    texts = [event.tensor_proto.string_val[0].decode() for event in log.Tensors(tag)]
    assert texts[-1].startswith("overfitting (decline regime) at step ")
    assert "\n\ndo: " in texts[-1]


def reading(step, lar=0.5, **fields):
    return Reading(step=step, lar=lar, n=64, m=512, **fields)


def verdict():
    return Verdict(outcome="healthy", regime="decline", step=0, since_step=0, reason="", suggestion="")


def test_a_reading_is_in_the_file_when_log_returns(tmp_path):
    tracker = open_tracker(tmp_path)
    tracker.log({"logalign/lar": 0.25, "logalign/n": 64}, step=10)
    assert [(each.step, each.lar) for each in open_run(tmp_path / "tensorboard").readings] == [(10, 0.25)]
    tracker.close()


def test_a_resumed_training_supersedes_what_was_recorded_beyond(tmp_path):
    for first, last, lar in ((0, 100, 0.5), (40, 60, 0.75)):
        tracker = open_tracker(tmp_path)
        for step in range(first, last, 10):
            tracker.log({"logalign/lar": lar, **({"logalign/val_loss": 3.0} if lar == 0.5 else {})}, step=step)
        tracker.close()
    # The order of event files is that of the seconds in their names, which here may be the same second.
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: int(path.name.split(".")[-1]))
    for i, file in enumerate(files):
        file.rename(file.with_name(f"events.out.tfevents.{1_700_000_000 + i}.host"))
    readings = open_run(tmp_path / "tensorboard").readings
    assert [each.step for each in readings] == [0, 10, 20, 30, 40, 50]
    assert [each.lar for each in readings] == [0.5] * 4 + [0.75] * 2
    assert [each.extra.get("val_loss") for each in readings] == [3.0] * 4 + [None] * 2


def test_a_training_that_goes_back_in_the_same_process(tmp_path):
    tracker = open_tracker(tmp_path)
    for step in (0, 10, 20, 30, 10):
        tracker.log({"logalign/lar": 0.5}, step=step)
    tracker.close()
    assert [each.step for each in open_run(tmp_path / "tensorboard").readings] == [0, 10]


def test_other_layers_are_sites_of_their_own_and_an_undefined_reading_is_there(tmp_path):
    taken = Readings(
        {
            "unembedding": reading(0, None, loss=2.0, nonfinite=3, reason="the outputs hold NaN"),
            "blocks.0/up": replace(reading(0, 0.25), site="blocks.0/up"),
        },
        main="unembedding",
    )
    trackers = Trackers([open_tracker(tmp_path)], warn=lambda key, message: pytest.fail(message))
    trackers.log(taken, verdict())
    trackers.log(Readings({"unembedding": reading(10)}, main="unembedding"), verdict())
    trackers.close()
    found = open_run(tmp_path / "tensorboard").readings
    assert [(each.step, each.site, each.lar) for each in found] == [
        (0, "unembedding", None),
        (0, "blocks.0/up", 0.25),
        (10, "unembedding", 0.5),
    ]
    assert (found[0].loss, found[0].nonfinite, found[1].n, found[1].m) == (2.0, 3, 64, 512)
    assert found[0].extra == {}


def test_without_a_run_folder_it_writes_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tracker = open_tracker(None)
    tracker.log({"logalign/lar": 0.5}, step=0)
    tracker.close()
    assert len(open_run(tmp_path / "logalign-tensorboard").readings) == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(RunError, match="tensorboard: expected a folder that can be written, found: "):
        open_tracker(tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_is_told_of_and_no_more(tmp_path):
    script = (
        "import resource, signal, sys, threading\n"
        "from pathlib import Path\n"
        "from logalign.trackers.tensorboard import open_tracker\n"
        "from logalign.trackers.tracker import Trackers\n"
        "from logalign.diagnosis.verdict import Verdict\n"
        "from logalign.runs.reading import Reading, Readings\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "threading.excepthook = lambda *_: None\n"
        "trackers = Trackers([open_tracker(Path(sys.argv[1]))], warn=lambda key, message: print(message))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "verdict = Verdict(outcome='healthy', regime='decline', step=0, since_step=0, reason='', suggestion='')\n"
        "for step in range(100):\n"
        "    trackers.log(Readings({'unembedding': Reading(step=step, lar=0.5)}, main='unembedding'), verdict)\n"
        "trackers.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("EventTracker failed and gets no more readings (")
    assert line.endswith("File too large); training goes on")
    assert len(open_run(tmp_path / "tensorboard").readings) > 5


def test_what_is_no_summary_writer():
    assert wrap(object()) is None
    assert wrap(print) is None


def test_it_needs_no_framework(tmp_path):
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from logalign.trackers.tensorboard import open_tracker\n"
        "tracker = open_tracker(Path(sys.argv[1]))\n"
        "tracker.log({'logalign/lar': 0.5}, step=0)\n"
        "tracker.close()\n"
        "print(sorted({'tensorflow', 'jax', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
