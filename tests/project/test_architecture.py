"""The tests that docs/architecture.md names exist."""

from __future__ import annotations

import re

from paths import ROOT, TESTS


def test_each_match_of_two_lists_has_a_test() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.split("## Lists that are matched")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    rows = [row for row in rows if not row.startswith(("| list ", "|---"))]
    assert len(rows) > 30
    for row in rows:
        named = row.split("|")[-2]
        places = [TESTS / place for place in re.findall(r"`([\w/]+\.py|contract)`", named)]
        assert places and all(place.exists() for place in places), row
        for function in re.findall(r"`(\w+)`", named):
            files = [f for place in places for f in ([place] if place.is_file() else [])]
            files += [f for place in places if place.is_dir() for f in place.glob("*.py")]
            found = any(f"def {function}(" in file.read_text() for file in files)
            assert found or function == "contract", function
