"""The command `channel-metrics`."""

from channel_metrics.cli.main import main

__all__ = ["main"]
