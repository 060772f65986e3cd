"""What readings mean: consumers of runs, free of any tensor framework."""
