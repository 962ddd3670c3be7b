"""Readers of log formats, and the meaning of log keys."""
