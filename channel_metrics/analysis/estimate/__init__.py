"""Estimates channel losses from the losses of whole windows."""
