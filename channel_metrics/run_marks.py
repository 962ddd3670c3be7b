"""What the processes of one `channel-metrics run` tell each other: small marks, by name.

The folder in the variable CHANNEL_METRICS_RUN has one empty file per mark. All processes below
`channel-metrics run` have that variable.
"""

from __future__ import annotations

import os

__all__ = ["RUN_VARIABLE", "mark"]

RUN_VARIABLE = "CHANNEL_METRICS_RUN"


def mark(name: str) -> bool:
    """Leave a mark for the run, if there is one.

    Args:
        name: a file name. The end of `channel-metrics run` looks for `patched`, `session` (a
            trainer has metrics) and `channel` (a channel was logged).

    Returns:
        False if a process of this run has left the mark before.
    """
    folder = os.environ.get(RUN_VARIABLE)
    if not folder:
        return True
    try:
        os.close(os.open(os.path.join(folder, name), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:
        return True  # The run has ended before this process, or is on another machine.
    return True
