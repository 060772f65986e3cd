"""The mathematics: energies of a linear map, LAR and spectra, for arrays of any framework."""
