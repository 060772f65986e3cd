"""Checkpoints: the spectra of weights on disk, one matrix at a time; no model is built and nothing is trained.

`spectra_of(path)` reads the head of one checkpoint, or any of its 2-D weights; `logalign spectra` is the command.
"""

from logalign.checkpoints.spectra import CheckpointSpectra, spectra_of
from logalign.checkpoints.spectrum import WeightSpectrum

__all__ = ["CheckpointSpectra", "WeightSpectrum", "spectra_of"]
