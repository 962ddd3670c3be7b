"""The page of a report, taken apart."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from channel_metrics.analysis.report.groupings import Grouping
from channel_metrics.analysis.report.html import MAX_BYTES, write_report
from channel_metrics.analysis.report.views import rank_channels, views_of
from channel_metrics.analysis.run import Run


class Page(HTMLParser):
    """The elements of a page, the texts of its scripts and styles, and all other text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.text = ""
        self.open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.open = tag

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open in self.inside:
            self.inside[self.open].append(data)
        else:
            self.text += data

    @property
    def data(self) -> Any:
        """The numbers for the script."""
        return json.loads(self.inside["script"][0])


def page_of(runs: list[Run], folder: Path, **more: Any) -> Page:
    """The page of a report that is written here."""
    file = folder / "report.html"
    size = write_report(runs, file, **more)
    assert file.stat().st_size == size.num_bytes < MAX_BYTES
    return Page(file.read_text(encoding="utf-8"))


def channels_of(run: Run) -> Grouping:
    """The channels of a run, as they stand in a page."""
    return Grouping(axis="", views=views_of([run]), found=[[]], names=rank_channels([run]))
