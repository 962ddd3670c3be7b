"""The log of a running job, live in the terminal."""
