"""Calls timed beside each other: rounds of all variants alternate, ratios are taken per round.

A busy moment of the machine then hits all variants alike, and the median drops it.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import channel_metrics
from benchmarks.peers import Call, found_package

__all__ = ["Timing", "compare", "machine", "one_thread", "peak_mib"]


@dataclass(frozen=True)
class Timing:
    """One variant: median time of a call, and median over rounds of its ratio to the first."""

    variant: str
    median_us: float
    ratio: float
    num_rounds: int


def compare(
    calls: Mapping[str, Call],
    *,
    num_rounds: int,
    max_seconds: float = float("inf"),
    num_calls: int = 1,
    num_warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time all calls, round by round; the first one is what the others are measured against.

    num_calls: calls timed together, for those that are near the resolution of the clock; one
        more goes before them, so that no variant finds the caches as another has left them.
    max_seconds: no round is begun after this time, but two are always done.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.monotonic()
    for number in range(num_warmup + num_rounds):
        if number >= num_warmup + 2 and time.monotonic() - begun > max_seconds:
            break
        for name, call in calls.items():
            if num_calls > 1:
                call()
            start = clock()
            for _ in range(num_calls):
                call()
            if number >= num_warmup:
                times[name].append((clock() - start) / num_calls)
    baseline = next(iter(times.values()))
    return [
        Timing(
            variant=name,
            median_us=round(statistics.median(taken) * 1e6, 1),
            ratio=round(statistics.median(_ratios(taken, baseline)), 4),
            num_rounds=len(taken),
        )
        for name, taken in times.items()
    ]


@contextmanager
def one_thread() -> Iterator[None]:
    """For calls of microseconds: on a busy machine, threads that wait for each other take ms.

    Also lets malloc see one large block, as any training process has: it then keeps its pages.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.zeros(7_500_000)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    names = ("torch", "transformers", "ms-swift", "veomni")
    return {
        "processor": _processor(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "device": "cpu",
        "channel_metrics": channel_metrics.__version__,
        **{name: found_package(name).version for name in names},
    }


def peak_mib(call: Call) -> float:
    """The most memory that tensors made inside `call` hold at one time, in MiB.

    By torch's own record of what it allocates and frees: to the byte the same each time.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events: Any = recorded.profiler
    changes: list[tuple[int, int]] = sorted(
        (event.start_ns(), event.nbytes())
        for event in events.kineto_results.events()
        if event.name() == "[memory]"
    )
    return max(accumulate(size for _, size in changes)) / 2**20


def _ratios(taken: list[float], baseline: list[float]) -> list[float]:
    return [value / base for value, base in zip(taken, baseline, strict=True)]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
