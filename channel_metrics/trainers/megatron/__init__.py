"""Channel metrics in Megatron-LM and in loops over megatron-core's schedules."""

from __future__ import annotations

from channel_metrics.trainers.megatron.counting import MegatronChannelMetrics

__all__ = ["MegatronChannelMetrics"]
