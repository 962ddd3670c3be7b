"""The tables of metrics in the README are those of the schema."""

from __future__ import annotations

from pathlib import Path

import pytest
from schema_tools import EASY, registered

from channel_metrics.core.schema import TOKENS
from docs.metric_reference import BEGIN, END, main, parts_of, reference_of

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_readme_has_the_tables_of_the_schema() -> None:
    assert parts_of(README.read_text(encoding="utf-8"))[1] == reference_of(TOKENS), (
        "run: python docs/metric_reference.py README.md"
    )


def test_every_metric_and_column_has_a_row_with_all_cells() -> None:
    with registered(*EASY):
        text = reference_of(TOKENS)
    assert "| `easy_share` | 0 to 1 | easy / tokens |" in text
    assert "| `easy` | tokens | tokens with a loss below 1 |" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(TOKENS.metric_names) + len(TOKENS.column_names) + len(EASY)
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 3 and all(cells), row


def test_the_tables_are_written_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = "as of old\n\n{}\n\n{}\n\n{}\n\nolder\n"
    page.write_text(text.format(BEGIN, "old", END))
    main(page)
    assert page.read_text() == text.format(BEGIN, reference_of(TOKENS), END)


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n\nold\n", f"old\n\n{END}\n"])
def test_a_page_without_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="one is missing"):
        parts_of(text)
