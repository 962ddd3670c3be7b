"""Keeps the outcomes of the matrix, and writes them into docs/compatibility.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matrix.rows import PACKAGES, ROWS

__all__ = ["BEGIN", "END", "PAGE", "load", "table", "write"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
RESULTS = Path(__file__).with_name("results.json")
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
_COLUMNS = ("python", "torch", *PACKAGES)


def load() -> dict[str, Any]:
    """{name of a row: its outcome}"""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def write(results: dict[str, Any]) -> None:
    """Store the outcomes, and put their table between the two marks of the page."""
    known = {row.name: results[row.name] for row in ROWS if row.name in results}
    RESULTS.write_text(json.dumps(known, indent=2) + "\n")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(known)}{END}{rest.split(END)[1]}")


def table(results: dict[str, Any]) -> str:
    """The outcomes as a table in Markdown."""
    lines = [
        f"| row | Python | torch | {' | '.join(PACKAGES)} | date | result |",
        f"|{'---|' * (len(_COLUMNS) + 3)}",
    ]
    for row in ROWS:
        if row.name not in results:
            continue
        found = results[row.name]
        versions = " | ".join(found["versions"].get(name, "") for name in _COLUMNS)
        result = f"{found['passed']} passed, {found['skipped']} skipped"
        if found["failed"]:
            result = f"**{len(found['failed'])} failed**, {result}"
        lines.append(f"| {row.name} | {versions} | {found['date']} | {result} |")
    return "\n".join(lines) + "\n"
