"""A run that grows, in the terminal: what its readings say so far, drawn anew as they come."""
