"""Importing this gives LLaMA-Factory's trainers channel metrics, in unmodified commands.

    channel-metrics run --patch llamafactory $(which llamafactory-cli) train config.yaml
    import channel_metrics.patches.llamafactory

It includes `channel_metrics.patches.hf_trainer`. `revert()` undoes both for trainers that are made
later.
"""

from __future__ import annotations

import os
import sys

if __name__ == "llamafactory":
    # This folder is on sys.path (ms-swift adds the folder of a plugin), so this file hides the
    # package of the same name. Import that package instead.
    _folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _folder]
    del sys.modules["llamafactory"]
    import llamafactory  # noqa: F401 - it takes this name in sys.modules
else:
    from channel_metrics.trainers.llamafactory.patch import apply, is_applied, revert

    apply()

__all__ = ["apply", "is_applied", "revert"]
