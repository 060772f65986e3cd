"""Importing logalign is light: no framework is loaded that the user has not loaded."""

import subprocess
import sys

import pytest

import logalign

HEAVY = (
    "torch",
    "jax",
    "matplotlib",
    "plotly",
    "pandas",
    "polars",
    "sklearn",
    "scipy",
    "tensorboard",
    "tokenizers",
    "jinja2",
    "typer",
    "rich",
)


def loaded_by(code: str) -> set[str]:
    """The heavy packages that are loaded after `code` ran in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint('loaded:', *(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].removeprefix("loaded:").split())


def test_importing_the_package_loads_no_framework_and_prints_nothing():
    assert loaded_by("import logalign") == set()
    done = subprocess.run([sys.executable, "-c", "import logalign"], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_the_check_itself_sees_what_is_loaded():
    assert "jinja2" in loaded_by("import jinja2")


def test_public_names():
    assert logalign.__all__ == [
        "Baseline",
        "Detector",
        "Energies",
        "GrokThresholds",
        "LogAlignError",
        "Monitor",
        "OverfitThresholds",
        "Ranking",
        "Reading",
        "Readings",
        "Revisits",
        "Run",
        "Spectra",
        "Verdict",
        "diagnose",
        "effective_dim",
        "export",
        "lar",
        "open_run",
        "rank",
        "revisits",
        "spectra",
        "watch",
        "write_run_report",
    ]
    for name in logalign.__all__:
        assert getattr(logalign, name).__name__ == name


@pytest.mark.parametrize(
    "name", ["lar", "Energies", "Readings", "open_run", "diagnose", "Detector", "OverfitThresholds", "Baseline", "Run"]
)
def test_what_needs_no_framework_loads_none(name):
    assert loaded_by(f"import logalign; logalign.{name}") == set()


def test_command_line_help_loads_no_framework():
    assert loaded_by(
        "from logalign.cli import app\n"
        "try:\n"
        "    app(['--help'])\n"
        "except SystemExit:\n"
        "    pass"
    ) == {"typer", "rich"}  # fmt: skip
