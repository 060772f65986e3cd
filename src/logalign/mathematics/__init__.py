"""The mathematics: energies of a linear map, LAR, spectra; of arrays of any framework."""
