"""The old name of `channel_metrics.trainers.hf.probe`."""

import warnings

from channel_metrics.trainers.hf.probe import DatasetMetricsCallback

__all__ = ["DatasetMetricsCallback"]

warnings.warn(
    "channel_metrics.trainers.hf_probe is now channel_metrics.trainers.hf.probe; "
    "import it from there.",
    DeprecationWarning,
    stacklevel=2,
)
