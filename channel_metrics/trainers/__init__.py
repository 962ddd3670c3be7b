"""Adapters: one module per training framework, each importing only its own."""
