"""Follow a growing run in the terminal: show what its readings say so far, redrawn as they come."""
