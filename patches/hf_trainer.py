"""Importing this gives every transformers Trainer channel metrics, in an unmodified script.

    import channel_metrics.patches.hf_trainer

Each trainer that is made afterwards gets `channel_metrics.trainers.hf.attach`. The config is read
from the YAML file that the environment variable CHANNEL_METRICS_CONFIG names, if it is set.
`revert()` undoes it for trainers made later.
"""

from __future__ import annotations

from channel_metrics.trainers.hf.patch import apply, is_applied, revert

__all__ = ["apply", "is_applied", "revert"]

apply()
