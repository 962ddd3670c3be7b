"""A plugin for pytest that applies a patch before the tests of another project are imported."""

from __future__ import annotations

import importlib
import os

importlib.import_module(f"channel_metrics.patches.{os.environ['CHANNEL_METRICS_PATCH']}")
