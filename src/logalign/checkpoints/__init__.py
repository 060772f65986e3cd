"""Checkpoints: the spectra of weights on disk, one matrix at a time, without building or training a model.

`spectra_of(path)` reads the head of one checkpoint, or any of its 2-D weights. The command is `logalign spectra`.
"""

from logalign.checkpoints.spectra import CheckpointSpectra, spectra_of
from logalign.checkpoints.spectrum import WeightSpectrum

__all__ = ["CheckpointSpectra", "WeightSpectrum", "spectra_of"]
