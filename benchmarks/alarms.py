"""How often alerts of forgetting and overfitting are false, and how late the true ones are.

    python -m benchmarks.alarms            # 200 runs for each line of the table; five minutes
    python -m benchmarks.alarms --runs 40

The losses of each channel stay at 2 nats, or fall from 8 to 2 as 2 + 6 / (1 + window / 10). Their
noise has a standard deviation of 0.02 nats, and windows k apart correlate by r^k. Any rise that is
found counts as false, whatever the other losses do, so alerts are rarer still. For the delays, a
level loss rises after 300 windows, at once.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from statistics import median

from channel_metrics.observers.rises import add, group_rate, new_state

__all__ = ["delays", "false_alarms", "losses"]

_NOISE = 0.02
_RATE = 0.05
_AT = 300


def losses(
    seed: str, windows: int, correlation: float, *, is_falling: bool, rise: float = 0, at: int = 0
) -> Iterator[float]:
    """The losses of one channel. rise: in standard deviations of its noise, from window `at`."""
    draw = random.Random(seed)
    noise = draw.gauss(0, 1)
    for window in range(windows):
        if window:
            noise = correlation * noise + math.sqrt(1 - correlation**2) * draw.gauss(0, 1)
        level = 2 + (6 / (1 + window / 10) if is_falling else 0)
        yield level + _NOISE * (noise + (rise if rise and window >= at else 0))


def false_alarms(
    runs: int, channels: int, windows: int, correlation: float, *, is_falling: bool
) -> int:
    """How many of the runs have a rise in any channel, at any window."""
    count = 0
    for run in range(runs):
        names = (f"{run} {channel}" for channel in range(channels))
        series = (losses(name, windows, correlation, is_falling=is_falling) for name in names)
        count += any(_first_rise(one, channels) is not None for one in series)
    return count


def delays(runs: int, channels: int, correlation: float, rise: float) -> list[float]:
    """For each run how many windows it takes until the rise is found; infinite if it is not."""
    found = []
    for run in range(runs):
        series = losses(f"delay {run}", 800, correlation, is_falling=False, rise=rise, at=_AT)
        first = _first_rise(series, channels)
        found.append(math.inf if first is None else float(first - _AT + 1))
    return found


def _first_rise(series: Iterator[float], channels: int) -> int | None:
    state = new_state(group_rate(_RATE, 1, channels))
    return next((n for n, loss in enumerate(series) if add(state, [loss, 1.0]) is not None), None)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--channels", type=int, default=10)
    parser.add_argument("--windows", type=int, default=500)
    args = parser.parse_args()
    print(f"{args.runs} runs of {args.channels} channels and {args.windows} windows, rate {_RATE}")
    for is_falling in (False, True):
        for correlation in (0.0, 0.3, 0.5):
            count = false_alarms(
                args.runs, args.channels, args.windows, correlation, is_falling=is_falling
            )
            what = "falling" if is_falling else "level"
            print(f"false, {what} losses, correlation {correlation}: {count} of {args.runs} runs")
    for rise in (1, 2, 3, 5, 10, 30):
        for correlation in (0.0, 0.3, 0.5):
            found = delays(args.runs // 4, args.channels, correlation, rise)
            print(
                f"delay, rise of {rise} standard deviations, correlation {correlation}: "
                f"{median(found):.0f} windows, at most {max(found):.0f}"
            )


if __name__ == "__main__":
    main()
