"""Sums over 8 devices against one process that sees all tokens and the whole weight."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = (
    "tokens",
    "tokens, Gram form",
    "tokens, product",
    "tokens, when",
    "rows",
    "rows, product",
    "rows, padded",
    "tokens and rows",
    "tokens and rows, product",
    "tokens and rows, padded",
    "tokens, jit",
    "rows, jit, padded",
    "tokens and rows, jit",
    "tokens and rows, jit, product",
    "gathered weight",
    "each device alone",
    "not now",
    "gradients",
)


@pytest.fixture(scope="module")
def found():
    script = Path(__file__).with_name("shard_cases.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_case_is_looked_at(found):
    assert tuple(found) == CASES


@pytest.mark.parametrize("case", CASES)
def test_eight_devices_find_what_one_does(found, case):
    seen, truth = found[case]
    if "bits" in truth:
        assert seen == truth
    else:
        assert seen == pytest.approx(truth, rel=1e-6, abs=1e-6)
