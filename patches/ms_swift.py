"""Importing this gives ms-swift's trainers channel metrics, in unmodified scripts and commands.

    swift sft ... --external_plugins patches/ms_swift.py
    import channel_metrics.patches.ms_swift

What is patched: `channel_metrics.trainers.swift.patch`. The config is read from the YAML file that
the environment variable CHANNEL_METRICS_CONFIG names, if it is set. `revert()` undoes it for what
is made later.
"""

from __future__ import annotations

import os
import sys

from channel_metrics.trainers.swift.patch import apply, is_applied, revert

__all__ = ["apply", "is_applied", "revert"]

# ms-swift has put the folder of this plugin first on the path, and processes that it starts take
# the path over: trl.py and megatron.py in it would stand before the packages of these names.
_folder = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _folder]

apply()
