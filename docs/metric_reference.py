"""The tables of metrics and columns in the README: `python docs/metric_reference.py README.md`.

They are written from the schema, so they say what the code does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from channel_metrics.core.schema import TOKENS, Schema

BEGIN = "<!-- Written by docs/metric_reference.py: begin -->"
END = "<!-- Written by docs/metric_reference.py: end -->"


def reference_of(schema: Schema) -> str:
    """The metrics and the columns of `schema` as two Markdown tables."""
    metrics = [(metric.name, metric.unit or "0 to 1", metric.doc) for metric in schema.metrics]
    metrics += [
        (f"{column.name}_total", column.unit, f"`{column.name}` since the run began")
        for column in schema.columns
        if column.total
    ]
    columns = [(column.name, column.unit, column.doc) for column in schema.columns]
    parts = (
        *_table(("metric", "unit", "what it is"), metrics),
        "",
        "They are computed from these sums, one of each per channel:",
        "",
        *_table(("column", "unit", "what is added up"), columns),
    )
    return "\n".join(parts)


def parts_of(text: str) -> tuple[str, str, str]:
    """What stands before, between and after the two markers."""
    before, begin, rest = text.partition(f"{BEGIN}\n\n")
    block, end, after = rest.partition(f"\n\n{END}\n")
    if not begin or not end:
        raise ValueError(f"expected the lines {BEGIN} and {END}, but one is missing; put it back.")
    return before + begin, block, end + after


def main(page: Path) -> None:
    """Write the tables between the markers of `page`."""
    before, _, after = parts_of(page.read_text(encoding="utf-8"))
    page.write_text(before + reference_of(TOKENS) + after, encoding="utf-8")


def _table(heads: tuple[str, str, str], rows: Iterable[tuple[str, str, str]]) -> list[str]:
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|"]
    return lines + [f"| `{name}` | {unit} | {doc} |" for name, unit, doc in rows]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
