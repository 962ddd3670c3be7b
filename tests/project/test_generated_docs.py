"""The generated parts of the pages say what the code does, and the examples in them run."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from schema_tools import EASY, registered

from channel_metrics import MetricsConfig
from channel_metrics.acting import Section
from channel_metrics.analysis.readers.keys import _OF_SETTINGS
from channel_metrics.core.axis_settings import COLUMN, LENGTH, MODALITY, POSITION, TREE_MEAN
from channel_metrics.core.percentiles import BINS
from channel_metrics.core.schema import TOKENS
from channel_metrics.data.yaml import load_metrics_config
from channel_metrics.demo.config import load_config
from channel_metrics.trainers.megatron.arguments import add_arguments
from docs.generate import PAGES, ROOT, generated, schema_of, settings_of
from docs.signatures import interface_of


@pytest.mark.parametrize("page", PAGES)
def test_the_generated_parts_are_up_to_date(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text == generated(text), "run: python docs/generate.py"


def test_every_metric_and_column_has_a_row_with_all_cells() -> None:
    with registered(*EASY):
        text = schema_of(TOKENS)
    assert "| `easy_share` | 0 to 1 | easy / tokens | `easy`, `tokens` | free |" in text
    assert "| `easy` | tokens | tokens with a loss below 1 |" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    # All bins have one line.
    columns = len(TOKENS.column_names) - len(BINS) + 1
    assert len(rows) == len(TOKENS.metric_names) + columns + len(EASY)
    num_metrics = len(rows) - columns - 1
    for number, row in enumerate(rows):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == (5 if number < num_metrics else 3) and all(cells), row


def test_every_value_that_settings_add_has_a_row() -> None:
    page = (ROOT / "docs/REFERENCE.md").read_text(encoding="utf-8")
    section = page.split("## Values that settings add")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    for name in (*_OF_SETTINGS, f"{TREE_MEAN}/code_loss"):
        assert sum(f"{name}`" in row for row in rows) == 1, name


def test_settings_show_type_default_and_doc() -> None:
    from channel_metrics.config import MetricsConfig

    rows = settings_of(MetricsConfig).splitlines()
    (unknown,) = [row for row in rows if row.startswith("| `unknown`")]
    assert '| `"add" or "unlabeled" or "error"` | `add` | What happens to a channel' in unknown


@pytest.mark.parametrize("text", ["", "<!-- generated: metrics -->\nold\n", "old\n<!-- end -->\n"])
def test_a_page_without_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="one is missing"):
        generated(text)


def test_the_files_on_the_page_of_settings_are_valid(tmp_path: Path) -> None:
    text = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    alone, targets, run = [part.split("```")[0] for part in text.split("```yaml\n")[1:]]
    path = tmp_path / "file.yaml"
    path.write_text(alone)
    assert load_metrics_config(path).metrics[-1] == "tokens_total"
    path.write_text(targets)
    assert load_metrics_config(path).eval_channels == ("bbu", "rru")
    path.write_text(run)
    settings = load_config(path)
    assert settings.metrics_of_run() == load_metrics_config(path), "`run --config` takes it, too"
    assert settings.probe is not None and list(settings.probe.sources) == ["canary"]
    given = set(yaml.safe_load(run)["metrics"])
    assert given == {field.name for field in dataclasses.fields(MetricsConfig)}


def test_the_forms_of_axes_are_all_that_there_are() -> None:
    page = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    section = page.split("\n### `axes`\n")[1].split("\n### ")[0]
    forms = re.findall(r"`(\w+: (?:\{.*?\}|\[.*?\]|[\w.]+))`(?=,| \|)", section)
    found = [MetricsConfig(axes=yaml.safe_load(form)).axes for form in forms]
    sources = [source for axes in found for source in axes.values()]
    by = {source.get("by") for source in sources if isinstance(source, Mapping)}
    assert by == {None, POSITION, LENGTH, COLUMN, MODALITY} and "{by: template}" in section
    assert sum(isinstance(source, tuple) for source in sources) == 2


@pytest.mark.parametrize("page", ["docs/REFERENCE.md", "docs/config.md"])
def test_every_option_of_megatron_is_there(page: str) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    text = (ROOT / page).read_text(encoding="utf-8")
    names = [one for action in add_arguments(parser)._actions for one in action.option_strings]
    assert "--channels" in names
    assert [name for name in names if f"`{name}`" not in text and f"`{name} " not in text] == []


def test_the_settings_of_every_section_are_on_the_page() -> None:
    page = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    for section in Section.__subclasses__():
        part = f"<!-- generated: settings {section.__module__}:{section.__name__} -->"
        assert part in page, section


def test_every_environment_variable_is_in_the_reference() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "channel_metrics").rglob("*.py"))
    names = set(re.findall(r'environ(?:\.get\(|\[)"(\w+)"', code))
    names |= set(re.findall(r'^\w+_VARIABLE = "(\w+)"', code, re.MULTILINE))
    names |= set(re.findall(r'"(CHANNEL_METRICS_\w+)"', code))
    assert {"CHANNEL_METRICS_CONFIG", "CHANNEL_METRICS_WEBHOOK", "RANK"} <= names
    page = (ROOT / "docs/REFERENCE.md").read_text(encoding="utf-8")
    section = page.split("### Environment variables")[1].split("\n## ")[0]
    assert {name for name in names if f"`{name}`" not in section} == set()


def test_every_schema_is_among_the_files_of_the_reference() -> None:
    page = (ROOT / "docs/REFERENCE.md").read_text(encoding="utf-8")
    section = page.split("\n## Files\n")[1].split("\n## ")[0]
    names = {path.name for path in (ROOT / "docs").glob("*.schema.json")}
    assert {"alerts.schema.json", "windows.schema.json"} <= names
    assert {name for name in names if f"({name})" not in section} == set()


def test_every_batch_key_is_in_the_reference() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "channel_metrics").rglob("*.py"))
    keys = set(re.findall(r'^\w+_KEY = "(channel_\w+)"', code, re.MULTILINE))
    assert {"channel_cu_seqlens", "channel_record_ids"} <= keys
    page = (ROOT / "docs/REFERENCE.md").read_text(encoding="utf-8")
    section = page.split("\n## Fields of a batch\n")[1].split("\n## ")[0]
    assert {key for key in keys if f"`{key}`" not in section} == set()


def test_an_overridden_method_stands_in_the_reference_once() -> None:
    lines = interface_of("channel_metrics").splitlines()
    (start,) = (at for at, line in enumerate(lines) if line.startswith("- **`MetricsConfig("))
    methods = [line for line in lines[start:] if "`check_acting()" in line]
    assert len(methods) == 1


def test_every_public_package_is_in_the_reference() -> None:
    """With all its names, and what they do."""
    page = (ROOT / "docs/REFERENCE.md").read_text(encoding="utf-8")
    for init in (ROOT / "channel_metrics").rglob("__init__.py"):
        package = ".".join(init.parent.relative_to(ROOT).parts)
        found = re.search(r"^__all__ = (\[.*?\])", init.read_text(), re.DOTALL | re.MULTILINE)
        if found is None or package == "channel_metrics.cli":
            continue
        assert f"<!-- generated: interface {package} -->" in page, package
        lines = interface_of(package).splitlines()
        assert all(re.match(r"(    )?- (\*\*)?`.+`(\*\*)?: .", line) for line in lines)
        names = [line.split("`")[1].split("(")[0] for line in lines if line.startswith("- ")]
        assert names == ast.literal_eval(found[1])


def test_the_signature_of_the_settings_has_all_of_them() -> None:
    lines = interface_of("channel_metrics").splitlines()
    (line,) = [line for line in lines if line.startswith("- **`MetricsConfig(")]
    names = [field.name for field in dataclasses.fields(MetricsConfig)]
    assert [name for name in names if not re.search(rf"[( ]{name}: ", line)] == []


def test_signatures_are_those_of_the_code() -> None:
    line = (
        "- **`attach(trainer: TrainerT, config: MetricsConfig | None=None, *, "
        "whole_script: bool=False) -> TrainerT`**: Give `trainer` channel metrics."
    )
    assert line in interface_of("channel_metrics.trainers.hf")
    text = interface_of("channel_metrics.trainers.megatron")
    assert "    - `end_step(*, discard: bool=False) -> None`: End a training step." in text
