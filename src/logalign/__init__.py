"""logalign shows, during training and without held-out data, whether a network memorizes or generalizes.

It measures the log-alignment ratio (LAR) of a linear layer, mainly the unembedding, from three sums of squares of the
forward pass. `logalign.watch(model)` measures a PyTorch model. `logalign.lar(weight, inputs)` measures arrays.
`logalign.diagnose(run)` judges a recorded run.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from logalign.common.version import __version__ as __version__

_HOME = {
    "Baseline": "logalign.diagnosis.baseline",
    "Detector": "logalign.diagnosis.detector",
    "Energies": "logalign.mathematics.energies",
    "GrokThresholds": "logalign.diagnosis.grokking",
    "LogAlignError": "logalign.errors",
    "Monitor": "logalign.recording.monitor",
    "OverfitThresholds": "logalign.diagnosis.overfit_rule",
    "Ranking": "logalign.diagnosis.ranking",
    "Reading": "logalign.runs.reading",
    "Readings": "logalign.runs.reading",
    "Revisits": "logalign.samples.drift",
    "Run": "logalign.runs.run",
    "Spectra": "logalign.mathematics.spectrum",
    "Verdict": "logalign.diagnosis.verdict",
    "diagnose": "logalign.diagnosis.detector",
    "effective_dim": "logalign.mathematics.energies",
    "export": "logalign.runs.export",
    "lar": "logalign.mathematics.energies",
    "open_run": "logalign.runs.run",
    "rank": "logalign.diagnosis.ranking",
    "revisits": "logalign.samples.drift",
    "spectra": "logalign.mathematics.spectrum",
    "watch": "logalign.recording.monitor",
    "write_run_report": "logalign.report.run_report",
}

if TYPE_CHECKING:
    from logalign.diagnosis.baseline import Baseline as Baseline
    from logalign.diagnosis.detector import Detector as Detector
    from logalign.diagnosis.detector import diagnose as diagnose
    from logalign.diagnosis.grokking import GrokThresholds as GrokThresholds
    from logalign.diagnosis.overfit_rule import OverfitThresholds as OverfitThresholds
    from logalign.diagnosis.ranking import Ranking as Ranking
    from logalign.diagnosis.ranking import rank as rank
    from logalign.diagnosis.verdict import Verdict as Verdict
    from logalign.errors import LogAlignError as LogAlignError
    from logalign.mathematics.energies import Energies as Energies
    from logalign.mathematics.energies import effective_dim as effective_dim
    from logalign.mathematics.energies import lar as lar
    from logalign.mathematics.spectrum import Spectra as Spectra
    from logalign.mathematics.spectrum import spectra as spectra
    from logalign.recording.monitor import Monitor as Monitor
    from logalign.recording.monitor import watch as watch
    from logalign.report.run_report import write_run_report as write_run_report
    from logalign.runs.export import export as export
    from logalign.runs.reading import Reading as Reading
    from logalign.runs.reading import Readings as Readings
    from logalign.runs.run import Run as Run
    from logalign.runs.run import open_run as open_run
    from logalign.samples.drift import Revisits as Revisits
    from logalign.samples.drift import revisits as revisits

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'logalign' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
