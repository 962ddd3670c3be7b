"""Channel metrics in Axolotl's supervised fine-tuning. Two lines of the YAML file turn them on:

    plugins:
      - channel_metrics.trainers.axolotl.ChannelMetricsPlugin

The `name` of each entry in `datasets:` is a channel, or else the name of its file.
"""

from __future__ import annotations

from channel_metrics.trainers.axolotl.plugin import ChannelMetricsArgs, ChannelMetricsPlugin

__all__ = ["ChannelMetricsArgs", "ChannelMetricsPlugin"]
