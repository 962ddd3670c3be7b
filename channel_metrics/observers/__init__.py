"""Functions that get each closed window."""
