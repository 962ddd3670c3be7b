"""`import channel_metrics` against `import torch`, in fresh processes, by CPU time."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

__all__ = ["run"]


def run(num_rounds: int = 7) -> dict[str, object]:
    """Median CPU seconds, and the median over rounds of the ratio."""
    taken: dict[str, list[float]] = {"torch": [], "torch, channel_metrics": []}
    for number in range(num_rounds + 1):
        for modules, seconds in taken.items():
            spent = _cpu_seconds(modules)
            if number:  # the first round fills the file caches
                seconds.append(spent)
    torch, both = taken.values()
    ratios = [ours / base for ours, base in zip(both, torch, strict=True)]
    return {
        "import torch, s": round(statistics.median(torch), 3),
        "import torch and channel_metrics, s": round(statistics.median(both), 3),
        "ratio": round(statistics.median(ratios), 4),
    }


def _cpu_seconds(modules: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
