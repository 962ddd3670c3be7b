"""Importing this gives Megatron-LM's training loop the option `--channels`, in unmodified scripts.

    import channel_metrics.patches.megatron      # before the script imports from megatron

Nothing changes without `--channels` in the command line. `channel_metrics.trainers.megatron.patch`
lists what is patched. `revert()` undoes all of it.
"""

from __future__ import annotations

import os
import sys

if __name__ == "megatron":
    # This folder is on sys.path (ms-swift adds the folder of a plugin), so this file hides the
    # package of the same name. Import that package instead.
    _folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _folder]
    del sys.modules["megatron"]
    import megatron  # noqa: F401 - it takes this name in sys.modules
else:
    from channel_metrics.trainers.megatron.patch import apply, current_run, is_applied, revert

    apply()

__all__ = ["apply", "current_run", "is_applied", "revert"]
