"""How often alerts are false, and how late the true ones are.

    python -m benchmarks.alarms            # 200 runs for each line; writes benchmarks/results/
    python -m benchmarks.alarms --runs 40

Rises: the losses of each channel stay at 2 nats, or fall from 8 to 2 as 2 + 6 / (1 + window / 10).
Their noise has a standard deviation of 0.02 nats, and windows k apart correlate by r^k. Any rise
that is found counts as false, whatever the other losses do, so alerts are rarer still. For the
delays, a level loss rises after 300 windows, at once.

Delays of the alerts of absent channels and of shares: benchmarks/alarm_runs.py.

The observer of alerts, with all its kinds: benchmarks/alarm_runs.py.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.alarm_runs import false_alerts, share_delay, starved_delay
from benchmarks.timing import machine
from channel_metrics.alerting import KINDS
from channel_metrics.observers.alerts import rates
from channel_metrics.observers.rises import add, group_rate, new_state

__all__ = ["delays", "false_alarms", "losses"]

_NOISE = 0.02
_RATE = 0.05
_RESULTS = Path(__file__).parent / "results" / "alarms.json"
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
    state = new_state(group_rate(rates(_RATE, KINDS)[0], 1, channels))
    return next((n for n, loss in enumerate(series) if add(state, [loss, 1.0]) is not None), None)


def main() -> None:
    """Print both tables, and write every number."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--channels", type=int, default=10)
    parser.add_argument("--windows", type=int, default=500)
    parser.add_argument("--output", type=Path, default=_RESULTS)
    args = parser.parse_args()
    print(f"{args.runs} runs of {args.channels} channels and {args.windows} windows, rate {_RATE}")
    found: dict[str, Any] = {
        "machine": machine(),
        "settings": {"runs": args.runs, "channels": args.channels, "windows": args.windows},
        "rate": _RATE,
        "alerts": _observed(args),
        "rises": _rises(args),
        "delays": _delays(args),
        "starved": _starved(args),
        "share": _shares(args),
    }
    args.output.write_text(json.dumps(found, indent=1) + "\n")


def _observed(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for unit in ("samples", "tokens"):
        runs = [false_alerts(run, args.channels, args.windows, unit) for run in range(args.runs)]
        print(f"alerts, shares of {unit}: {sum(map(bool, runs))} of {args.runs} runs")
        rows.append({"unit": unit, "kinds of each run with an alert": [one for one in runs if one]})
    return rows


def _rises(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for is_falling in (False, True):
        for correlation in (0.0, 0.3, 0.5):
            count = false_alarms(
                args.runs, args.channels, args.windows, correlation, is_falling=is_falling
            )
            what = "falling" if is_falling else "level"
            print(f"rises, {what} losses, correlation {correlation}: {count} of {args.runs} runs")
            rows.append({"losses": what, "correlation": correlation, "runs with a rise": count})
    return rows


def _delays(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for rise in (1, 2, 3, 5, 10, 30):
        for correlation in (0.0, 0.3, 0.5):
            found = delays(args.runs // 4, args.channels, correlation, rise)
            print(
                f"delay, rise of {rise} standard deviations, correlation {correlation}: "
                f"{median(found):.0f} windows, at most {max(found):.0f}"
            )
            windows = [None if math.isinf(one) else one for one in found]
            rows.append({"rise": rise, "correlation": correlation, "windows": windows})
    return rows


def _starved(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for chance in (1.0, 0.5, 0.2, 0.07):
        found = [starved_delay(run, args.channels, chance, _RATE) for run in range(args.runs // 4)]
        print(f"starved, was in {chance:.0%} of the windows: {_told(found)}")
        rows.append({"part of windows": chance, "windows": found})
    return rows


def _shares(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for before in (0, _AT):
        for target, off in ((0.5, 0.03), (0.5, 0.05), (0.5, 0.1), (0.1, 0.03), (0.1, 0.1)):
            found = [share_delay(run, target, off, _RATE, before) for run in range(args.runs // 4)]
            print(f"share {target:.0%}, off by {off:.0%} after {before} windows: {_told(found)}")
            rows.append({"target": target, "off": off, "before": before, "windows": found})
    return rows


def _told(found: Sequence[int | None]) -> str:
    known = [math.inf if one is None else one for one in found]
    return f"{median(known):.0f} windows, at most {max(known):.0f}"


if __name__ == "__main__":
    main()
