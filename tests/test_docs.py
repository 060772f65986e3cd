"""The code that README and docs show is run as it stands there."""

import re
from pathlib import Path

import pytest
import torch

import logalign

ROOT = Path(__file__).parent.parent


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def in_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("in_empty_folder")
def test_the_example_of_the_readme_runs_and_leaves_a_run():
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5))
    names = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "loss_function": torch.nn.CrossEntropyLoss(),
        "batches": [(torch.randn(16, 8), torch.randint(5, (16,))) for _ in range(21)],
    }
    example = next(block for block in blocks("README.md") if "logalign.watch" in block)
    exec(example, names)
    assert [reading.step for reading in logalign.open_run("runs/first").readings] == [0, 10, 20]


@pytest.mark.usefixtures("in_empty_folder")
def test_a_run_written_by_hand_as_the_format_shows_is_read():
    (writer,) = blocks("docs/run-format.md")
    exec(writer, {})
    readings = logalign.open_run("by-hand").readings
    assert len(readings) == 100
    assert readings[0].lar == 0.5


def test_the_run_format_names_every_field_of_a_reading():
    from logalign.runs.reading import FIELDS

    page = (ROOT / "docs/run-format.md").read_text()
    assert [name for name in FIELDS if f"`{name}`" not in page] == []


def test_every_test_that_the_page_of_stacks_names_is_there():
    page = (ROOT / "docs/stacks.md").read_text()
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    named = set(re.findall(r"`(test_\w+)`", page))
    assert named - there == set()
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    untested = [row for row in rows if "`test_" not in row and "*not measured*" not in row]
    assert all(row.endswith("| test |") for row in untested), untested


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    named = set(re.findall(r"^::: logalign\.(\w+)$", page, re.MULTILINE)) - {"errors"}
    assert named == set(logalign.__all__) - {"LogAlignError"}
