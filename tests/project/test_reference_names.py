"""What the pages tell users to call stands in docs/REFERENCE.md."""

from __future__ import annotations

import re

import pytest
from test_docs_blocks import ALL, PAGES, ROOT

REFERENCE = (ROOT / "docs/REFERENCE.md").read_text(encoding="utf-8")
# What the objects of ours are called in the pages.
OBJECTS = (
    *("metrics", "session", "trainer.channel_metrics", "seen", "evaluation", "window", "acc"),
    *("config", "stream", "swap", "callback", "MetricsConfig", "ChannelMetrics", "TOKENS"),
)
FILES = ("md", "py", "yaml", "parquet", "csv", "json", "jsonl")
# Modules for examples and tests, not for users.
OTHERS = ("channel_metrics.demo.",)


def names_in(page: str) -> set[str]:
    """`metrics.gradients.watch` and the like, in code and in `code` of the text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    code = [block.text for block in ALL if block.page == page and block.language == "python"]
    code += re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M))
    objects = "|".join(map(re.escape, OBJECTS))
    form = rf"(?<![\w./\]])(?:self\.)?({objects})((?:\.[a-z]\w+)+)"
    found = {one + rest for part in code for one, rest in re.findall(form, part)}
    return {name for name in found if name.rpartition(".")[2] not in FILES}


def imports_in(page: str) -> set[str]:
    """`load_run` and the like, imported from a package of ours."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"\bfrom (channel_metrics[\w.]*) import (\w[\w, ]*)", text)
    ours = (names for package, names in found if not package.startswith(OTHERS))
    return {name.strip() for names in ours for name in names.split(",")}


def stands(name: str) -> bool:
    """Whether a name has an entry: its own line, or the setting or field of a class."""
    entry = rf"`{name}[`(:]|[(,] ?{name}: |interface channel_metrics(\.\w+)*[. ]{name} "
    return re.search(entry, REFERENCE) is not None


# CONTRIBUTING.md is for those who change the library.
@pytest.mark.parametrize("page", sorted({*PAGES} - {"docs/REFERENCE.md", "CONTRIBUTING.md"}))
def test_names(page: str) -> None:
    attributes = {part for name in names_in(page) for part in name.split(".")[1:]}
    attributes -= {"get", "items"}
    missing = {name for name in attributes | imports_in(page) if not stands(name)}
    assert missing == set()


def test_names_are_found() -> None:
    assert "metrics.stop_reason" in names_in("docs/acting.md")
    assert "metrics.gradients.watch" in names_in("docs/gradients.md")
    assert "seen.token_losses" in names_in("docs/own_loop.md")
    assert "load_run" in imports_in("docs/report.md")
    assert not stands("no_such_name")
