"""logalign tells, during training and without held-out data, whether a network memorizes or generalizes.

It measures the log-alignment ratio (LAR) of a linear layer, above all of the unembedding, from three sums of
squares of the forward pass. `logalign.watch(model)` does so for a PyTorch model, `logalign.lar(weight, inputs)` for
arrays at hand; `logalign.diagnose(run)` says what a recorded run shows.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from logalign.common.version import __version__ as __version__

_HOME = {
    "Baseline": "logalign.diagnosis.baseline",
    "Energies": "logalign.mathematics.energies",
    "GrokDetector": "logalign.diagnosis.grokking",
    "LogAlignError": "logalign.errors",
    "OverfitDetector": "logalign.diagnosis.overfitting",
    "Reading": "logalign.runs.reading",
    "Readings": "logalign.runs.reading",
    "Verdict": "logalign.diagnosis.verdict",
    "diagnose": "logalign.diagnosis.detector",
    "effective_dim": "logalign.mathematics.energies",
    "lar": "logalign.mathematics.energies",
    "open_run": "logalign.runs.run",
    "revisits": "logalign.samples.drift",
    "spectra": "logalign.mathematics.spectrum",
    "watch": "logalign.recording.monitor",
}

if TYPE_CHECKING:
    from logalign.diagnosis.baseline import Baseline as Baseline
    from logalign.diagnosis.detector import diagnose as diagnose
    from logalign.diagnosis.grokking import GrokDetector as GrokDetector
    from logalign.diagnosis.overfitting import OverfitDetector as OverfitDetector
    from logalign.diagnosis.verdict import Verdict as Verdict
    from logalign.errors import LogAlignError as LogAlignError
    from logalign.mathematics.energies import Energies as Energies
    from logalign.mathematics.energies import effective_dim as effective_dim
    from logalign.mathematics.energies import lar as lar
    from logalign.mathematics.spectrum import spectra as spectra
    from logalign.recording.monitor import watch as watch
    from logalign.runs.reading import Reading as Reading
    from logalign.runs.reading import Readings as Readings
    from logalign.runs.run import open_run as open_run
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
