"""Small real trainings that show what the log-alignment ratio tells; each writes its runs and a report.

`label_noise`, `language_model` and `grokking` have a function `run` each, which `logalign demo` calls. Importing this
package imports no tensor framework; the modules in it need the extra `demo`.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoResult:
    """What a demo left behind: its report, its run folders, and in two sentences what was seen."""

    report: Path
    runs: list[Path]
    summary: str
