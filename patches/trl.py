"""Importing this gives TRL's trainers channel metrics, packing included, in unmodified scripts.

    import channel_metrics.patches.trl

It includes `channel_metrics.patches.hf_trainer`. `revert()` undoes both for trainers that are made
later.
"""

from __future__ import annotations

import os
import sys

if __name__ == "trl":
    # This folder is on sys.path (ms-swift adds the folder of a plugin), so this file hides the
    # package of the same name. Import that package instead.
    _folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _folder]
    del sys.modules["trl"]
    import trl  # noqa: F401 - it takes this name in sys.modules
else:
    from channel_metrics.trainers.trl.patch import apply, is_applied, revert

    apply()

__all__ = ["apply", "is_applied", "revert"]
