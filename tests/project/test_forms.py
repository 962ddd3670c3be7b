"""The forms for issues, and how to cite: files that only GitHub reads."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from paths import ROOT

import channel_metrics

FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_has_what_github_needs(path: Any) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert fields and all(field["attributes"]["label"] for field in fields)
    ids = [field["id"] for field in fields]
    assert len(set(ids)) == len(ids)


def test_the_form_for_bugs_asks_for_the_doctor() -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text(encoding="utf-8"))
    (field,) = [field for field in form["body"] if "channel-metrics doctor" in str(field)]
    assert field["validations"] == {"required": True}


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == channel_metrics.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
