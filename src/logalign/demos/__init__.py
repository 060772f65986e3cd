"""Small real trainings that show what the log-alignment ratio tells.

Each training writes its runs and a report. `label_noise`, `language_model` and `grokking` each have a function `run`,
which `logalign demo` calls. The package itself imports no tensor framework. Its modules need the extra `demo`.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoResult:
    """The results of a demo: its report, its run folders, and its findings in two sentences."""

    report: Path
    runs: list[Path]
    summary: str
