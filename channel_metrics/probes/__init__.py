"""Probes, without the parts that depend on a trainer."""
