"""Channel metrics in ms-swift: `swift sft`, `pt` and `rlhf`. Keys and limits: docs/ms_swift.md.

    swift sft ... --external_plugins patches/ms_swift.py

In your own code, use `attach(trainer)`, or
`class MyTrainer(SwiftChannelMetricsMixin, Seq2SeqTrainer)`.

Names are imported when they are first used. ms-swift changes transformers for the whole process,
and `SwiftCollator` does not need it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from channel_metrics.trainers.hf import attach, detach
    from channel_metrics.trainers.hf.columns import with_channel_column
    from channel_metrics.trainers.swift.collator import SwiftCollator
    from channel_metrics.trainers.swift.mixin import SwiftChannelMetricsMixin

__all__ = [
    "SwiftChannelMetricsMixin",
    "SwiftCollator",
    "attach",
    "detach",
    "with_channel_column",
]

_MODULES = {
    "SwiftChannelMetricsMixin": "swift.mixin",
    "SwiftCollator": "swift.collator",
    "attach": "hf",
    "detach": "hf",
    "with_channel_column": "hf.columns",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"channel_metrics.trainers.{_MODULES[name]}"), name)
