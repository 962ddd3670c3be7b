"""The cost of `ChannelLossAccumulator.update`, against one masked sum of the same tensor.

    python -m benchmarks.update

The masked sum is what a trainer does anyway to get its loss, and the least that any metric must
do. Rounds of all cases alternate, so that a busy moment of the machine hits all alike; what is
reported is the median time, and the median over rounds of the ratio.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import channel_metrics
from channel_metrics import ChannelLossAccumulator

RESULTS = Path(__file__).parent / "results" / "update.json"
NUM_ROUNDS = 200
NUM_WARMUP = 20
NUM_CALLS = 5
"""Calls per round and case, timed together: one call is near the resolution of a busy machine."""


@dataclass(frozen=True)
class Case:
    """The size of one micro-batch."""

    num_tokens: int
    num_sequences: int
    num_channels: int


@dataclass(frozen=True)
class Row:
    """One variant of the call, in one case."""

    case: Case
    variant: str
    median_us: float
    ratio: float


CASES = (Case(65_536, 2_048, 64), Case(8_192, 256, 16))

Call = Callable[[], object]


def variants(case: Case) -> dict[str, Call]:
    """The calls to compare; the first is the masked sum."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(case.num_tokens, generator=generator)
    mask = torch.rand(case.num_tokens, generator=generator) < 0.8
    correct = torch.rand(case.num_tokens, generator=generator) < 0.5
    bounds = random_bounds(case, generator)
    ids = torch.randint(case.num_channels, (case.num_sequences,), generator=generator)
    accumulator = ChannelLossAccumulator([f"channel{i}" for i in range(case.num_channels)])

    def masked_sum() -> Tensor:
        return (losses * mask).sum()

    update = partial(accumulator.update, losses, channels=ids, cu_seqlens=bounds, loss_mask=mask)
    return {
        "masked sum": masked_sum,
        "update": update,
        "update with correctness": partial(update, correct=correct),
    }


def random_bounds(case: Case, generator: torch.Generator) -> Tensor:
    """int32 [num_sequences + 1], sequences of uneven lengths, all tokens covered."""
    inner = torch.randperm(case.num_tokens - 1, generator=generator)[: case.num_sequences - 1] + 1
    ends = torch.tensor([0, case.num_tokens])
    return torch.cat([inner, ends]).sort().values.to(torch.int32)


def seconds(call: Call) -> float:
    """The mean time of a call, over NUM_CALLS."""
    start = time.perf_counter()
    for _ in range(NUM_CALLS):
        call()
    return (time.perf_counter() - start) / NUM_CALLS


def measure(case: Case) -> list[Row]:
    """All variants of one case, round by round."""
    calls = variants(case)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(NUM_WARMUP + NUM_ROUNDS):
        for name, call in calls.items():
            taken = seconds(call)
            if number >= NUM_WARMUP:
                times[name].append(taken)
    baseline = next(iter(times.values()))
    return [
        Row(
            case=case,
            variant=name,
            median_us=round(statistics.median(taken) * 1e6, 1),
            ratio=round(statistics.median(map(ratio, taken, baseline)), 2),
        )
        for name, taken in times.items()
    ]


def ratio(value: float, base: float) -> float:
    """`value` as a multiple of `base`."""
    return value / base


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    return {
        "processor": processor(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "channel_metrics": channel_metrics.__version__,
        "device": "cpu",
    }


def processor() -> str:
    """The name of the CPU, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    """Measure, print the table, write results/update.json."""
    rows = [row for case in CASES for row in measure(case)]
    print("  tokens sequences channels  call                      median us   times masked sum")
    for row in rows:
        case = row.case
        print(
            f"{case.num_tokens:8,} {case.num_sequences:9,} {case.num_channels:8}  "
            f"{row.variant:24} {row.median_us:10,.1f} {row.ratio:18.2f}"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    result = {
        "command": "python -m benchmarks.update",
        "num_rounds": NUM_ROUNDS,
        "machine": machine(),
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
