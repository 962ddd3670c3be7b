"""Shows the log of a running job in the terminal."""
