"""Channel metrics in ms-swift: `swift sft` and `swift pt`. Keys and limits: docs/ms_swift.md.

    swift sft ... --external_plugins patches/ms_swift.py

or, for a trainer of one's own, `attach(trainer)`, or
`class MyTrainer(SwiftChannelMetricsMixin, Seq2SeqTrainer)`.
"""

from __future__ import annotations

from channel_metrics.trainers.hf import attach, detach
from channel_metrics.trainers.swift.collator import SwiftCollator
from channel_metrics.trainers.swift.data import with_channel_column
from channel_metrics.trainers.swift.mixin import SwiftChannelMetricsMixin

__all__ = [
    "SwiftChannelMetricsMixin",
    "SwiftCollator",
    "attach",
    "detach",
    "with_channel_column",
]
