"""Every script in examples/ runs as it stands, and the pages show the lines that it adds to a user's own training."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = sorted(page for page in (ROOT / "docs" / "integrations").glob("*.md") if page.stem != "index")
MOST_LINES = 10


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=[script.stem for script in EXAMPLES])
def test_an_example_runs(script, tmp_path):
    quiet = {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shown = re.search(r"\b(lar|healthy|overfitting)\b", done.stdout, re.IGNORECASE)  # a reading or a verdict
    assert shown, done.stdout[-3000:]


def added(block: str) -> list[str]:
    """The lines that a diff adds, without indentation."""
    return [line[1:].strip() for line in block.splitlines() if line.startswith("+") and line[1:].strip()]


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_a_page_shows_at_most_ten_lines_that_stand_in_an_example(page):
    text = page.read_text()
    scripts = [
        {line.strip() for line in script.read_text().splitlines()}
        for script in EXAMPLES
        if f"examples/{script.name}" in text
    ]
    assert scripts, f"{page.name} names no script of examples/"
    blocks = [added(block) for block in re.findall(r"^```diff\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
    assert blocks, f"{page.name} shows no diff"
    for block in blocks:
        assert 1 <= len(block) <= MOST_LINES
        assert any(set(block) <= script for script in scripts), f"no example has all of: {block}"


def test_every_example_stands_on_a_page():
    pages = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    assert [script.name for script in EXAMPLES if f"examples/{script.name}" not in pages] == []
