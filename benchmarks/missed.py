"""How many rises of a loss the findings of `analyze` and `report` miss.

    python -m benchmarks.missed            # writes benchmarks/results/missed.json

Losses scatter around 2 with a standard deviation of 0.1. Neighbours correlate by 0.3. All losses of
the last third, or of the last tenth, are higher by 1 to 3 standard deviations.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from channel_metrics.analysis.judging.trends import trends_of
from channel_metrics.analysis.readers.readings import Problems
from channel_metrics.analysis.run import run_from_readings

__all__ = ["CASES", "COUNTS", "RUNS", "states"]

RUNS = 200
COUNTS = (20, 40, 100, 400)
CASES = (
    *(("third", rise) for rise in (0.5, 1, 2, 3)),
    *(("tenth", rise) for rise in (1, 2, 3)),
)
_PARTS = {"third": 3, "tenth": 10}
_CORRELATION = 0.3
# Values that are drawn before the first one, so that it is like the others.
_BEFORE = 100
_RESULTS = Path(__file__).parent / "results" / "missed.json"


def states(where: str, rise: float, count: int) -> dict[str, int]:
    """{what the loss is called: in how many of `RUNS` runs}, of runs with so many values."""
    generator = np.random.default_rng(5)
    found: Counter[str] = Counter()
    for _ in range(RUNS):
        values = _noise(generator, count)
        values[count - count // _PARTS[where] :] += rise
        losses = enumerate((2 + 0.1 * values).tolist(), 1)
        run = run_from_readings(
            [(step, "a_loss", loss) for step, loss in losses],
            name="run",
            origin="memory",
            problems=Problems(),
        )
        found.update(trend.state for trend in trends_of(run))
    return dict(sorted(found.items()))


def _noise(generator: np.random.Generator, count: int) -> Any:
    """float64 [count] with a variance of 1."""
    values = generator.standard_normal(count + _BEFORE)
    for now in range(1, len(values)):
        values[now] += _CORRELATION * values[now - 1]
    return values[_BEFORE:] * math.sqrt(1 - _CORRELATION**2)


def main() -> None:
    """Write all cells of the table in docs/report.md."""
    rows = [
        {"where": where, "rise": rise, "values": count, "states": states(where, rise, count)}
        for where, rise in CASES
        for count in COUNTS
    ]
    found = {"numpy": np.__version__, "runs": RUNS, "rows": rows}
    _RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
