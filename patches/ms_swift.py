"""Importing this gives ms-swift's trainers channel metrics, in unmodified scripts and commands.

    swift sft ... --external_plugins patches/ms_swift.py
    import channel_metrics.patches.ms_swift

`channel_metrics.trainers.swift.patch` lists what is patched. The config is read from the YAML file
in the environment variable CHANNEL_METRICS_CONFIG, if it is set. `revert()` undoes the patch for
trainers that are made later.
"""

from __future__ import annotations

import os
import sys

from channel_metrics.trainers.swift.patch import apply, is_applied, revert

__all__ = ["apply", "is_applied", "revert"]

# ms-swift has added the folder of this plugin to sys.path, and its child processes inherit that.
# trl.py and megatron.py in the folder would hide the packages of these names.
_folder = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _folder]

apply()
