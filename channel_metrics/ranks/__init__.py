"""Sums of one rank -> sums of all ranks."""
