"""Channels in records and batches: collators, scans, files."""
