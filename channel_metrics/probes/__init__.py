"""Probes: a few samples per dataset, measured every so many steps. The parts without a trainer."""
