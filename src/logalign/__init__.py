"""logalign tells, during training and without held-out data, whether a network memorizes or generalizes.

It measures the log-alignment ratio (LAR) of a linear layer, above all of the unembedding, from three sums of
squares of the forward pass. `logalign.watch(model)` does so for a PyTorch model, `logalign.lar(weight, inputs)` for
arrays at hand; `logalign.diagnose(run)` says what a recorded run shows.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Baseline": "logalign.diagnosis.baseline",
    "Energies": "logalign.energies",
    "GrokDetector": "logalign.diagnosis.grokking",
    "LogAlignError": "logalign.errors",
    "OverfitDetector": "logalign.diagnosis.overfitting",
    "Reading": "logalign.readings",
    "Readings": "logalign.readings",
    "Verdict": "logalign.diagnosis.verdict",
    "diagnose": "logalign.diagnosis.detector",
    "effective_dim": "logalign.energies",
    "lar": "logalign.energies",
    "open_run": "logalign.runlog",
    "revisits": "logalign.samples.drift",
    "spectra": "logalign.spectrum",
    "watch": "logalign.monitor",
}

if TYPE_CHECKING:
    from logalign.diagnosis.baseline import Baseline as Baseline
    from logalign.diagnosis.detector import diagnose as diagnose
    from logalign.diagnosis.grokking import GrokDetector as GrokDetector
    from logalign.diagnosis.overfitting import OverfitDetector as OverfitDetector
    from logalign.diagnosis.verdict import Verdict as Verdict
    from logalign.energies import Energies as Energies
    from logalign.energies import effective_dim as effective_dim
    from logalign.energies import lar as lar
    from logalign.errors import LogAlignError as LogAlignError
    from logalign.monitor import watch as watch
    from logalign.readings import Reading as Reading
    from logalign.readings import Readings as Readings
    from logalign.runlog import open_run as open_run
    from logalign.samples.drift import revisits as revisits
    from logalign.spectrum import spectra as spectra

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'logalign' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
