"""Logs in every format, read into one table."""
