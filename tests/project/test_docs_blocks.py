"""Every block of code in README and docs is run, or says here why it is not.

Commands of `channel-metrics` are parsed by its own command line, wherever they stand.
"""

from __future__ import annotations

import doctest
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from channel_metrics.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ("README.md", "CONTRIBUTING.md", *DOCS)

# `make docs` checks the links of docs/.
AT_THE_ROOT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")

# {page: the test that runs its Python, besides examples with >>>}
RUN_BY = {
    "docs/lightning.md": "tests/trainers/lightning/test_lightning_docs.py",
    "docs/own_loop.md": "tests/project/test_own_loop_page.py",
    "docs/porting.md": "tests/project/test_porting_page.py",
    "docs/fused_losses.md": "tests/project/test_docs_parts.py",
    "docs/hf_trainer.md": "tests/project/test_docs_parts.py",
    "docs/probe.md": "tests/project/test_docs_parts.py",
    "docs/report.md": "tests/project/test_docs_parts.py",
    "docs/acting.md": "tests/test_acting.py",
    "docs/sampler.md": "tests/trainers/hf/test_hf_sampler.py",
    "docs/stream.md": "tests/test_stream.py",
    "docs/gradients.md": "tests/capture/test_gradients.py",
}

# {(page, first line of a block): why it is not run}
NOT_RUN = {
    ("docs/architecture.md", "from channel_metrics import TOKENS, Column, Metric"): (
        "it would register a metric for all tests; tests/test_registry.py registers this one"
    ),
    (
        "docs/grouped_packing.md",
        "train_set = GroupedPackingDataset(dataset, template, group_key_fn=group_of)",
    ): ("the old pattern, which is not part of this project"),
    ("docs/grouped_packing.md", "from channel_metrics.trainers.swift import attach"): (
        "ms-swift changes the process; tests/trainers/swift run this in a process of its own"
    ),
    ("docs/ms_swift_megatron.md", "from channel_metrics import MetricsConfig"): (
        "as above; tests/trainers/swift_megatron run it"
    ),
    ("docs/megatron.md", "from functools import partial"): (
        "needs the model and the data of a loop; tests/trainers/megatron run such loops"
    ),
    ("docs/trl.md", "from channel_metrics.trainers.trl import attach"): (
        "needs the data of a trainer; tests/trainers/trl run both ways"
    ),
    ("docs/trl.md", "from channel_metrics.trainers.trl import SFTChannelMetricsMixin"): "as above",
}


TRAINERS = (
    *("hf_trainer", "trl", "ms_swift", "ms_swift_megatron"),
    *("megatron", "megatron_bridge", "lightning", "llamafactory", "axolotl", "own_loop"),
)
# Pages with >>> in their blocks.
WITH_EXAMPLES = ("docs/REFERENCE.md", "docs/axes.md", "docs/concepts.md", "docs/excess.md")


class Block(NamedTuple):
    """A fenced or indented block of a page."""

    page: str
    line: int
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [Block(page, text[: m.start()].count("\n") + 1, m[2], m[3]) for m in found]


ALL = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in ALL if block.language == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=lambda b: f"{b.page}:{b.line}")
def test_python(block: Block) -> None:
    if ">>>" in block.text:
        # Examples of a page go on from each other, so they are run together: test_examples.
        assert block.page in WITH_EXAMPLES
        return
    assert block.page in RUN_BY or (block.page, first_line(block)) in NOT_RUN, (
        f"{block.page}:{block.line} is run by no test"
    )
    # Not imported: ms-swift would change the process.
    for module in re.findall(r"^(?:from|import) (channel_metrics\S*)", block.text, re.MULTILINE):
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("page", WITH_EXAMPLES)
def test_examples(page: str) -> None:
    result = doctest.testfile(str(ROOT / page), module_relative=False)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_lists_here_are_of_blocks_that_exist() -> None:
    shown = {(block.page, first_line(block)) for block in PYTHON}
    assert set(NOT_RUN) <= shown
    assert set(RUN_BY) <= {block.page for block in PYTHON}
    for test in RUN_BY.values():
        assert (ROOT / test).exists()


@pytest.mark.parametrize("page", PAGES)
def test_commands(page: str) -> None:
    group: Any = typer.main.get_command(app)
    for name, *arguments in map(shlex.split, commands(page)):
        assert name in group.commands, f"{page}: channel-metrics {name}"

        parse(group.commands[name], arguments)


def test_commands_are_found_and_wrong_ones_fail() -> None:
    assert "report runs/debug" in commands("docs/report.md")
    assert any(line.startswith("run --patch megatron") for line in commands("docs/megatron.md"))
    group: Any = typer.main.get_command(app)
    with pytest.raises(Exception, match="--patches"):
        parse(group.commands["run"], ["--patches", "x"])


@pytest.mark.parametrize("name", TRAINERS)
def test_pages_of_trainers_open_with_code_and_list_their_metrics(name: str) -> None:
    text = (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")
    first, *others = re.split(r"^## ", text, flags=re.MULTILINE)
    assert "```" in first
    (metrics, *_) = [part for part in others if part.startswith("Logged metrics")]
    assert "\n|---|---" in metrics


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^```diff.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    folders = "benchmarks|channel_metrics|configs|constraints|docs|patches|scripts|tests"
    names = re.findall(rf"`((?:{folders})/[\w./]+)`", text)
    others = ("tests/trainer/", "patches/NAME.py")  # transformers', and a placeholder
    assert not [n for n in names if not (ROOT / n).exists() and not n.startswith(others)]


@pytest.mark.parametrize("page", AT_THE_ROOT)
def test_links_of_pages_at_the_root_resolve(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert links or page == "SECURITY.md"
    assert not [link for link in links if not (ROOT / link).exists()]


def parse(command: Any, arguments: list[str]) -> None:
    """Raise for an option that the command does not have. Nothing runs, and no file must exist."""
    context = command.make_context(command.name, [], resilient_parsing=True)
    context.resilient_parsing = False
    command.make_parser(context).parse_args(list(arguments))


def first_line(block: Block) -> str:
    """What names a block in the lists here."""
    return block.text.splitlines()[0]


def commands(page: str) -> list[str]:
    """The command lines of `channel-metrics` in a page, without comments."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"(?:channel-metrics|-m channel_metrics) ([a-z]+(?: [^`\n]*)?)", text)
    return [re.sub(r"\s#.*", "", line).strip() for line in found]
