"""All that `channel_metrics` exports, imported after torch, in fresh processes, by CPU time."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

__all__ = ["run"]

# Both in one process: what differs between processes is more than what we add.
_CODE = """
from time import process_time as now
start = now()
import torch
between = now()
from channel_metrics import *
print(between - start, now() - start)
"""


def run(num_rounds: int = 15) -> dict[str, object]:
    """Median CPU seconds, and the median over rounds of the ratio."""
    _measure()  # fills the file caches, and writes the bytecode
    rounds = [_measure() for _ in range(num_rounds)]
    torch, both = zip(*rounds, strict=True)
    return {
        "import torch, s": round(statistics.median(torch), 3),
        "import torch and channel_metrics, s": round(statistics.median(both), 3),
        "ratio": round(statistics.median(ours / base for base, ours in rounds), 4),
    }


def _measure() -> tuple[float, float]:
    # Installed packages have their bytecode; without it, ours would be compiled each time.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", _CODE],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    torch, both = map(float, done.stdout.split())
    return torch, both
