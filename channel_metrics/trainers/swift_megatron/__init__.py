"""Channel metrics in ms-swift's Megatron trainer: `megatron sft` and `megatron pt`."""

from __future__ import annotations

from channel_metrics.trainers.swift_megatron.attaching import (
    attach,
    check_megatron_trainer,
    detach,
)
from channel_metrics.trainers.swift_megatron.mixin import SwiftMegatronMixin

__all__ = ["SwiftMegatronMixin", "attach", "check_megatron_trainer", "detach"]
