"""Importing this gives every transformers Trainer channel metrics, in an unmodified script.

    import channel_metrics.patches.hf_trainer

`channel_metrics.trainers.hf.attach` is called for each trainer that is made afterwards. The config
is read from the YAML file in the environment variable CHANNEL_METRICS_CONFIG, if it is set.
`revert()` undoes the patch for trainers that are made later.
"""

from __future__ import annotations

from channel_metrics.trainers.hf.patch import apply, is_applied, revert

__all__ = ["apply", "is_applied", "revert"]

apply()
