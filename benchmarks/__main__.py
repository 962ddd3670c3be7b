"""Measures everything, and writes benchmarks/results/*.json, docs/benchmarks.md and .svg.

python -m benchmarks            # all of it
python -m benchmarks update     # a part
python -m benchmarks report     # table and plot only, from the results that are there
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import acting, cluster, counts, formulations, head, imports, scale, step, update
from benchmarks.report import write_report
from benchmarks.timing import machine

RESULTS = Path(__file__).parent / "results"
PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "imports": lambda: {"rows": [imports.run()]},
    "counts": lambda: {"rows": counts.run()},
    "update": lambda: {"rows": update.run(), "growth": update.growth()},
    "formulations": lambda: {"rows": formulations.run()},
    "scale": lambda: {
        "rows": scale.run(),
        "host": scale.host(),
        "union": [cluster.union_on_host()],
        "arithmetic": cluster.rows(),
    },
    "head": lambda: {"memory": head.peak_memory(), "rows": head.run()},
    "step": lambda: {
        "memory": step.peak_memory(),
        "rows": step.run(),
        "axes": step.run(step.ON_AXES),
        "further": step.run(step.FURTHER),
    },
    "acting": lambda: {
        "alerts": acting.alerts(),
        "kept": acting.kept(),
        "outliers": acting.outliers(),
    },
}


def main() -> None:
    """Run the chosen parts, then write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}, report; default: all")
    chosen = parser.parse_args().parts or list(PARTS)
    unknown = set(chosen) - {*PARTS, "report"}
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    for name in chosen:
        if name == "report":
            continue
        start = time.monotonic()
        measured = PARTS[name]()
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps({"machine": machine(), **measured}, indent=1)
        (RESULTS / f"{name}.json").write_text(text + "\n")
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    write_report(RESULTS, Path(__file__).parents[1] / "docs")


if __name__ == "__main__":
    main()
