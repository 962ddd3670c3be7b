"""docs/benchmarks.svg and the tables of docs/benchmarks.md, from the results that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.pages import write_pages

__all__ = ["write_report"]

# By number of tokens: the most that `update` was meant to take.
GOALS = {65_536: 8.0}
_MARK = "<!-- tables: written by python -m benchmarks -->"


def write_report(results: Path, docs: Path) -> None:
    """Write the tables of the pages, and draw the ratios of `update`."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    page = docs / "benchmarks.md"
    head = page.read_text().split(_MARK)[0]
    page.write_text(head + _MARK + "\n" + "\n".join(_sections(found)))
    write_pages(found, docs)
    if "update" in found:
        _plot(found["update"]["rows"], docs / "benchmarks.svg")


def _sections(found: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, measured in found.items():
        tables = {key: rows for key, rows in measured.items() if key != "machine"}
        if not all(isinstance(rows, list) for rows in tables.values()):
            continue
        machine = measured["machine"]
        lines += ["", f"## {name}", ""]
        lines.append(
            f"{machine['processor']}, {machine['num_cpus']} cores, torch {machine['torch']}, "
            f"{machine['num_threads']} threads unless the text says one."
        )
        for rows in tables.values():
            lines += ["", *_table(rows)]
    return [*lines, ""]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(rows[0])
    body = [
        " | ".join("" if row[name] is None else str(row[name]) for name in columns) for row in rows
    ]
    return [
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
        *(f"| {row} |" for row in body),
    ]


def _colour(variant: str) -> str:
    if variant.startswith("update"):
        return "tab:blue"
    return "tab:gray" if variant in ("masked sum", "plain segment reduction") else "tab:orange"


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "benchmarks"
    from matplotlib import pyplot

    sizes = list(dict.fromkeys(row["num_tokens"] for row in rows))
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(11, 4), sharex=True)
    for axis, size in zip(axes, sizes, strict=True):
        chosen = [row for row in rows if row["num_tokens"] == size][::-1]
        names, ratios = ([row[key] for row in chosen] for key in ("variant", "ratio"))
        bars = axis.barh(names, ratios, color=[_colour(name) for name in names])
        axis.bar_label(bars, [f"{ratio:.3g}" for ratio in ratios], padding=2)
        if size in GOALS:
            axis.axvline(GOALS[size], color="black", linestyle=":", linewidth=1)
            axis.text(GOALS[size], len(names) - 0.4, "goal", ha="center", va="bottom", fontsize=8)
        axis.margins(x=0.15, y=0.05)
        axis.set(xscale="log", title=f"{size:,} tokens", xlabel="times one masked sum")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
