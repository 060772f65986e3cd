"""A demo that is killed goes on where its last checkpoint was, and ends with the numbers of one that was not."""

import os
import signal
import subprocess
import sys
import time
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

import logalign.demos
from logalign import open_run
from logalign.demos import label_noise
from logalign.demos.training import CHECKPOINT

STEPS = 600


def test_importing_the_demos_imports_no_framework():
    code = "import logalign.demos, sys; assert not {'torch', 'sklearn', 'matplotlib', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert logalign.demos.DemoResult is not None


@pytest.mark.slow
def test_a_killed_demo_ends_with_the_same_numbers(tmp_path):
    whole = label_noise.run(out=tmp_path / "whole", steps=STEPS, console=Console(file=StringIO()))
    out = tmp_path / "killed"
    code = (
        "from pathlib import Path; from logalign.demos import label_noise; "
        f"label_noise.run(out=Path({str(out)!r}), steps={STEPS})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (out / "clean" / CHECKPOINT).exists():
            assert process.poll() is None, "the demo ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (out / "noisy" / CHECKPOINT).exists()
    resumed = label_noise.run(out=out, steps=STEPS, console=Console(file=StringIO()))
    for expected, found in zip(whole.runs, resumed.runs, strict=True):
        before, after = open_run(expected).columns(), open_run(found).columns()
        for name, values in before.items():
            if name != "time":
                np.testing.assert_array_equal(after[name], values, err_msg=name)
    assert resumed.summary == whole.summary
