"""Importing this gives Megatron-Bridge's `pretrain` channel metrics, in unmodified scripts.

    channel-metrics run --patch megatron_bridge train.py ...
    import channel_metrics.patches.megatron_bridge

Import it before the script imports from `megatron.bridge`. `revert()` undoes it for later
trainings.
"""

from __future__ import annotations

from channel_metrics.trainers.megatron_bridge.patch import apply, is_applied, revert

apply()

__all__ = ["apply", "is_applied", "revert"]
